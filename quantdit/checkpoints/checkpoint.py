"""The compiled artefact: a diffusers folder whose transformer is stored quantized. Writing, and reading as if it were hostile.

`transformer/config.json` holds `quantization_config`: `quant_method`, `spec`, the recipe, each layer's `LayerSpec`, the timestep
edges of static scales, and the sha256 of the weights. `transformer/diffusion_pytorch_model.safetensors`, or the shards of its
index, hold `<layer>.<field>` for every tensor of its `LayerSpec`, and what stayed dense. The same tensors give the same bytes.
Diffusers writes config.json before it knows the weights; what its `save_pretrained` writes has the sha256 of its tensors in their
file's header instead. The header also has the sha256 of what the config says of the layers: formats of one size, trellis codes of
another window, would otherwise be read for each other. From spec 3 on it has the rest of the config too, and that of the
pipeline's scheduler if `quantdit calibrate` wrote it: another `norm_eps` or `shift` fits the tensors as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantdit.checkpoints.libraries import (
    DIFFUSERS,
    aliases,
    config_of,
    library_of,
    library_of_config,
    names_in,
    settings_of,
    tie,
)
from quantdit.layers import quant_attention
from quantdit.layers.quant_embedding import QuantEmbedding, put_layer, scale_of
from quantdit.layers.quant_linear import QuantLinear, follow_timesteps
from quantdit.recipes.attention import AttentionSpec
from quantdit.step_plans.step_plan import StepPlan
from quantdit.system import memory
from quantdit.system.files import (
    CheckpointError,
    Stored,
    digest,
    digest_of,
    is_finite,
    narrowest,
    open_weights,
    read_json,
    stored_tensors,
    tensors_in,
    weight_files,
    write_json,
    write_tensors,
)
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import NARROWER, LayerSpec, as_computed, as_stored, layer_fields
from quantdit.tensors.qtensor import FIELDS, check_values

FORMAT_VERSION = 4
# Spec 2 has no config in the header. Up to spec 3 a smoothed layer's premultiplier is float32, an outlier rotation dense.
READABLE_VERSIONS = (2, 3, FORMAT_VERSION)
MAX_TIMESTEP = 1e9
METHOD = "quantdit"
SCHEDULER = Path("scheduler", "scheduler_config.json")
SWITCHES = ("attention", "step_plan")
COMPUTED_BY = ("layers", "timestep_edges", *SWITCHES)
KEYS = {"quant_method", "spec", "recipe", "provenance", *COMPUTED_BY, "sha256"}
MAX_DEPTH = 32  # of tables in a model's config
# Numbers in tables that a model computes, such as one of positions, beside as many as its file has.
FREE_TABLE = 2**26
COUNTS = ("layers", "blocks", "depth")  # in keys of a config: how many modules are built

_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int16: "I16",
}
_DENSE = ("F32", "F16", "BF16")


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized layers of a model by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def own_keys(model: nn.Module) -> set[str]:
    """Return the state-dict keys of a model's quantized layers besides their biases; all other tensors are dense."""
    return {f"{name}.{field}" for name, layer in quant_layers(model).items() for field in layer_fields(layer.layer_spec)}


def write_transformer(
    model: nn.Module,
    folder: Path,
    recipe: dict,
    provenance: dict,
    read: Callable[[str], Tensor] | None = None,
    scheduler: dict | None = None,
) -> str:
    """Write a transformer with QuantLinear layers; returns the sha256 of its weights (`files.digest`).

    Dense floats and scales are stored as float16 or bfloat16 where that loses nothing, else float32; see also `as_stored`.

    Args:
        model: the transformer.
        folder: of its weights and config.json.
        recipe: that made it, as JSON.
        provenance: what it was made from, as JSON.
        read: returns a tensor of its state dict, for a model whose blocks are not in memory.
        scheduler: `scheduler_of` the pipeline it was calibrated in.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own, state, library = own_keys(model), stored_state(model), library_of(model)

    def tensor(name: str) -> Tensor:
        value = state[name] if read is None or state[name].device.type != "meta" else read(name)
        return as_stored(_field(name), value) if name in own else narrowest(value)

    described, config = describe(model, recipe, provenance), config_of(model)
    header = {"spec": FORMAT_VERSION, "recipe": recipe, "provenance": provenance, "layers_sha256": layers_digest(described)}
    header["config"] = config
    if scheduler is not None:
        header["scheduler"] = scheduler
    write_tensors(folder, state, tensor, {METHOD: json.dumps(header, sort_keys=True)}, weights=library.weights)
    found = digest(folder)
    stated = library.notes(model) | config | {"quantization_config": described | {"sha256": found}}
    write_json(folder / "config.json", stated)
    return found


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model as files hold it: tied tensors once, under the first of their names."""
    tied = aliases(model)
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


