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
from quantdit.models.known_models import EMBEDDED, KNOWN_MODELS, known_by_config
from quantdit.models.synthetic import (
    TRAIN_STEPS,
    latent_of,
    moved_inputs,
    own_time,
    prediction,
    synthetic_inputs,
    without_condition,
)
from quantdit.pipelines.arguments import SIZES
from quantdit.pipelines.call_arguments import accepted_arguments, call_options, sampling_arguments
from quantdit.pipelines.generate import sample_seed, seeded_batches
from quantdit.pipelines.source import BareTransformer, Source
from quantdit.recipes.sampling_plan import SMALL, SamplingPlan, Size
from quantdit.system import files, progress

# Images of a pipeline without an autoencoder are small; latents of one at a time are large enough.
BATCH = 32
# Of made-up calls: cells of all samples in one, and along a side on a CPU, where a larger sample of an unknown model takes hours.
BATCH_CELLS, CPU_SIDE = 32 * 1024, 32
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

    A transformer without its pipeline that has a known one's config is known, too. Samples of another are as large as its config
    says, on a CPU at most CPU_SIDE cells to a side.

    Args:
        pipeline: of the model.
        source: where it came from; the name of a known one decides.
        device: that it is sampled on.
        given: fields of SamplingPlan.

    Raises:
        ValueError: values that SamplingPlan refuses.
    """
    wanted: dict[str, Any] = {}
    bare = getattr(pipeline, source.components[0]) if isinstance(pipeline, BareTransformer) else None
    name = source.name if bare is None or source.name in KNOWN_MODELS else known_by_config(bare.config)
    if name in KNOWN_MODELS:
        known = KNOWN_MODELS[name].cpu if device == "cpu" else KNOWN_MODELS[name].gpu
        own = ["samples", "steps", "guidance", "timesteps", *(size for size in SIZES if takes(pipeline, size))]
        wanted = {key: getattr(known, key) for key in (*own, *([] if bare is None else ["latent"]))}
    elif bare is not None and (size := _own_size(bare, device)) is not None:
        wanted["latent"] = size
    plan = SamplingPlan(**{**wanted, **given})
    if 0 < plan.samples < len(plan.prompts):
        text = f"{plan.samples} of {len(plan.prompts)} prompts are used; see --samples"
        warnings.warn(files.Advice(text), stacklevel=2)
    return plan


def _own_size(transformer: nn.Module, device: str) -> Size | None:
    """Return the size that a transformer's config names, in latent cells, within what a CPU samples in reasonable time."""
    config: Any = transformer.config
    height, width = _pair(config.get("sample_size") or (config.get("sample_height"), config.get("sample_width")))
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    if device == "cpu":
        patch = config.get("patch_size")
        largest = CPU_SIDE - CPU_SIDE % (patch if isinstance(patch, int) and 0 < patch <= CPU_SIDE else 1)
        height, width = min(height, largest), min(width, largest)
    return replace(SMALL, height=height, width=width)


def _pair(value: object) -> tuple[object, object]:
    return (value[0], value[1]) if isinstance(value, list | tuple) and len(value) == 2 else (value, value)


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
        size = plan.latent
        batch = max(1, min(BATCH, BATCH_CELLS // (size.frames * size.height * size.width)))
        with progress.bar(plan.samples * len(adapters) * plan.steps, "sample the model", "step") as bar:
            for first in range(0, plan.samples, batch):
                numbers = range(first, min(first + batch, plan.samples))
                for part, adapter in adapters.items():
                    trajectory(getattr(pipeline, part), adapter, plan, numbers, bar.update)
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
    scheduler = _scheduler(transformer, adapter) if bare else copy.deepcopy(own)
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
    numbers: range,
    done: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Follow the transformer from noise to samples under made-up conditions, both branches of guidance in one call.

    Args:
        transformer: of a known model, or predicts what `adapter.scheduler` says.
        adapter: of its class.
        plan: steps, guidance, seed and `latent`.
        numbers: of the samples, which are one batch; others have other noise and conditions.
        done: is told how many more steps of samples are done.

    Returns:
        The samples, float32, `[len(numbers), ...]`.
    """
    guidance, count = 1.0 if plan.guidance is None else plan.guidance, len(numbers)
    generator = torch.Generator().manual_seed(sample_seed(plan.seed, numbers[0]))
    inputs = synthetic_inputs(transformer, adapter, replace(plan.latent, batch=2 * count), generator)
    # A class that is told the scale needs no second branch.
    guided = guidance != 1 and "guidance" not in inputs
    if guided:
        inputs = without_condition(transformer, adapter, inputs, count)
    else:
        inputs = synthetic_inputs(transformer, adapter, replace(plan.latent, batch=count), generator)
    x = latent_of(adapter, inputs)[:count].float()
    dtype = latent_of(adapter, inputs).dtype
    scheduler = _scheduler(transformer, adapter)
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
        done(count)
    return x


def _scheduler(transformer: nn.Module, adapter: Adapter) -> Scheduler:
    """Return an embedded model's own scheduler for its transformer; for another what its class was trained for."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage] - lazy exports

    config: Any = transformer.config
    own = EMBEDDED / (known_by_config(config) or "") / "scheduler"
    if own.exists():
        return cast(Scheduler, FlowMatchEulerDiscreteScheduler.from_pretrained(own))
    if adapter.scheduler == "flow":
        return cast(Scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0))
    return cast(Scheduler, DDIMScheduler(prediction_type=PREDICTION_TYPES[adapter.scheduler]))


def _options(pipeline: object, plan: SamplingPlan) -> dict:
    """Return what the pipeline is called with besides prompts and noise; nothing is decoded where there is an autoencoder."""
    output = "latent" if getattr(pipeline, "vae", None) is not None else "np"
    return call_options(pipeline, plan) | ({"output_type": output} if "output_type" in accepted_arguments(pipeline) else {})
