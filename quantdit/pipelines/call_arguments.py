"""What a pipeline is called with: prompts or classes, sizes, steps and guidance, as far as its class takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from quantdit.models.class_names import class_number
from quantdit.pipelines.arguments import SIZES, as_list
from quantdit.pipelines.source import BareTransformer

# What a call may be asked for besides its prompts, and what pipelines call it.
OPTIONS = {"guidance": ("guidance_scale",), "negative_prompt": ("negative_prompt",)} | SIZES
GIVEN = ("prompt", "class_labels", "generator", "num_inference_steps", "output_type")  # whenever a pipeline is called
# Written for quantdit, and of its licence. The order is fixed: a calibration with n samples takes the first n.
PROMPTS = (
    "a red bicycle leaning against a stone wall in the rain",
    "two otters floating on their backs in a green river",
    "a street market at night, lanterns, steam over the pots",
    "an old lighthouse on a cliff, storm clouds, oil painting",
    "a bowl of ramen with a soft egg, close-up photograph",
    "a child flying a kite on a wide beach at sunset",
    "a red fox running through fresh snow, motion blur",
    "portrait of an astronaut reading a newspaper in a cafe",
)


def sampling_arguments(
    pipeline: Any, count: int, prompts: Sequence[str] | None = None, classes: Sequence[int | str] | None = None
) -> dict:
    """Return the `prompt` or `class_labels` argument for `count` images or clips: the given ones in turn, or a spread of our own.

    Raises:
        ValueError: the pipeline takes neither, needs something else, such as an image, or has no such class.
    """
    accepted, prompts, classes = accepted_arguments(pipeline), as_list(prompts), as_list(classes)
    _check_needs(pipeline)
    if "class_labels" in accepted:
        known = pipeline.transformer.config.num_embeds_ada_norm
        if prompts:
            raise ValueError(f"{type(pipeline).__name__} draws classes and takes no prompts; leave out --prompts")
        # Few images of many classes: evenly spaced ones, so that they differ.
        chosen = [class_number(pipeline, c) for c in classes or range(0, known, max(1, known // count))]
        return {"class_labels": [chosen[i % len(chosen)] for i in range(count)]}
    if "prompt" in accepted:
        if classes:
            raise ValueError(f"{type(pipeline).__name__} draws prompts and knows no classes; use --prompts")
        # Prompts that the pipeline has embeddings of need no text encoder.
        chosen = list(prompts or getattr(pipeline, "prompts", ()) or PROMPTS)
        return {"prompt": [chosen[i % len(chosen)] for i in range(count)]}
    raise ValueError(f"{type(pipeline).__name__} takes neither class_labels nor prompt; quantdit cannot sample from it")


def _check_needs(pipeline: object) -> None:
    """Refuse a pipeline that cannot be called with a prompt or classes alone."""
    _, *parameters = accepted_arguments(pipeline).values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [name for name in needed if name not in GIVEN]:
        given = ", ".join(f"{name}=..." for name in needed)
        raise ValueError(
            f"{type(pipeline).__name__} needs {' and '.join(missing)}, which the command line cannot give it; in Python:"
            f" quantdit.load(FOLDER)({given}). To quantize it: quantdit calibrate --samples 0, or"
            f" quantdit.quantize(pipeline.transformer, 'w4a8', inputs=lambda: pipeline({given}))"
        )


def accepted_arguments(pipeline: object) -> Mapping[str, inspect.Parameter]:
    """Return what the pipeline takes when it is called, by name."""
    if isinstance(pipeline, BareTransformer):
        raise ValueError(
            "this folder has a transformer and no pipeline around it, so nothing can be sampled from it; put the transformer into"
            " a copy of its pipeline's folder"
        )
    return inspect.signature(type(pipeline).__call__).parameters


def makes_clips(pipeline: object) -> bool:
    """Tell whether a pipeline makes clips rather than images: such a one takes a number of frames."""
    return not accepted_arguments(pipeline).keys().isdisjoint(SIZES["frames"])


class Asked(Protocol):
    """What a pipeline is asked for: `steps`, and any of OPTIONS, as a Sampling and a SamplingPlan are."""

    @property
    def steps(self) -> int: ...


def call_options(pipeline: object, asked: Asked) -> dict[str, object]:
    """Return what a pipeline is called with besides prompts and noise: the steps, and what is asked for of OPTIONS.

    Args:
        pipeline: a `sizes` of its own, where it has one, are the only ones it takes.
        asked: a Sampling or a SamplingPlan; None for one of OPTIONS keeps the pipeline's default.

    Raises:
        ValueError: the pipeline does not take one of them.
    """
    accepted, own = accepted_arguments(pipeline), getattr(pipeline, "sizes", {})
    found: dict[str, object] = {"num_inference_steps": asked.steps}
    for option, names in OPTIONS.items():
        value, flag = getattr(asked, option, None), f"--{option.replace('_', '-')}"
        if value is None:
            continue
        name = next((name for name in names if name in accepted), None)
        if name is None:
            raise ValueError(f"{type(pipeline).__name__} takes no {option.replace('_', ' ')}; leave out {flag}")
        if own.get(option, value) != value:
            raise ValueError(f"{type(pipeline).__name__} makes samples of {option} {own[option]} alone; leave out {flag}")
        found[name] = value
    return found
