"""The compiled artefact: a diffusers folder whose transformer is stored quantized. Writing, and reading as if it were hostile.

`transformer/config.json` holds `quantization_config`: `quant_method`, `spec`, the recipe, each layer's `LayerSpec`, the timestep
edges of static scales, and the sha256 of the weights. `transformer/diffusion_pytorch_model.safetensors`, or the shards of its
index, hold `<layer>.<field>` for every tensor of its `LayerSpec`, and what stayed dense. The same tensors give the same bytes.
Diffusers writes config.json before it knows the weights; what its `save_pretrained` writes has the sha256 of its tensors in their
file's header instead. The header also has the sha256 of what the config says of the layers: formats of one size, trellis codes of
another window, would otherwise be read for each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from quantdit import memory, transform
from quantdit.files import (
    CheckpointError,
    digest,
    digest_of,
    narrowest,
    open_weights,
    read_json,
    tensors_in,
    weight_files,
    write_json,
    write_tensors,
)
from quantdit.layer_spec import LayerSpec, layer_fields
from quantdit.linear import QuantLinear, follow_timesteps
from quantdit.qtensor import FIELDS, check_values

SPEC = 2
MAX_TIMESTEP = 1e9
METHOD = "quantdit"

_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
}
_DENSE = ("F32", "F16", "BF16")


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized layers of a model by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def own_keys(model: nn.Module) -> set[str]:
    """Return the state-dict keys of a model's quantized layers besides their biases; all other tensors are dense."""
    return {f"{name}.{field}" for name, layer in quant_layers(model).items() for field in layer_fields(layer.layer_spec)}


def is_scale(key: str) -> bool:
    """Return whether a layer's tensor is its scale, float32 in memory and perhaps narrower in a file."""
    return key.endswith(".scale")


def in_memory(key: str, tensor: Tensor) -> Tensor:
    """Return a copy of a quantized layer's tensor that a file holds, as the layer has it."""
    return tensor.to(torch.float32, copy=True) if is_scale(key) else tensor.clone()