def scheduler_of(folder: Path) -> dict | None:
    """Return the config of a pipeline folder's scheduler as a quantized transformer remembers it, None without one.

    Raises:
        CheckpointError: it cannot be read.
    """
    where = folder / SCHEDULER
    return DIFFUSERS.settings(read_json(where, finite=False)) if where.exists() else None


def check_scheduler(pipeline: Path, transformer: Path) -> None:
    """Refuse a pipeline whose scheduler is not configured as it was when its transformer was calibrated, if that is known.

    Args:
        pipeline: its folder.
        transformer: the folder of its quantized transformer.

    Raises:
        CheckpointError: naming what differs.
    """
    with open_weights(weight_files(transformer)[0]) as file:
        then = _header(file).get("scheduler")
    if then is not None:
        _check_unchanged(then, scheduler_of(pipeline) or {}, pipeline / SCHEDULER)


def _check_unchanged(then: object, now: dict, where: Path) -> None:
    if not isinstance(then, dict):
        raise CheckpointError(f"{where}: the header of the weights has no config to compare it with; copy both again")
    old, new = ({key: json.dumps(value, sort_keys=True) for key, value in of.items()} for of in (then, now))
    if differs := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        key = differs[0]
        was, got = (f"{of[key]:.80}" if key in of else "not there" for of in (old, new))
        more = f" (and {len(differs) - 1} more differ)" if len(differs) > 1 else ""
        raise CheckpointError(
            f"{where}: {key} is {got}, was {was} when the model was quantized{more}; copy the file again, or if you changed it on"
            " purpose load with accept_config=True (--accept-config)"
        )


def describe(model: nn.Module, recipe: dict, provenance: dict) -> dict:
    """Return the quantization_config of a transformer with QuantLinear layers, but for the sha256 of its file."""
    return {
        "quant_method": METHOD,
        "spec": FORMAT_VERSION,
        "recipe": recipe,
        "provenance": provenance,
        "timestep_edges": list(getattr(model, "timestep_edges", ())),
        "layers": {name: m.layer_spec.to_dict() for name, m in quant_layers(model).items()},
    } | describe_switches(model)


def describe_switches(model: nn.Module) -> dict:
    """Return the quantization_config's entries for 8-bit attention and a step plan, where the model has them."""
    plan, attention = getattr(model, "step_plan", None), getattr(model, "attention_specs", {})
    found = {"attention": {name: spec.to_dict() for name, spec in attention.items()}} if attention else {}
    return found | ({"step_plan": plan.to_dict()} if isinstance(plan, StepPlan) else {})


def is_quantized(folder: Path) -> bool:
    """Return whether a transformer folder was written by quantdit."""
    return quantized_by(read_json(folder / "config.json")) == METHOD


