"""What calibration runs: the pipeline itself, or without one a trajectory from noise along the transformer's own predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantdit.models.adapter import Adapter, Size
from quantdit.models.synthetic import TRAIN_STEPS, latent_of, moved_inputs, own_time, prediction, synthetic_inputs
from quantdit.pipelines.pipeline import (
    SIZES,
    BareTransformer,
    accepted_arguments,
    as_list,
    call_options,
    sample_seed,
    sampling_arguments,
    seeded_batches,
)
from quantdit.system import progress

# Images of a pipeline without an autoencoder are small; latents of one at a time are large enough.
BATCH = 32
SMALL = Size(1, 1, 16, 16, 32)
TIMESTEP_CHOICES = ("even", "salience")


@dataclass(frozen=True)
class Settings:
    """What calibration data is made of.

    Attributes:
        samples: images or clips; 0 for none, which leaves methods that need no data.
        steps: sampling steps.
        seed: of the noise, and of everything else that is random.
        guidance: guidance scale; None for the pipeline's own.
        buckets: parts of a trajectory that statistics are kept of.
        timesteps: how many of the steps are kept; 0 for all.
        timestep_choice: which: `even` (evenly spread) or `salience` (S2Q-VDiT's; calibration/observe/timestep_salience.py).
        tokens: rows of each call that statistics are made of, evenly spread; 0 for all.
        height: of a sample, in pixels; None for the pipeline's own.
        width: of a sample, in pixels.
        frames: of a clip.
        prompts: texts to sample in turn, or one alone; empty for the built-in list.
        latent: size of the inputs made up for a transformer without a pipeline, in latent cells.
    """

    samples: int = 32
    steps: int = 20
    seed: int = 0
    guidance: float | None = None
    buckets: int = 10
    timesteps: int = 0
    timestep_choice: str = "even"
    tokens: int = 0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    prompts: tuple[str, ...] = ()
    latent: Size = SMALL

    def __post_init__(self) -> None:
        """Check what the command line does not.

        Raises:
            ValueError: an unknown choice of timesteps, or one without a number.
        """
        object.__setattr__(self, "prompts", as_list(self.prompts))
        if self.timestep_choice not in TIMESTEP_CHOICES:
            raise ValueError(f"timestep choice {self.timestep_choice!r} is unknown; use one of {', '.join(TIMESTEP_CHOICES)}")
        if self.timestep_choice != "even" and not self.timesteps:
            raise ValueError("choosing timesteps by salience needs their number: --timesteps 8")


def takes(pipeline: object, size: str) -> bool:
    """Return whether a pipeline lets one choose a size of SIZES."""
    return not isinstance(pipeline, BareTransformer) and not accepted_arguments(pipeline).keys().isdisjoint(SIZES[size])


def conditions(pipeline: object, settings: Settings) -> dict[str, list]:
    """Return the `prompt` or the `class_labels` of all samples, none for made-up ones. Refuses what the pipeline cannot sample.

    Raises:
        ValueError: prompts for a model of classes; a size that the pipeline does not let one choose; either of them for a
            transformer without a pipeline.
    """
    if not settings.samples:
        return {}
    if not isinstance(pipeline, BareTransformer):
        call_options(pipeline, settings)
        return sampling_arguments(pipeline, settings.samples, settings.prompts or None)
    for name in ("prompts", "height", "width", "frames"):
        if getattr(settings, name):
            raise ValueError(
                f"--{name} means nothing to a transformer without its pipeline, whose inputs are made up; leave it out, or give"
                " the whole pipeline's folder"
            )
    return {}


def sample(pipeline: object, settings: Settings, adapters: Mapping[str, Adapter]) -> None:
    """Let the transformers be called as they are when `settings.samples` images or clips are made; nothing is returned."""
    if isinstance(pipeline, BareTransformer):
        with progress.bar(settings.samples * len(adapters) * settings.steps, "sample the model", "step") as bar:
            for number in range(settings.samples):
                for part, adapter in adapters.items():
                    trajectory(getattr(pipeline, part), adapter, settings, number, bar.update)
        return
    arguments = conditions(pipeline, settings)
    batch = 1 if getattr(pipeline, "vae", None) is not None else BATCH
    parts = list(seeded_batches(arguments, settings.samples, settings.seed, batch))
    with progress.denoising(pipeline, len(parts), settings.steps, "sample the model") as batch_done:
        for part in parts:
            pipeline(**part, **_options(pipeline, settings))
            batch_done()


def sampled_times(pipeline: object, transformer: nn.Module, adapter: Adapter, steps: int) -> list[float]:
    """Return the times of a trajectory in the transformer's own units, the noisiest first, without sampling one.

    They are those of the pipeline's scheduler for so many steps; a pipeline that hands it sigmas of its own moves them a little;
    without a pipeline those of `trajectory`.

    Raises:
        ValueError: the scheduler needs to know more, such as the size of the sample, or nothing is known of the class's time.
    """
    bare = isinstance(pipeline, BareTransformer)
    scheduler = _scheduler(adapter.scheduler) if bare else copy.deepcopy(getattr(pipeline, "scheduler", None))
    remedy = "edge_steps needs the times of the sampling steps; calibrate with --samples of at least 1"
    if scheduler is None or getattr(scheduler.config, "use_dynamic_shifting", False):
        why = "has no scheduler" if scheduler is None else "shifts its times by the size of the sample"
        raise ValueError(f"the pipeline {why}, and nothing is sampled: {remedy}")
    scheduler.set_timesteps(steps)
    times = [float(t) * TRAIN_STEPS / scheduler.config.num_train_timesteps for t in scheduler.timesteps]
    try:
        return list(dict.fromkeys(own_time(transformer, adapter, time) for time in times))
    except ValueError as error:
        raise ValueError(f"{error}: {remedy}") from error


def trajectory(
    transformer: nn.Module,
    adapter: Adapter,
    settings: Settings,
    number: int,
    done: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Follow the transformer from noise to a sample under made-up conditions, both branches of guidance in one call.

    Args:
        transformer: predicts what `adapter.scheduler` says.
        adapter: of its class.
        settings: steps, guidance, seed and `latent`.
        number: of the sample; another one has other noise and conditions.
        done: is told how many more steps are done.

    Returns:
        The sample, float32, `[1, ...]`.
    """
    guidance = 1.0 if settings.guidance is None else settings.guidance
    generator = torch.Generator().manual_seed(sample_seed(settings.seed, number))
    inputs = synthetic_inputs(transformer, adapter, replace(settings.latent, batch=2), generator)
    # A class that is told the scale needs no second branch.
    guided = guidance != 1 and "guidance" not in inputs
    if not guided:
        inputs = synthetic_inputs(transformer, adapter, replace(settings.latent, batch=1), generator)
    x = latent_of(adapter, inputs)[:1].float()
    dtype = latent_of(adapter, inputs).dtype
    scheduler = _scheduler(adapter.scheduler)
    scheduler.set_timesteps(settings.steps)
    for t in scheduler.timesteps:
        latent = torch.cat([x, x]) if guided else x
        time = float(t) * TRAIN_STEPS / scheduler.config.num_train_timesteps
        output = transformer(**moved_inputs(transformer, adapter, inputs, latent.to(dtype), time))
        predicted = prediction(adapter, output, latent)
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        x = scheduler.step(predicted, t, x).prev_sample
        done(1)
    return x


def _scheduler(kind: str):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDIMScheduler(prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[kind])


def _options(pipeline: object, settings: Settings) -> dict:
    """Return what the pipeline is called with besides prompts and noise; nothing is decoded where there is an autoencoder."""
    output = "latent" if getattr(pipeline, "vae", None) is not None else "np"
    return call_options(pipeline, settings) | ({"output_type": output} if "output_type" in accepted_arguments(pipeline) else {})