def write_transformer(
    model: nn.Module, folder: Path, recipe: dict, provenance: dict, read: Callable[[str], Tensor] | None = None
) -> str:
    """Write a transformer with QuantLinear layers; returns the sha256 of its weights (`files.digest`).

    Dense floats and scales are stored as float16 or bfloat16 where that loses nothing, else float32.

    Args:
        model: the transformer.
        folder: of its weights and config.json.
        recipe: that made it, as JSON.
        provenance: what it was made from, as JSON.
        read: returns a tensor of its state dict, for a model whose blocks are not in memory.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own, state = own_keys(model), model.state_dict()

    def tensor(name: str) -> Tensor:
        value = state[name] if read is None or state[name].device.type != "meta" else read(name)
        return value if name in own and not is_scale(name) else narrowest(value)

    described = describe(model, recipe, provenance)
    header = {"spec": SPEC, "recipe": recipe, "provenance": provenance, "layers_sha256": layers_digest(described)}
    write_tensors(folder, state, tensor, {METHOD: json.dumps(header, sort_keys=True)})
    found = digest(folder)
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_") and k != "quantization_config" and _is_json(v)}
    config = {"_class_name": type(model).__name__, "_diffusers_version": version("diffusers"), **config}
    config["quantization_config"] = described | {"sha256": found}
    write_json(folder / "config.json", config)
    return found


def describe(model: nn.Module, recipe: dict, provenance: dict) -> dict:
    """Return the quantization_config of a transformer with QuantLinear layers, but for the sha256 of its file."""
    return {
        "quant_method": METHOD,
        "spec": SPEC,
        "recipe": recipe,
        "provenance": provenance,
        "timestep_edges": list(getattr(model, "timestep_edges", ())),
        "layers": {name: asdict(m.layer_spec) for name, m in quant_layers(model).items()},
    }


def is_quantized(folder: Path) -> bool:
    """Return whether a transformer folder was written by quantdit."""
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def identity(folder: Path) -> str:
    """Return the sha256 that tells a quantized transformer's weights from any other's, whoever wrote the folder.

    Of the files, as calibration states it in config.json; of the tensors, as save_pretrained does in their file's header.

    Raises:
        CheckpointError: the folder is no quantdit checkpoint, or states neither.
    """
    if not is_quantized(folder):
        raise CheckpointError(f"{folder} is not quantized by quantdit; run quantdit calibrate first")
    stated = read_json(folder / "config.json")["quantization_config"].get("sha256")
    if stated is None:
        with open_weights(weight_files(folder)[0]) as file:
            stated = _header(file).get("tensors_sha256")
    if not isinstance(stated, str):
        raise CheckpointError(f"{folder} has no sha256 of its weights; copy the folder again")
    return stated


def read_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Read a quantized transformer; dense floats become `dtype`, scales stay float32.

    Everything is checked against the config before anything is allocated: names, dtypes, shapes, then the file's sha256, then
    the values (finite scales, codes that stay in the int8 range).

    Raises:
        CheckpointError: the folder is no quantdit checkpoint, is of a newer spec, or is damaged.
    """
    where = folder / "config.json"
    config = read_json(where)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{where}: no quantization_config of quantdit; was this folder made by quantdit?")
    check_spec(quantization, where)
    paths = weight_files(folder)
    _check_plausible(config, len(tensors_in(paths)), where)
    model = build_on_meta(config, folder)
    edges = prepare(model, quantization, paths, where)
    own, state = own_keys(model), {}
    for path in paths:
        with open_weights(path) as file:
            for key in sorted(file.keys()):
                # Copies: how a mapped tensor lies in its file decides which routine multiplies with it, and so the last bits.
                tensor = file.get_tensor(key)
                if key in own:
                    state[key] = in_memory(key, tensor)
                else:
                    check_dense(key, tensor, path)
                    state[key] = tensor.to(torch.float32 if stays_float32(model, key) else dtype, copy=True)
    model.load_state_dict(state, assign=True)
    set_weight_dtype(model, dtype)
    finish(model, edges, _place(paths))
    return model.requires_grad_(False).eval()


def check_spec(quantization: dict, where: Path) -> None:
    """Refuse a quantization_config of another version.

    Raises:
        CheckpointError: it is older, newer, or none.
    """
    spec = quantization.get("spec")
    if type(spec) is not int or spec != SPEC:
        older = type(spec) is int and 0 < spec < SPEC
        remedy = "calibrate the model again" if older else "upgrade with pip install -U quantdit"
        raise CheckpointError(f"{where}: checkpoint spec {spec!r}, but this quantdit reads spec {SPEC}; {remedy}")


def prepare(model: nn.Module, quantization: dict, paths: list[Path], where: Path) -> tuple[float, ...]:
    """Replace a full-precision model's linears by QuantLinear layers on the meta device; returns the timestep edges.

    What can be checked of the files before their tensors are allocated is: names, dtypes, shapes, the sha256.

    Args:
        model: parameters on the meta device.
        quantization: the quantization_config, of this SPEC.
        paths: of its weight files.
        where: the config came from.

    Raises:
        CheckpointError: the config fits neither the model nor the files, or these are damaged.
    """
    _put_layers(model, quantization, where)
    edges = _timestep_edges(quantization, quant_layers(model), where)
    weights = _place(paths)
    places = tensors_in(paths)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(open_weights(path)) for path in paths}
        _check_header({key: opened[path] for key, path in places.items()}, model, weights)
        _check_digest(quantization, paths, list(opened.values()), weights, where)
    return edges