def quantized_by(config: Mapping) -> str | None:
    """Return the name of the tool that quantized what a config.json describes: METHOD for us, None for nobody."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) and method.isprintable() else "an unknown tool"


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


def read_transformer(folder: Path, dtype: torch.dtype = torch.float32, accept_config: bool = False) -> nn.Module:
    """Read a quantized transformer; dense floats become `dtype`, scales stay float32.

    Everything is checked against the config before anything is allocated: names, dtypes, shapes, then the file's sha256, then
    the values (finite scales, codes that stay in the int8 range).

    Args:
        folder: of config.json and weights.
        dtype: of what is not quantized.
        accept_config: take a config.json that differs from the one that the model was quantized with.

    Raises:
        CheckpointError: the folder is no quantdit checkpoint, is of a newer spec, or is damaged.
    """
    where = folder / "config.json"
    config = read_json(where)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{where}: no quantization_config of quantdit; was this folder made by quantdit?")
    check_version(quantization, where)
    paths = weight_files(folder)
    stored = stored_tensors(paths)
    check_plausible(config, len(stored), where)
    model = build_on_meta(config, folder, room=room_for_tables(stored))
    edges = prepare(model, quantization, paths, where, None if accept_config else config)
    own, state, tied = own_keys(model), {}, aliases(model)
    names = {key: name for name, key in names_in(model, stored).items()}
    for path in paths:
        with open_weights(path) as file:
            for key in sorted(file.keys()):
                # Copies: how a mapped tensor lies in its file decides which routine multiplies with it, and so the last bits.
                name, tensor = names[key], file.get_tensor(key)
                if name in own:
                    state[name] = as_computed(_field(name), tensor)
                else:
                    state[name] = tensor.to(torch.float32 if stays_float32(model, name, dtype) else dtype, copy=True)
                    check_dense(name, state[name], path)
    model.load_state_dict(state | {name: state[first] for name, first in tied.items()}, assign=True)
    tie(model)
    set_weight_dtype(model, dtype)
    check_in_memory(model, folder)
    finish(model, edges, _place(paths))
    return model.requires_grad_(False).eval()


def check_version(quantization: dict, where: Path) -> None:
    """Refuse a quantization_config of another version.

    Raises:
        CheckpointError: it is older, newer, or none.
    """
    spec = quantization.get("spec")
    if type(spec) is not int or spec not in READABLE_VERSIONS:
        older = type(spec) is int and 0 < spec < FORMAT_VERSION
        remedy = "calibrate the model again" if older else "upgrade quantdit"
        raise CheckpointError(f"{where}: checkpoint spec {spec!r}, but this quantdit reads spec {FORMAT_VERSION}; {remedy}")


def prepare(
    model: nn.Module, quantization: dict, paths: list[Path], where: Path, config: dict | None = None
) -> tuple[float, ...]:
    """Replace a full-precision model's linears by QuantLinear layers on the meta device; returns the timestep edges.

    What can be checked of the files before their tensors are allocated is: names, dtypes, shapes, the sha256.

    Args:
        model: parameters on the meta device.
        quantization: the quantization_config, of a spec that is read.
        paths: of its weight files.
        where: the config came from.
        config: what is to be as it was when the model was quantized; None: whatever it is.

    Raises:
        CheckpointError: the config fits neither the model nor the files, or these are damaged.
    """
    if unknown := sorted(quantization.keys() - KEYS):
        raise CheckpointError(f"{where}: quantization_config has an unknown key {unknown[0]!r:.80}; copy it again")
    for key in ("recipe", "provenance"):
        if not isinstance(quantization.get(key), dict):
            raise CheckpointError(f"{where}: quantization_config.{key} must be a table; copy it again")
    _put_layers(model, quantization, where)
    edges = _timestep_edges(quantization, quant_layers(model), where)
    _put_attention(model, quantization, where)
    _put_step_plan(model, quantization, where)
    weights = _place(paths)
    places = tensors_in(paths)
    names = names_in(model, places)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(open_weights(path)) for path in paths}
        _check_header({name: opened[places[key]].get_slice(key) for name, key in names.items()}, model, weights)
        header = _header(opened[paths[0]])
        tensors = ((name, opened[places[key]].get_tensor(key)) for name, key in names.items())
        _check_digest(quantization, header, paths, tensors, where)
    if header.get("spec") != quantization["spec"]:
        raise CheckpointError(
            f"{where}: it says spec {quantization['spec']}, {weights} was written as spec {header.get('spec')!r:.20};"
            " copy both again"
        )
    if config is not None and quantization["spec"] > 2:
        _check_unchanged(header.get("config"), settings_of(config), where)
    return edges


def finish(model: nn.Module, edges: tuple[float, ...], weights: Path) -> None:
    """Check the values of the quantized layers of a model whose tensors are in place, and have it follow its timesteps.

    Layers on the meta device, whose tensors accelerate keeps elsewhere, are not looked at.

    Raises:
        CheckpointError: as `check_layer`.
    """
    for name, layer in quant_layers(model).items():
        if layer.data.device.type != "meta":
            check_layer(name, layer, weights)
    follow_timesteps(model, edges)
    memory.give_back()


def check_layer(name: str, layer: QuantLinear, weights: Path) -> None:
    """Check the values of a quantized layer.

    Raises:
        CheckpointError: scales that are not finite, codes that leave the int8 range, a rotation that is none.
    """
    state = {name: tensor for name, tensor in layer._buffers.items() if tensor is not None}
    if (wrong := check_values(layer.spec, {f: state[f] for f in FIELDS if f in state})) is not None:
        raise CheckpointError(f"{weights}: layer {name}: {wrong}; the file was damaged, copy or calibrate it again")
    others = {n: state[n] for n in ("static_scale", "up", "down") if n in state}
    wrong = transform.check_steps(layer.layer_spec.block, state)
    wrong = wrong or transform.check_values(layer.transform) or _not_finite(others)
    if "static_scale" in others and not bool((others["static_scale"] > 0).all()):
        wrong = "static_scale has entries that are not positive"
    if wrong is not None:
        raise CheckpointError(f"{weights}: layer {name}: {wrong}; the file was damaged, copy it again")


def check_dense(key: str, tensor: Tensor, weights: Path) -> None:
    """Refuse a dense tensor with NaN or infinite entries.

    Raises:
        CheckpointError: naming it.
    """
    if not is_finite(tensor):
        raise CheckpointError(f"{weights}: tensor {key} has NaN or infinite entries; the file was damaged, copy it again")


def check_in_memory(model: nn.Module, where: Path) -> None:
    """Refuse a loaded model that lacks a tensor: what computes with it would return whatever lies in memory.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise CheckpointError(f"{where}: no file holds tensor {name}; copy the model again")


