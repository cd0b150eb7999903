"""What calibration runs: the pipeline itself, or without one a trajectory from noise along the transformer's own predictions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from quantdit.models.adapter import Adapter
from quantdit.models.known_models import KNOWN_MODELS
from quantdit.models.synthetic import TRAIN_STEPS, latent_of, moved_inputs, own_time, prediction, synthetic_inputs
from quantdit.pipelines.arguments import SIZES
from quantdit.pipelines.call_arguments import accepted_arguments, call_options, sampling_arguments
from quantdit.pipelines.generate import sample_seed, seeded_batches
from quantdit.pipelines.source import BareTransformer, Source
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files, progress

# Images of a pipeline without an autoencoder are small; latents of one at a time are large enough.
BATCH = 32
PREDICTION_TYPES: dict[str, Literal["epsilon", "v_prediction"]] = {"epsilon": "epsilon", "v": "v_prediction"}


class Scheduler(Protocol):
    """What is used of diffusers' schedulers, whose own annotations know no fields of `config` and no `timesteps`."""

    config: Any
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int) -> object: ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any: ...


def takes(pipeline: object, size: str) -> bool:
    """Return whether a pipeline lets one choose a size of SIZES."""
    return not isinstance(pipeline, BareTransformer) and not accepted_arguments(pipeline).keys().isdisjoint(SIZES[size])


def sampling_plan_for(pipeline: object, source: Source, device: str, given: Mapping[str, Any]) -> SamplingPlan:
    """Return what a model is calibrated on: what was given, else what suits a known one on such a device, else the defaults.

    Args:
        pipeline: of the model.
        source: where it came from; the name of a known one decides.
        device: that it is sampled on.
        given: fields of SamplingPlan.

    Raises:
        ValueError: values that SamplingPlan refuses.
    """
    wanted: dict[str, Any] = {}
    if source.name in KNOWN_MODELS:
        known = KNOWN_MODELS[source.name].cpu if device == "cpu" else KNOWN_MODELS[source.name].gpu
        own = ["samples", "steps", "guidance", *(size for size in SIZES if takes(pipeline, size))]
        wanted = {key: getattr(known, key) for key in (*own, *(["latent"] if isinstance(pipeline, BareTransformer) else []))}
    plan = SamplingPlan(**{**wanted, **given})
    if 0 < plan.samples < len(plan.prompts):
        text = f"{plan.samples} of {len(plan.prompts)} prompts are used; see --samples"
        warnings.warn(files.Advice(text), stacklevel=2)
    return plan


def conditions(pipeline: object, plan: SamplingPlan) -> dict[str, list]:
    """Return the `prompt` or the `class_labels` of all samples, none for made-up ones. Refuses what the pipeline cannot sample.

    Raises:
        ValueError: prompts for a model of classes; a size that the pipeline does not let one choose; either of them for a
            transformer without a pipeline.
    """
    if not plan.samples:
        return {}
    if not isinstance(pipeline, BareTransformer):
        call_options(pipeline, plan)
        return sampling_arguments(pipeline, plan.samples, plan.prompts or None)
    for name in ("prompts", "height", "width", "frames"):
        if getattr(plan, name):
            raise ValueError(
                f"--{name} means nothing to a transformer without its pipeline, whose inputs are made up; leave it out, or give"
                " the whole pipeline's folder"
            )
    return {}


def sample(pipeline: Any, plan: SamplingPlan, adapters: Mapping[str, Adapter]) -> None:
    """Let the transformers be called as they are when `plan.samples` images or clips are made; nothing is returned."""
    if isinstance(pipeline, BareTransformer):
        with progress.bar(plan.samples * len(adapters) * plan.steps, "sample the model", "step") as bar:
            for number in range(plan.samples):
                for part, adapter in adapters.items():
                    trajectory(getattr(pipeline, part), adapter, plan, number, bar.update)
        return
    arguments = conditions(pipeline, plan)
    batch = 1 if getattr(pipeline, "vae", None) is not None else BATCH
    parts = list(seeded_batches(arguments, plan.samples, plan.seed, batch))
    with progress.denoising(pipeline, len(parts), plan.steps, "sample the model") as batch_done:
        for part in parts:
            pipeline(**part, **_options(pipeline, plan))
            batch_done()


def sampled_times(pipeline: object, transformer: nn.Module, adapter: Adapter, steps: int) -> list[float]:
    """Return the times of a trajectory in the transformer's own units, the noisiest first, without sampling one.

    They are those of the pipeline's scheduler for so many steps; a pipeline that hands it sigmas of its own moves them a little;
    without a pipeline those of `trajectory`.

    Raises:
        ValueError: the scheduler needs to know more, such as the size of the sample, or nothing is known of the class's time.
    """
    bare = isinstance(pipeline, BareTransformer)
    own: Scheduler | None = getattr(pipeline, "scheduler", None)
    scheduler = _scheduler(adapter.scheduler) if bare else copy.deepcopy(own)
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
    plan: SamplingPlan,
    number: int,
    done: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Follow the transformer from noise to a sample under made-up conditions, both branches of guidance in one call.

    Args:
        transformer: predicts what `adapter.scheduler` says.
        adapter: of its class.
        plan: steps, guidance, seed and `latent`.
        number: of the sample; another one has other noise and conditions.
        done: is told how many more steps are done.

    Returns:
        The sample, float32, `[1, ...]`.
    """
    guidance = 1.0 if plan.guidance is None else plan.guidance
    generator = torch.Generator().manual_seed(sample_seed(plan.seed, number))
    inputs = synthetic_inputs(transformer, adapter, replace(plan.latent, batch=2), generator)
    # A class that is told the scale needs no second branch.
    guided = guidance != 1 and "guidance" not in inputs
    if not guided:
        inputs = synthetic_inputs(transformer, adapter, replace(plan.latent, batch=1), generator)
    x = latent_of(adapter, inputs)[:1].float()
    dtype = latent_of(adapter, inputs).dtype
    scheduler = _scheduler(adapter.scheduler)
    scheduler.set_timesteps(plan.steps)
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


def _scheduler(kind: str) -> Scheduler:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage] - lazy exports

    if kind == "flow":
        return cast(Scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0))
    return cast(Scheduler, DDIMScheduler(prediction_type=PREDICTION_TYPES[kind]))


def _options(pipeline: object, plan: SamplingPlan) -> dict:
    """Return what the pipeline is called with besides prompts and noise; nothing is decoded where there is an autoencoder."""
    output = "latent" if getattr(pipeline, "vae", None) is not None else "np"
    return call_options(pipeline, plan) | ({"output_type": output} if "output_type" in accepted_arguments(pipeline) else {})