def finish(model: nn.Module, edges: tuple[float, ...], weights: Path) -> None:
    """Check the values of the quantized layers of a model whose tensors are in place, and have it follow its timesteps.

    Raises:
        CheckpointError: scales that are not finite, codes that leave the int8 range, a rotation that is none.
    """
    for name, layer in quant_layers(model).items():
        state = layer._buffers
        if (wrong := check_values(layer.spec, {f: state[f] for f in FIELDS if f in state})) is not None:
            raise CheckpointError(f"{weights}: layer {name}: {wrong}; the file was damaged, copy or calibrate it again")
        others = {n: state[n] for n in ("static_scale", "up", "down") if n in state}
        wrong = transform.check_values(layer.transform) or _not_finite(others)
        if "static_scale" in others and not bool((others["static_scale"] > 0).all()):
            wrong = "static_scale has entries that are not positive"
        if wrong is not None:
            raise CheckpointError(f"{weights}: layer {name}: {wrong}; the file was damaged, copy it again")
    follow_timesteps(model, edges)
    memory.give_back()


def check_dense(key: str, tensor: Tensor, weights: Path) -> None:
    """Refuse a dense tensor with NaN or infinite entries.

    Raises:
        CheckpointError: naming it.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{weights}: tensor {key} has NaN or infinite entries; the file was damaged, copy it again")


def stays_float32(model: nn.Module, key: str) -> bool:
    """Return whether a dense tensor is float32 whatever the dtype of the model, as its class in diffusers asks for."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return not {kept}.isdisjoint(key.split(".")) if isinstance(kept, str) else not set(kept).isdisjoint(key.split("."))


def set_weight_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Tell the quantized layers of a model in which dtype it was loaded: those without a bias have no other sign of it."""
    for name, layer in quant_layers(model).items():
        layer.weight_dtype = torch.float32 if stays_float32(model, name) else dtype


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 of the tensors' names, dtypes, shapes and bytes, in whatever order they come."""
    sums = []
    for name, t in tensors:
        data = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        sums.append(hashlib.sha256(f"{name} {t.dtype} {tuple(t.shape)} ".encode() + data.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(sums)).encode()).hexdigest()


def layers_digest(quantization: Mapping) -> str:
    """Return the sha256 of what a quantization_config says that tensors are read by: its layers, its timestep edges."""
    read_by = {key: quantization[key] for key in ("layers", "timestep_edges")}
    return hashlib.sha256(json.dumps(read_by, sort_keys=True).encode()).hexdigest()


def _check_digest(quantization: Mapping, paths: list[Path], opened: list, weights: Path, where: Path) -> None:
    stated, source, header = quantization.get("sha256"), "config", _header(opened[0])
    if stated is None:
        stated, source = header.get("tensors_sha256"), "header"
        if stated is None:
            raise CheckpointError(f"{where}: quantization_config has no sha256 of {weights}; copy the folder again")
        got = tensors_digest((key, file.get_tensor(key)) for file in opened for key in file.keys())  # noqa: SIM118
    else:
        got = digest_of(paths)
    if got != stated:
        raise CheckpointError(
            f"{weights}: sha256 is {got[:12]}..., the {source} says {str(stated)[:12]}...;"
            " the file was damaged or changed, copy it again"
        )
    if header.get("layers_sha256") != layers_digest(quantization):
        raise CheckpointError(
            f"{where}: what it says of the layers is not what {weights} was written with; copy both again, or calibrate again"
        )