def stays_float32(model: nn.Module, key: str, dtype: torch.dtype) -> bool:
    """Return whether a dense tensor of a model loaded in `dtype` stays float32, as its class asks for."""
    return not library_of(model).float32(model, dtype).isdisjoint(key.split("."))


def set_weight_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Tell the quantized layers of a model in which dtype it was loaded: those without a bias have no other sign of it."""
    for name, layer in quant_layers(model).items():
        layer.weight_dtype = torch.float32 if stays_float32(model, name, dtype) else dtype


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 of the tensors' names, dtypes, shapes and bytes, in whatever order they come."""
    sums = []
    for name, t in tensors:
        data = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        sums.append(hashlib.sha256(f"{name} {t.dtype} {tuple(t.shape)} ".encode() + data.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(sums)).encode()).hexdigest()


def layers_digest(quantization: Mapping) -> str:
    """Return the sha256 of what a quantization_config says that a model computes by."""
    read_by = {key: quantization[key] for key in COMPUTED_BY if key in quantization}
    return hashlib.sha256(json.dumps(read_by, sort_keys=True).encode()).hexdigest()


def _check_digest(
    quantization: Mapping, header: Mapping, paths: list[Path], tensors: Iterable[tuple[str, Tensor]], where: Path
) -> None:
    stated, source, weights = quantization.get("sha256"), "config", _place(paths)
    if stated is None:
        stated, source = header.get("tensors_sha256"), "header"
        if stated is None:
            raise CheckpointError(f"{where}: quantization_config has no sha256 of {weights}; copy the folder again")
        got = tensors_digest(tensors)
    else:
        got = digest_of(paths)
    if got != stated:
        same = next((i for i, (a, b) in enumerate(zip(got, str(stated), strict=False)) if a != b), 0)
        shown = max(12, same + 4)
        raise CheckpointError(
            f"{weights}: sha256 is {got[:shown]}..., the {source} says {str(stated)[:shown]}...;"
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


def check_plausible(config: Mapping, tensors: int, where: Path) -> None:
    """Refuse a model's config that would build forever, or a text where its class takes a number, before anything is built.

    Args:
        config: of a model.
        tensors: how many its files hold; no model has more layers.
        where: the config came from.

    Raises:
        CheckpointError: naming the key.
    """
    _check_depth(config, where)
    library = library_of_config(config)
    known = library.defaults(library.class_of(config, where))
    for key, value in library.settings(config).items():
        default = known.get(key)
        if isinstance(default, bool | int | float) and isinstance(value, str | dict):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise CheckpointError(f"{where}: {key} = {value!r:.80} must be {kind}; copy the folder again")
    for key, value in _entries(library.settings(config)):
        negative = any(isinstance(number, int) and number < 0 for number in _numbers(value))
        if negative and not _is_negative(known.get(key)) and not key.endswith("_id"):  # -1 is no token
            raise CheckpointError(f"{where}: {key} = {value!r:.80} is not plausible: no size is negative; copy the folder again")
    check_numbers(library.settings(config), tensors, where, library.largest)


def _check_depth(config: Mapping, where: Path) -> None:
    inside: list[Any] = [value for key, value in config.items() if key != "quantization_config"]
    for _ in range(MAX_DEPTH):
        tables = [value.values() if isinstance(value, dict) else value for value in inside if isinstance(value, dict | list)]
        inside = [value for table in tables for value in table]
    if inside:
        raise CheckpointError(f"{where}: its tables are nested more than {MAX_DEPTH} deep; copy the folder again")


def _is_negative(default: object) -> bool:
    return isinstance(default, int) and default < 0


def check_numbers(config: Mapping, tensors: int, where: Path, limit: int = DIFFUSERS.largest) -> None:
    """Refuse numbers in a config that no model has: what is built from it makes tables of that length, or as many layers.

    Args:
        config: of a model, of another part of a pipeline, or of a scheduler.
        tensors: how many its files hold; no model has more layers.
        where: the config came from.
        limit: of other numbers.

    Raises:
        CheckpointError: naming the key.
    """
    for key, value in _entries(config):
        is_count = any(word in key for word in COUNTS) and not key.startswith("max_")
        most, numbers = tensors if is_count else limit, list(_numbers(value))
        if any(number != number for number in numbers):
            raise CheckpointError(f"{where}: {key} = {value!r:.80} is not a number; copy the folder again")
        # Infinity is no size: it stands for a bound that does not hold (lambda_min_clipped of a scheduler).
        if "theta" not in key and any(abs(number) > most for number in numbers if math.isfinite(number)):
            raise CheckpointError(
                f"{where}: {key} = {value!r:.80} is not plausible for a file of {tensors} tensors; copy the folder again"
            )


def _entries(config: Mapping) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a config, those of configs in it included."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield key, value


def _numbers(value: object) -> Iterator[int | float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def room_for_tables(stored: Mapping[str, Stored]) -> int:
    """Return how many numbers a model of these tensors may compute beside them."""
    return FREE_TABLE + sum(math.prod(tensor.shape) for tensor in stored.values())


def build_on_meta(config: dict, folder: Path, compute_buffers: bool = True, room: int | None = None) -> nn.Module:
    """Build the full-precision transformer that a config.json describes, parameters on the meta device.

    Buffers are computed, such as tables of positions, which can take half a minute, or put on the meta device too.

    Args:
        config: of the model.
        folder: it lies in.
        compute_buffers: compute them.
        room: how many numbers they may have; None: any.

    Raises:
        CheckpointError: not a model class of its library, or one that cannot be built from this config.
    """
    from accelerate import init_empty_weights

    where, library = folder / "config.json", library_of_config(config)
    cls = library.class_of(config, where)
    if compute_buffers and room is not None:
        tables = sum(t.numel() for t in _tables(build_on_meta(config, folder, compute_buffers=False)))
        if tables > room:
            raise CheckpointError(
                f"{where}: tables of {tables:,} numbers are not plausible for its weights; copy the folder again"
            )
    try:
        with _float32(), init_empty_weights(include_buffers=False) if compute_buffers else torch.device("meta"):
            model = library.build(cls, config)
        tie(model)  # a parameter that goes to the meta device by itself is another one
        return model
    except Exception as error:  # a model class may fail on a hostile config in any way
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise CheckpointError(f"{where}: {cls.__name__} cannot be built from it: {reason:.300}") from error


def _tables(model: nn.Module) -> Iterator[Tensor]:
    """Yield what a model computes when it is built: its buffers, and tensors that modules keep as attributes."""
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            parts = value if isinstance(value, list | tuple) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor))


