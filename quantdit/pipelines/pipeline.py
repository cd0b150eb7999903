"""One way from a name to a running pipeline, full precision or quantized: alias, hub id and folder all pass here."""

from __future__ import annotations

import functools
import math
import operator
import os
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantdit.checkpoints import checkpoint, streaming
from quantdit.checkpoints.libraries import TRANSFORMERS
from quantdit.checkpoints.streaming import is_streamed
from quantdit.models.known_models import KNOWN_MODELS, locate
from quantdit.pipelines.components import ENCODERS, TRANSFORMER_NAMES, components_of, named_components
from quantdit.pipelines.source import BareTransformer, Source
from quantdit.system import files, memory

DEFAULT_MEMORY = 0.8  # of the machine's


def load_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    weights: Path | None = None,
    memory_budget: int | None = None,
    accept_config: bool = False,
    components: str | Sequence[str] = TRANSFORMER_NAMES[0],
):
    """Return `(pipeline, Source)` for an alias, a hub id or a folder; a quantized transformer comes back quantized.

    Args:
        model: what to load.
        dtype: of what is not quantized.
        device: where to.
        weights: a local folder with the weights of `model`: of the whole pipeline, or of its transformer alone, which comes back
            as a BareTransformer.
        memory_budget: bytes that calibration is to stay within; a full-precision transformer that does not fit comes back with
            its blocks on the meta device (quantdit.checkpoints.streaming).
        accept_config: take a quantized model whose config.json, or whose scheduler's, was changed after it was calibrated.
        components: those that the source is to name, as `named_components` takes them; text encoders among them come
            back in full precision as transformers do.

    Raises:
        ValueError: unknown name, no network, no diffusers pipeline, a damaged checkpoint, one that another tool quantized
            (CheckpointError), a memory budget that is too small, or components that there are not.
    """
    _check_device(device)
    folder = _folder_of(model, weights)
    budget = memory_budget if memory_budget is not None else int(DEFAULT_MEMORY * memory.physical())
    index = _index_of(folder)
    if index is None:
        bare = (folder / "config.json").exists()
        source = Source(model, folder, _bare_parts(folder), bare, memory_budget=memory_budget)
        named_components(components, source.components, str(folder))
        _check_class(source, weights)
        return BareTransformer(**_compiled(source, dict.fromkeys(source.components), dtype, budget, accept_config)), source
    cls = _pipeline_class(index["_class_name"], folder)
    present = components_of(folder, index)
    found = tuple(name for name in TRANSFORMER_NAMES if name in present)
    if not found:
        raise ValueError(f"{folder}: {index['_class_name']} has no transformer; quantdit quantizes diffusion transformers")
    source = Source(model, folder, found, memory_budget=memory_budget)
    _check_class(source, weights)
    encoders = [name for name in ENCODERS if present.get(name, ("",))[0] == TRANSFORMERS.name]
    source = replace(source, components=named_components(components, (*found, *encoders), str(folder)))
    # A pipeline is sampled with its transformers, whether they are to be quantized or not.
    ours = (*found, *source.encoders)
    transformers = _compiled(source, {name: present[name][1] for name in ours}, dtype, budget, accept_config)
    others = {name: entry for name, entry in present.items() if name not in ours}
    offloaded = _text_encoders(folder, others, budget // 4)
    stays = offloaded or any(is_streamed(t) for t in transformers.values())
    pipeline = _from_pretrained(cls, folder, dtype, None if stays else device, others.keys(), transformers | offloaded)
    return pipeline, source


def _folder_of(model: str, weights: Path | None) -> Path:
    """Return the folder to read: that of the weights, of the model, or what the hub has of it."""
    place = locate(model)
    if weights is not None:
        if not weights.is_dir():
            raise ValueError(f"{weights} is no folder; --weights takes the folder of a pipeline, or of its transformer")
        return weights
    return place if isinstance(place, Path) else _download(model, place)


def _index_of(folder: Path) -> dict | None:
    """Return the folder's model_index.json, which names a pipeline class; None for transformers without a pipeline.

    Raises:
        ValueError: it is neither.
    """
    index = files.read_json(folder / "model_index.json") if os.path.lexists(folder / "model_index.json") else None
    if index is None and (folder / "scheduler").is_dir() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} has a scheduler, but no model_index.json that says which pipeline it is; copy the folder again, or give"
            " the folder of its transformer alone"
        )
    if index is None and ((folder / "config.json").exists() or (folder / "transformer" / "config.json").exists()):
        return None
    if index is None or not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"{folder} is no diffusers model: it has neither a model_index.json naming a pipeline class nor the config.json of a"
            " transformer; give the folder that holds one of them"
        )
    return index


