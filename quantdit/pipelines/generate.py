"""Images and clips sampled from a pipeline, each from noise of its own seed."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantdit.pipelines.arguments import NUMBERS, SIZES, as_list, checked_numbers, dtype_of
from quantdit.pipelines.call_arguments import call_options, sampling_arguments
from quantdit.system import progress


@dataclass(frozen=True)
class Sampling:
    """What a model is asked for.

    Attributes:
        samples: images or clips; sample i takes prompt i modulo their number, and noise of its own, of `sample_seed(seed, i)`.
        seed: the first one.
        steps: of the sampler.
        guidance: scale; None for the pipeline's own.
        prompts: texts, or one alone; None for the pipeline's own or, of a class-conditional one, its classes.
        batch: samples at once; changes speed, memory, and the last bits of floats.
        classes: numbers or names, or one name alone, of a class-conditional model; None for a spread of them.
        negative_prompt: what guidance leads away from; None for the pipeline's own.
        height: of a sample, in pixels; None for the pipeline's own.
        width: of a sample, in pixels.
        frames: of a clip.
        dtype: that the model is loaded in, as `dtype_of` takes it; kept as its name.
    """

    samples: int = 64
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    prompts: Sequence[str] | None = None
    batch: int = 32
    classes: tuple[int | str, ...] | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what nothing can be sampled with.

        Raises:
            ValueError: what is no such number, or an unknown dtype.
        """
        for name, kinds, expected in (("prompts", str, "texts"), ("classes", (str, numbers.Integral), "numbers or names")):
            given = as_list(getattr(self, name))
            if given is None:
                continue
            found: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (None,)
            if not all(isinstance(each, kinds) for each in found):
                raise ValueError(f"{name} is {given!r:.60}, expected a list of {expected}")
            object.__setattr__(self, name, tuple(each if isinstance(each, str) else int(each) for each in found))
        given = {name: getattr(self, name) for name in NUMBERS if hasattr(self, name)}
        for name, value in checked_numbers(given, optional=("guidance", *SIZES)).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "dtype", str(dtype_of(self.dtype)).removeprefix("torch."))


def sample_seed(seed: int, number: int) -> int:
    """Return the seed of the noise of image or clip `number` of a run."""
    return seed * 2**20 + number


def samples_of(output: Any) -> Tensor:
    """Return what a pipeline made, its output left as numpy floats, as `[n, ..., c, h, w]` float32 in [-1, 1]."""
    pixels = torch.from_numpy(output.frames if hasattr(output, "frames") else output.images)
    return pixels.movedim(-1, -3).float() * 2 - 1


def seeded_batches(arguments: Mapping[str, list], count: int, seed: int, batch: int) -> Iterator[dict]:
    """Yield what to call a pipeline with for each batch: its part of the arguments, and a generator for each image or clip.

    Image or clip i has the seed `sample_seed(seed, i)`.
    """
    for start in range(0, count, batch):
        end = min(start + batch, count)
        generators = [torch.Generator().manual_seed(sample_seed(seed, i)) for i in range(start, end)]
        yield {key: values[start:end] for key, values in arguments.items()} | {"generator": generators}


def generate(
    pipeline,
    count: int,
    seed: int,
    steps: int,
    guidance: float | None = None,
    batch: int = 32,
    prompts: Sequence[str] | None = None,
    description: str = "generate",
    **options: Any,
) -> Tensor:
    """Sample `count` images `[n, c, h, w]` or, from a video pipeline, clips `[n, f, c, h, w]`; float32 in [-1, 1].

    Image or clip i depends on its batch in the last bits of floats alone (`seeded_batches`). `options` are Sampling's.

    Raises:
        ValueError: the pipeline does not take what is asked for.
    """
    asked = Sampling(count, seed, steps, guidance, prompts, batch, **options)
    arguments = sampling_arguments(pipeline, count, asked.prompts, asked.classes)
    extra, images = call_options(pipeline, asked), []
    with progress.denoising(pipeline, -(-count // batch), steps, description) as batch_done:
        for part in seeded_batches(arguments, count, seed, batch):
            images.append(samples_of(pipeline(**part, **extra, output_type="np")))
            batch_done()
    return torch.cat(images)