@contextmanager
def _float32() -> Iterator[None]:
    """Have tensors made as float32 whatever the default of the program that loads a model is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _put_layers(model: nn.Module, quantization: dict, where: Path) -> None:
    """Put the quantized layers, on the meta device, into a full-precision model."""
    layers = quantization.get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}: quantization_config.layers must be a table of layers")
    for name, entry in layers.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"{where}: layer {name!r} does not exist in {type(model).__name__}") from error
        if isinstance(linear, QuantLinear):
            raise CheckpointError(f"{where}: layer {name!r} is tied to a quantized one, which is stored once; copy it again")
        if not isinstance(linear, nn.Linear | nn.Embedding):
            raise CheckpointError(f"{where}: layer {name!r} is a {type(linear).__name__}, expected a Linear or an Embedding")
        put_layer(model, name, _layer(name, entry, linear, where))


def _layer(name: str, entry: dict, linear: nn.Linear | nn.Embedding, where: Path) -> QuantLinear:
    try:
        spec = LayerSpec.from_dict(entry)
    except ValueError as error:
        raise CheckpointError(f"{where}: layer {name!r}: {error}") from error
    weight, shape = spec.weight, tuple(linear.weight.shape)
    if (weight.out_features, weight.in_features) != shape:
        raise CheckpointError(
            f"{where}: layer {name!r} is {weight.out_features} x {weight.in_features} in quantization_config,"
            f" but {shape[0]} x {shape[1]} in the model"
        )
    try:
        if isinstance(linear, nn.Embedding):
            return QuantEmbedding(spec, scale_of(linear), device="meta")
        return QuantLinear(spec, linear.bias is not None, device="meta")
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{where}: layer {name!r}: {error}") from error


def _timestep_edges(quantization: dict, layers: dict[str, QuantLinear], where: Path) -> tuple[float, ...]:
    edges = quantization.get("timestep_edges")
    numbers = isinstance(edges, list) and all(type(e) in (int, float) and abs(e) < MAX_TIMESTEP for e in edges)
    if not isinstance(edges, list) or not numbers or edges not in (sorted(edges), sorted(edges, reverse=True)):
        raise CheckpointError(f"{where}: timestep_edges must be a list of numbers that all fall or all rise, got {edges!r:.80}")
    for name, layer in layers.items():
        buckets = layer.layer_spec.activation.buckets
        if buckets not in (0, len(edges)):
            raise CheckpointError(
                f"{where}: layer {name!r} has {buckets} static scales, but there are {len(edges)} timestep_edges"
            )
        last = layer.layer_spec.activation.last_bucket
        if last and last + 1 != len(edges):
            raise CheckpointError(
                f"{where}: layer {name!r} has timestep bucket {last} as its last, but there are {len(edges)} timestep_edges"
            )
    return tuple(float(e) for e in edges)


def _put_attention(model: nn.Module, quantization: dict, where: Path) -> None:
    specs = quantization.get("attention", {})
    try:
        if not isinstance(specs, dict):
            raise ValueError(f"expected a table of modules, got {specs!r:.40}")
        quant_attention.put(model, {name: AttentionSpec.from_dict(content) for name, content in specs.items()})
    except ValueError as error:
        raise CheckpointError(f"{where}: quantization_config.attention: {error}; copy it again") from error


def _put_step_plan(model: nn.Module, quantization: dict, where: Path) -> None:
    if "step_plan" not in quantization:
        return
    from quantdit.step_plans.following import carry  # brings diffusers along

    try:
        carry(model, StepPlan.from_dict(quantization["step_plan"]))
    except ValueError as error:
        raise CheckpointError(f"{where}: quantization_config.step_plan: {error}; copy it again") from error


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    bad = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    return f"{bad[0]} has NaN or infinite entries" if bad else None


def _check_header(opened: dict, model: nn.Module, weights: Path) -> None:
    own, expected = own_keys(model), stored_state(model)
    names = opened.keys()
    if missing := sorted(expected.keys() - names):
        raise CheckpointError(f"{weights}: tensor {_first(missing)} is missing; copy it again")
    if extra := sorted(names - expected.keys()):
        raise CheckpointError(f"{weights}: unexpected tensor {_first(extra)}: file and config disagree")
    for key, tensor in expected.items():
        stored = opened[key]
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        dtypes = _dtypes(_field(key), tensor.dtype) if key in own else _DENSE
        if shape != tuple(tensor.shape) or dtype not in dtypes:
            raise CheckpointError(
                f"{weights}: tensor {key} is {dtype} {shape}, expected {' or '.join(dtypes)} {tuple(tensor.shape)}:"
                " file and config disagree"
            )


def _dtypes(field: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the dtypes that a file may hold a layer's tensor in."""
    narrower = NARROWER.get(field, ()) if dtype.itemsize == 4 else ()
    return tuple(_DTYPES[d] for d in (dtype, *narrower))


def _field(key: str) -> str:
    return key.rpartition(".")[2]


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