def _from_pretrained(
    cls: Any,
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device | None,
    others: Set[str],
    parts: dict[str, nn.Module],
) -> Any:
    """Return a pipeline of `parts`, and of the `others` as diffusers reads them from its folder.

    Args:
        cls: the pipeline's class.
        folder: the pipeline's.
        dtype: of what is read.
        device: where to; None where some of it stays on the disk.
        others: all components but our transformers and text encoders.
        parts: modules that are loaded already.

    Raises:
        ValueError: several variants of one component, or what diffusers cannot load (CheckpointError for damaged weights).
    """
    variants = {variant for name in others if (variant := files.variant_of(folder / name)) is not None}
    if len(variants) > 1:
        raise ValueError(f"{folder} holds its components as several variants ({', '.join(sorted(variants))}); leave one")
    variant = {"variant": variants.pop()} if variants else {}
    try:
        with warnings.catch_warnings():
            # The newest diffusers says `dtype` and warns of `torch_dtype`; the older ones know only the latter.
            warnings.simplefilter("ignore", FutureWarning)
            options = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True, **variant}
            pipeline = cls.from_pretrained(folder, **options, **parts)
        for name in others - parts.keys():
            if isinstance(component := getattr(pipeline, name, None), nn.Module):
                checkpoint.check_in_memory(component, folder / name)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline if device is None else pipeline.to(device)
    except files.CheckpointError:
        raise
    except Exception as error:  # the classes of a hostile folder's components may fail in any way
        raise ValueError(f"{folder}: {cls.__name__} cannot be loaded: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.300}"


def _text_encoders(folder: Path, components: dict, room: int) -> dict[str, nn.Module]:
    """Return the text encoders that take more than `room` bytes as float32, most of their layers left on the disk.

    They keep the dtype they are stored in. Prompts are encoded once, so the time of reading them matters little.
    """
    found: dict[str, nn.Module] = {}
    for name, (library, cls) in components.items():
        paths = sorted((folder / name).glob("*.safetensors")) if library == "transformers" else []
        if sum(_numbers(path) for path in paths) * torch.float32.itemsize > room:
            import transformers

            options = {"device_map": "auto", "max_memory": {"cpu": room}, "local_files_only": True, "use_safetensors": True}
            try:
                encoder, variant = getattr(transformers, cls), files.variant_of(folder / name)
                found[name] = encoder.from_pretrained(folder / name, torch_dtype="auto", variant=variant, **options).eval()
            except Exception as error:  # the classes of a hostile folder's components may fail in any way
                raise ValueError(f"{folder / name}: {cls} cannot be loaded: {_in_a_line(error)}") from error
    return found


def _numbers(path: Path) -> int:
    with files.open_weights(path) as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - not a mapping


def _check_class(source: Source, weights: Path | None) -> None:
    """Refuse weights of another class than the known model that they are said to be of."""
    if weights is None or source.name not in KNOWN_MODELS:
        return
    expected = KNOWN_MODELS[source.name].transformer
    missing = [name for name in KNOWN_MODELS[source.name].transformers if name not in source.components]
    if missing:
        raise ValueError(
            f"{source.folder} has no {missing[0]}, which {source.name} has as well; give a folder with all its transformers,"
            " or this one as --model to quantize what it has"
        )
    for name in source.components:
        found = files.read_json(source.folder_of(name) / "config.json").get("_class_name")
        if found != expected:
            raise ValueError(
                f"{source.folder_of(name)} holds a {found}, but {source.name} is a {expected}; give that model's weights, or this"
                " folder alone as --model"
            )


def _bare_parts(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in TRANSFORMER_NAMES if (folder / name / "config.json").exists()) or TRANSFORMER_NAMES[:1]


def _compiled(
    source: Source, names: Mapping[str, str | None], dtype: torch.dtype, budget: int, accept_config: bool
) -> dict[str, nn.Module]:
    """Return the parts of these names that are, or can be, quantized, of the classes that their pipeline says.

    Diffusers' own loader would take any tensors for their weights, so that it is not asked.
    """
    parts: dict[str, nn.Module] = {}
    needs: dict[str, streaming.Need] = {}
    for name in names:
        folder = source.folder_of(name)
        if checkpoint.is_quantized(folder) and name in ENCODERS:
            raise files.CheckpointError(f"{folder} is quantized already; calibrate from the full-precision model")
        if checkpoint.is_quantized(folder):
            parts[name] = _as_diffusers_would(checkpoint.read_transformer(folder, dtype, accept_config), folder)
            if not accept_config and not source.bare:
                checkpoint.check_scheduler(source.folder, folder)
            continue
        needs[name] = streaming.need_of(folder, dtype, names[name])
    if not needs:
        return parts
    need = functools.reduce(operator.add, needs.values())
    if need.resident > budget and need.streamed > budget:
        raise ValueError(
            f"a memory budget of {memory.in_gib(budget)} is too small for {source.label}: a block at a time needs about"
            f" {memory.in_gib(need.streamed)}; give at least --memory-budget {memory.in_gib(need.streamed)}"
        )
    read = streaming.skeleton if need.resident > budget else streaming.whole
    return parts | {name: read(source.folder_of(name), dtype, names[name]) for name in needs}


def _as_diffusers_would(transformer: nn.Module, folder: Path) -> nn.Module:
    """Make a quantized transformer one that diffusers can save."""
    from quantdit.integrations.attaching import attach

    quantization = files.read_json(folder / "config.json")["quantization_config"]
    return attach(transformer, quantization | {"spec": checkpoint.FORMAT_VERSION})  # what it would be saved as


def _check_device(device: str | torch.device) -> None:
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"device {str(device)!r} is not available on this machine; use cpu, or cuda where there is a GPU"
        ) from error
    if kind == "meta":
        raise ValueError("device 'meta' holds no numbers; use cpu, or cuda where there is a GPU")


def _pipeline_class(name: str, folder: Path) -> type:
    # The module of DiffusionPipeline brings our classes along (quantdit.integrations.diffusers_saving).
    import diffusers
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage] - exported lazily

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        raise ValueError(
            f"{folder}: the installed diffusers has no pipeline class {name!r}; upgrade it with pip install -U diffusers"
        )
    return cls


def _download(model: str, hub: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub, ignore_patterns=["*.bin", "*.ckpt", "*.pth", "*.onnx", "*.msgpack"]))
    except Exception as error:  # the hub's transport raises errors of whatever library it is built on
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        folder = hub.split("/")[1]
        raise ValueError(
            f"there is no folder {hub} here, and it cannot be fetched from the hub ({reason}). Where there is a network, run:"
            f" hf download {hub} --local-dir {folder}; copy that folder here and give it as --model"
            f" PATH/{folder}, or to calibrate with --weights PATH/{folder}. To measure time, memory and size without the weights:"
            " quantdit calibrate --random-weights"
        ) from error