def _header(file) -> dict:
    """Return what we put into a weight file's header, {} for none of ours."""
    try:
        found = json.loads((file.metadata() or {}).get(METHOD, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _place(paths: list[Path]) -> Path:
    return paths[0] if len(paths) == 1 else paths[0].parent


def _check_plausible(config: dict, tensors: int, where: Path) -> None:
    """Refuse sizes that would build forever: more layers than the file has tensors, or any number no model has."""
    for key, value in config.items():
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
        if number > (tensors if "layers" in key else 2**20):
            raise CheckpointError(
                f"{where}: {key} = {value} is not plausible for a file of {tensors} tensors; copy the folder again"
            )


def build_on_meta(config: dict, folder: Path, compute_buffers: bool = True) -> nn.Module:
    """Build the full-precision transformer that a config.json describes, parameters on the meta device.

    Buffers are computed, such as tables of positions, which can take half a minute, or put on the meta device too.

    Raises:
        CheckpointError: not a model class of diffusers, or one that cannot be built from this config.
    """
    import diffusers
    from accelerate import init_empty_weights

    where = folder / "config.json"
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckpointError(f"{where}: diffusers {version('diffusers')} has no model class {config.get('_class_name')!r}")
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    try:
        with init_empty_weights(include_buffers=False) if compute_buffers else torch.device("meta"):
            return cls.from_config(plain)
    except Exception as error:  # a model class may fail on a hostile config in any way
        raise CheckpointError(f"{where}: {cls.__name__} cannot be built from it: {error}") from error


def _put_layers(model: nn.Module, quantization: dict, where: Path) -> None:
    """Put the quantized layers, on the meta device, into a full-precision model."""
    layers = quantization.get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}: quantization_config.layers must be a table of layers")
    for name, entry in layers.items():
        try:
            parent = model.get_submodule(name.rpartition(".")[0])
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"{where}: layer {name!r} does not exist in {type(model).__name__}") from error
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{where}: layer {name!r} is a {type(linear).__name__}, expected a Linear")
        setattr(parent, name.rpartition(".")[2], _layer(name, entry, linear, where))


def _layer(name: str, entry: object, linear: nn.Linear, where: Path) -> QuantLinear:
    try:
        spec = LayerSpec.from_dict(entry)
    except ValueError as error:
        raise CheckpointError(f"{where}: layer {name!r}: {error}") from error
    weight = spec.weight
    if (weight.out_features, weight.in_features) != (linear.out_features, linear.in_features):
        raise CheckpointError(
            f"{where}: layer {name!r} is {weight.out_features} x {weight.in_features} in quantization_config,"
            f" but {linear.out_features} x {linear.in_features} in the model"
        )
    try:
        return QuantLinear(spec, linear.bias is not None, device="meta")
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{where}: layer {name!r}: {error}") from error


def _timestep_edges(quantization: dict, layers: dict[str, QuantLinear], where: Path) -> tuple[float, ...]:
    edges = quantization.get("timestep_edges")
    numbers = isinstance(edges, list) and all(type(e) in (int, float) and abs(e) < MAX_TIMESTEP for e in edges)
    if not numbers or edges not in (sorted(edges), sorted(edges, reverse=True)):
        raise CheckpointError(f"{where}: timestep_edges must be a list of numbers that all fall or all rise, got {edges!r:.80}")
    for name, layer in layers.items():
        buckets = layer.layer_spec.activation.buckets
        if buckets not in (0, len(edges)):
            raise CheckpointError(
                f"{where}: layer {name!r} has {buckets} static scales, but there are {len(edges)} timestep_edges"
            )
    return tuple(float(e) for e in edges)


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    bad = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    return f"{bad[0]} has NaN or infinite entries" if bad else None


def _check_header(opened: dict, model: nn.Module, weights: Path) -> None:
    own, expected = own_keys(model), model.state_dict()
    names = opened.keys()
    if missing := sorted(expected.keys() - names):
        raise CheckpointError(f"{weights}: tensor {_first(missing)} is missing; copy it again")
    if extra := sorted(names - expected.keys()):
        raise CheckpointError(f"{weights}: unexpected tensor {_first(extra)}: file and config disagree")
    for key, tensor in expected.items():
        stored = opened[key].get_slice(key)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        dtypes = (_DTYPES[tensor.dtype],) if key in own and not is_scale(key) else _DENSE
        if shape != tuple(tensor.shape) or dtype not in dtypes:
            raise CheckpointError(
                f"{weights}: tensor {key} is {dtype} {shape}, expected {' or '.join(dtypes)} {tuple(tensor.shape)}:"
                " file and config disagree"
            )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
