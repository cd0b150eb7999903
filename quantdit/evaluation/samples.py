"""Samples of a model for every prompt and seed, kept on disk under a hash of all that they depend on.

A run that was interrupted goes on at the first sample that is not there; a model that was sampled before is not sampled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import quantdit
from quantdit.models.call_view import view
from quantdit.models.class_names import class_names
from quantdit.pipelines.pipeline import (
    Sampling,
    Source,
    call_options,
    sample_seed,
    samples_of,
    sampling_arguments,
    seeded_batches,
)
from quantdit.system import files, progress

PACKAGES = ("quantdit", "torch", "diffusers", "numpy")
RECORD = "sample"  # key of what a kept file says of its sample


@dataclass(frozen=True)
class Samples:
    """What a model made.

    Attributes:
        images: `[n, c, h, w]`, or clips `[n, f, c, h, w]`, float32 in [-1, 1].
        latents: `[n, steps, ...]` float16, what entered the transformer at each step; the last one is nearest to the result.
        timesteps: of these steps.
        prompts: of each sample: its text, or `class N`.
        seeds: of the noise of each.
    """

    images: Tensor
    latents: Tensor
    timesteps: tuple[float, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


def sample(pipeline, source: Source, asked: Sampling, cache: Path | None = None, description: str = "samples") -> Samples:
    """Return the samples, those that `cache` holds from there.

    Args:
        pipeline: with its transformers.
        source: where it was loaded from; what its folder holds is part of the hash.
        asked: for what.
        cache: folder, made if need be; None keeps nothing.
        description: of the progress bar.

    Raises:
        ValueError: a pipeline that takes neither prompts nor classes, or samples that are not finite.
        OSError: the cache cannot be written.
    """
    (kind, wanted), *_ = sampling_arguments(pipeline, asked.samples, asked.prompts, asked.classes).items()
    names = prompts_of(pipeline, asked)
    seeds = tuple(sample_seed(asked.seed, i) for i in range(asked.samples))
    identity = _identity(pipeline, source, asked) if cache is not None else {}
    # The last bits depend on how many samples are made at once, so a batch is made whole or not at all.
    together = [range(asked.samples)[start : start + asked.batch] for start in range(0, asked.samples, asked.batch)]
    keys = [identity | {"prompt": names[i], "seed": seeds[i], "batch": len(batch)} for batch in together for i in batch]
    found = _kept(cache, keys)
    missing = [batch for batch in together if any(i not in found for i in batch)]
    shown = progress.denoising(pipeline, len(missing), asked.steps, description) if missing else nullcontext()
    with shown as batch_done:
        for places in missing:
            part = {kind: [wanted[i] for i in places]}
            part["generator"] = [torch.Generator().manual_seed(seeds[i]) for i in places]
            for i, made in zip(places, _run(pipeline, part, asked), strict=True):
                if not bool(torch.isfinite(made["image"]).all()):
                    raise ValueError(
                        f"{source.label}: the sample of {names[i]!r} holds NaN or infinite pixels; a layer overflowed"
                    )
                if i in found:
                    continue  # of a batch that lacked another
                found[i] = made
                if cache is not None:
                    _write(made, cache, keys[i])
            batch_done()
    made = [found[i] for i in range(asked.samples)]
    if len({(m["image"].shape, m["latents"].shape) for m in made}) > 1:
        if cache is not None:
            raise ValueError(f"{cache}: kept samples differ in shape; remove the folder, or give another --cache")
        raise ValueError(f"{source.label}: its samples differ in shape, and cannot be compared; give a --height and a --width")
    images = torch.stack([m["image"].float() for m in made])
    latents = torch.stack([m["latents"] for m in made])
    return Samples(images, latents, tuple(made[0]["timesteps"].tolist()), names, seeds)


def prompts_of(pipeline, asked: Sampling) -> tuple[str, ...]:
    """Return the prompt of each sample: its text, or the class by its name, or `class N` where it has none."""
    (kind, wanted), *_ = sampling_arguments(pipeline, asked.samples, asked.prompts, asked.classes).items()
    names = class_names(pipeline)
    return tuple((names[w] if names else f"class {w}") if kind == "class_labels" else w for w in wanted)


def caller(pipeline, asked: Sampling):
    """Return what runs the pipeline on a part of the arguments, its output left as numpy floats."""
    extra = call_options(pipeline, asked)
    return lambda part: pipeline(**part, **extra, output_type="np")


def batches(pipeline, asked: Sampling):
    """Yield the number of samples and the arguments of each batch."""
    arguments = sampling_arguments(pipeline, asked.samples, asked.prompts, asked.classes)
    for part in seeded_batches(arguments, asked.samples, asked.seed, asked.batch):
        yield len(part["generator"]), part


def shape_of_one(pipeline, label: str, asked: Sampling) -> tuple[int, ...]:
    """Return the shape of a sample, from one of two steps: what a pipeline refuses is refused before hours go into samples.

    Raises:
        ValueError: the pipeline cannot be called so.
    """
    once = replace(asked, samples=1, batch=1, steps=min(2, asked.steps))
    ((_, part),) = batches(pipeline, once)
    try:
        return tuple(samples_of(caller(pipeline, once)(part)).shape[1:])
    except (RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{label}: {type(pipeline).__name__} cannot make a sample with these settings ({reason}); try another --height,"
            " --width or --frames, such as those of the calibration"
        ) from error


def _run(pipeline, part: dict, asked: Sampling) -> list[dict[str, Tensor]]:
    count = len(part["generator"])
    with _latents(pipeline, count) as steps:
        images = samples_of(caller(pipeline, asked)(part))
    times = torch.tensor(list(steps), dtype=torch.float32)
    latents = torch.stack(list(steps.values()), 1)
    # Images stay float32; latents are float16 already (`_latents`).
    return [{"image": images[i], "latents": latents[i].clone(), "timesteps": times} for i in range(count)]


@contextmanager
def _latents(pipeline, count: int):
    """Collect what enters the transformers at each timestep, `[count, ...]` float16, by timestep."""
    steps: dict[float, Tensor] = {}

    def before(module, args: tuple, kwargs: dict) -> None:
        called = view(module, args, kwargs)
        timestep = float(len(steps)) if called.time is None else called.time
        if timestep in steps or called.latent is None:
            return  # the second call of a step, for guidance, has the same latents
        x, axis = called.latent[:count], 1 if called.channels is None else called.channels
        # Channels beyond those that the model returns are conditions (positions, a first frame): the same for every model.
        width = getattr(module.config, "out_channels", None) or x.shape[axis]
        x = x.narrow(axis, 0, min(width, x.shape[axis])) if x.ndim > 3 else x
        steps[timestep] = x.detach().to("cpu", torch.float16)

    parts = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    handles = [part.register_forward_pre_hook(before, with_kwargs=True) for part in parts if part is not None]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def _identity(pipeline, source: Source, asked: Sampling) -> dict:
    """Return all that a sample depends on besides its prompt and seed."""
    options = {key: value for key, value in asdict(asked).items() if key not in ("samples", "seed", "prompts", "classes")}
    return options | {
        "model": folder_digest(source.folder),
        "pipeline": type(pipeline).__name__,
        "device": str(getattr(pipeline, "device", "cpu")).split(":")[0],
        "loaded dtype": str(getattr(pipeline, "dtype", "")),
        "versions": versions(),
        "code": _code_digest(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages whose arithmetic a sample goes through."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def folder_digest(folder: Path) -> str:
    """Return a sha256 over the names and contents of a model's safetensors and JSON files."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model") and p.is_file()):
        if path.name == "calibration_report.json":
            continue  # says how long things took
        total.update(f"{path.relative_to(folder).as_posix()} {files.sha256(path)}\n".encode())
    return total.hexdigest()


