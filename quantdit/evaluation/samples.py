"""Samples of a model for every prompt and seed, kept on disk under a hash of all that they depend on.

A run that was interrupted goes on at the first sample that is not there; a model that was sampled before is not sampled again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantdit
from quantdit import files
from quantdit.models.call_view import view
from quantdit.pipeline import Source, guided, makes_clips, sample_seed, samples_of, sampling_arguments, seeded_batches

PACKAGES = ("quantdit", "torch", "diffusers", "numpy")
BATCH = 32


@dataclass(frozen=True)
class Sampling:
    """What each model is asked for.

    Attributes:
        samples: of each model; sample i takes prompt i modulo their number, and noise of its own, of `sample_seed(seed, i)`.
        seed: the first one.
        steps: of the sampler.
        guidance: scale; None for the pipeline's own.
        prompts: texts, None for the pipeline's own or, of a class-conditional one, its classes.
        batch: samples at once; changes speed, memory, and the last bits of floats.
    """

    samples: int
    seed: int
    steps: int
    guidance: float | None = None
    prompts: tuple[str, ...] | None = None
    batch: int = BATCH


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
    from tqdm import tqdm

    (kind, wanted), *_ = sampling_arguments(pipeline, asked.samples, asked.prompts).items()
    names = prompts_of(pipeline, asked)
    seeds = tuple(sample_seed(asked.seed, i) for i in range(asked.samples))
    identity = _identity(pipeline, source, asked) if cache is not None else {}
    paths = [_path(cache, identity, *pair) for pair in zip(names, seeds, strict=True)]
    found = {i: kept for i, path in enumerate(paths) if (kept := _read(path)) is not None}
    missing = [i for i in range(asked.samples) if i not in found]
    with tqdm(
        total=asked.samples, initial=len(found), desc=description, unit="clip" if makes_clips(pipeline) else "image"
    ) as bar:
        for start in range(0, len(missing), asked.batch):
            places = missing[start : start + asked.batch]
            part = {kind: [wanted[i] for i in places]}
            part["generator"] = [torch.Generator().manual_seed(seeds[i]) for i in places]
            for i, made in zip(places, _run(pipeline, part, asked), strict=True):
                if not bool(torch.isfinite(made["image"]).all()):
                    raise ValueError(
                        f"{source.label}: the sample of {names[i]!r} holds NaN or infinite pixels; a layer overflowed"
                    )
                found[i] = made
                _write(made, paths[i])
            bar.update(len(places))
    made = [found[i] for i in range(asked.samples)]
    if len({(m["image"].shape, m["latents"].shape) for m in made}) > 1:
        raise ValueError(f"{cache}: kept samples differ in shape; remove the folder, or give another --cache")
    images = torch.stack([m["image"].float() for m in made])
    latents = torch.stack([m["latents"] for m in made])
    return Samples(images, latents, tuple(made[0]["timesteps"].tolist()), names, seeds)


def prompts_of(pipeline, asked: Sampling) -> tuple[str, ...]:
    """Return the prompt of each sample: its text, or `class N`."""
    (kind, wanted), *_ = sampling_arguments(pipeline, asked.samples, asked.prompts).items()
    return tuple(f"class {w}" if kind == "class_labels" else w for w in wanted)


def caller(pipeline, asked: Sampling):
    """Return what runs the pipeline on a part of the arguments, its output left as numpy floats."""
    extra = guided(pipeline, asked.guidance)
    return lambda part: pipeline(**part, **extra, num_inference_steps=asked.steps, output_type="np")


def batches(pipeline, asked: Sampling):
    """Yield the number of samples and the arguments of each batch."""
    arguments = sampling_arguments(pipeline, asked.samples, asked.prompts)
    for part in seeded_batches(arguments, asked.samples, asked.seed, asked.batch):
        yield len(part["generator"]), part


def _run(pipeline, part: dict, asked: Sampling) -> list[dict[str, Tensor]]:
    count = len(part["generator"])
    with _latents(pipeline, count) as steps:
        images = samples_of(caller(pipeline, asked)(part))
    times = torch.tensor(list(steps), dtype=torch.float32)
    latents = torch.stack(list(steps.values()), 1)
    # float16 keeps a pixel to 2^-11 of itself: differences of 70 dB and more are lost, and half of the disk is not.
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
    return {
        "model": folder_digest(source.folder),
        "pipeline": type(pipeline).__name__,
        "device": str(getattr(pipeline, "device", "cpu")).split(":")[0],
        "dtype": str(getattr(pipeline, "dtype", "")),
        "steps": asked.steps,
        "guidance": asked.guidance,
        "batch": asked.batch,
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


def _path(cache: Path | None, identity: dict, prompt: str, seed: int) -> Path | None:
    if cache is None:
        return None
    text = json.dumps(identity | {"prompt": prompt, "seed": seed}, sort_keys=True)
    return cache / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def _read(path: Path | None) -> dict[str, Tensor] | None:
    """Return a kept sample, None for one that is not there or not whole."""
    if path is None or not path.exists():
        return None
    try:
        made = load_file(path)
    except (SafetensorError, OSError):
        return None
    return made if made.keys() == {"image", "latents", "timesteps"} else None


def _write(made: dict[str, Tensor], path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, part)
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
