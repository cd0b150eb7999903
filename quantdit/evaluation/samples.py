"""Samples of a model for every prompt and seed, kept on disk under a hash of all that they depend on.

A run that was interrupted goes on at the first sample that is not there; a model that was sampled before is not sampled again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantdit.evaluation import kept_samples
from quantdit.models.call_view import view
from quantdit.models.class_names import class_names
from quantdit.pipelines.call_arguments import call_options, sampling_arguments
from quantdit.pipelines.generate import Sampling, sample_seed, samples_of, seeded_batches
from quantdit.pipelines.source import Source
from quantdit.system import progress


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


def sample(pipeline: Any, source: Source, asked: Sampling, cache: Path | None = None, description: str = "samples") -> Samples:
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
    identity = kept_samples.identity_of(pipeline, source, asked) if cache is not None else {}
    # The last bits depend on how many samples are made at once, so a batch is made whole or not at all.
    together = [range(asked.samples)[start : start + asked.batch] for start in range(0, asked.samples, asked.batch)]
    keys = [identity | {"prompt": names[i], "seed": seeds[i], "batch": len(batch)} for batch in together for i in batch]
    found = kept_samples.find(cache, keys)
    missing = [batch for batch in together if any(i not in found for i in batch)]
    shown = progress.denoising(pipeline, len(missing), asked.steps, description) if missing else nullcontext(lambda: None)
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
                    kept_samples.write(made, cache, keys[i])
            batch_done()
    made = [found[i] for i in range(asked.samples)]
    if len({(m["image"].shape, m["latents"].shape) for m in made}) > 1:
        if cache is not None:
            raise ValueError(f"{cache}: kept samples differ in shape; remove the folder, or give another --cache")
        raise ValueError(f"{source.label}: its samples differ in shape, and cannot be compared; give a --height and a --width")
    images = torch.stack([m["image"].float() for m in made])
    latents = torch.stack([m["latents"] for m in made])
    return Samples(images, latents, tuple(made[0]["timesteps"].tolist()), names, seeds)


def prompts_of(pipeline: Any, asked: Sampling) -> tuple[str, ...]:
    """Return the prompt of each sample: its text, or the class by its name, or `class N` where it has none."""
    (kind, wanted), *_ = sampling_arguments(pipeline, asked.samples, asked.prompts, asked.classes).items()
    names = class_names(pipeline)
    if kind != "class_labels":
        return tuple(map(str, wanted))
    return tuple(names[int(w)] if names else f"class {w}" for w in wanted)


def caller(pipeline: Any, asked: Sampling) -> Callable[[dict], object]:
    """Return what runs the pipeline on a part of the arguments, its output left as numpy floats."""
    extra = call_options(pipeline, asked)
    return lambda part: pipeline(**part, **extra, output_type="np")


def batches(pipeline: Any, asked: Sampling) -> Iterator[tuple[int, dict]]:
    """Yield the number of samples and the arguments of each batch."""
    arguments = sampling_arguments(pipeline, asked.samples, asked.prompts, asked.classes)
    for part in seeded_batches(arguments, asked.samples, asked.seed, asked.batch):
        yield len(part["generator"]), part


def shape_of_one(pipeline: Any, label: str, asked: Sampling) -> tuple[int, ...]:
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


def _run(pipeline: Any, part: dict, asked: Sampling) -> list[dict[str, Tensor]]:
    count = len(part["generator"])
    with _latents(pipeline, count) as steps:
        images = samples_of(caller(pipeline, asked)(part))
    times = torch.tensor(list(steps), dtype=torch.float32)
    latents = torch.stack(list(steps.values()), 1)
    # Images stay float32; latents are float16 already (`_latents`).
    return [{"image": images[i], "latents": latents[i].clone(), "timesteps": times} for i in range(count)]


@contextmanager
def _latents(pipeline: Any, count: int) -> Iterator[dict[float, Tensor]]:
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


def middle_frames(images: Tensor) -> Tensor:
    """Return images as they are, and of clips `[n, f, c, h, w]` the middle frames."""
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images


def as_images(images: Tensor) -> Tensor:
    """Return images as they are, and each clip as one tall image, its frames one above the other."""
    return images.transpose(1, 2).flatten(2, 3) if images.ndim == 5 else images