def _code_digest() -> str:
    """Return a sha256 over quantdit's own source: a sample of yesterday's code must not stand in for today's."""
    homes = [Path(quantdit.__file__).parent, *(Path(p) for name in ("kernels", "calibration") for p in _home(name))]
    total = hashlib.sha256()
    for path in sorted(p for home in homes for p in home.rglob("*.py") if "evaluation" not in p.parts):
        total.update(path.read_bytes())
    return total.hexdigest()


def _home(name: str) -> list[str]:
    import importlib

    return list(importlib.import_module(f"quantdit.{name}").__path__)


def _kept(cache: Path | None, keys: Sequence[dict]) -> dict[int, dict[str, Tensor]]:
    """Return the kept samples that are there, by their places; says once how many of them are damaged and made again."""
    if cache is None:
        return {}
    found: dict[int, dict[str, Tensor]] = {}
    damaged = []
    for i, key in enumerate(keys):
        path = _path(cache, key)
        if not path.exists():
            continue
        kept = _read(path, key) if path.is_file() else None  # a pipe would be waited for
        if kept is None:
            damaged.append(path.name)
        else:
            found[i] = kept
    if damaged:
        warnings.warn(
            f"{cache}: {len(damaged)} of {len(damaged) + len(found)} kept samples are not what was written ({damaged[0]});"
            " they are sampled again",
            files.Advice,
            stacklevel=2,
        )
    return found


def _path(cache: Path, key: dict) -> Path:
    return cache / f"{hashlib.sha256(_text(key).encode()).hexdigest()}.safetensors"


def _text(key: dict) -> str:
    return json.dumps(key, sort_keys=True)


def _read(path: Path, key: dict) -> dict[str, Tensor] | None:
    """Return a kept sample; None for one that is damaged, or of another prompt, seed or model."""
    try:
        with safe_open(path, framework="pt") as file:
            made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            whole = (file.metadata() or {}).get(RECORD) == _record(made, key)
    except (SafetensorError, OSError):
        return None
    return made if whole else None


def _record(made: dict[str, Tensor], key: dict) -> str:
    """Return what a file says of its sample: all it was made with, shapes, dtypes, and a sha256 of that and the numbers."""
    tensors = {name: [str(t.dtype), list(t.shape)] for name, t in sorted(made.items())}
    text = _text(key | {"tensors": tensors})
    total = hashlib.sha256(text.encode())
    for _, tensor in sorted(made.items()):
        total.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return f"{total.hexdigest()} {text}"


def _write(made: dict[str, Tensor], cache: Path, key: dict) -> None:
    path = _path(cache, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, part, metadata={RECORD: _record(made, key)})
    files.fsync(part)
    os.replace(part, path)


def middle_frames(images: Tensor) -> Tensor:
    """Return images as they are, and of clips `[n, f, c, h, w]` the middle frames."""
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images


def as_images(images: Tensor) -> Tensor:
    """Return images as they are, and each clip as one tall image, its frames one above the other."""
    return images.transpose(1, 2).flatten(2, 3) if images.ndim == 5 else images


def prompt_groups(prompts: Sequence[str]) -> Tensor:
    """Return for each sample the number of its prompt, in order of first appearance."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([order[prompt] for prompt in prompts])
