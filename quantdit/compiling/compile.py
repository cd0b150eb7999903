"""The compiler: a model and a plan in, a quantized diffusers folder out, block by block and resumable."""

from __future__ import annotations

import inspect
import platform
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantdit.calibration.observe import capture
from quantdit.calibration.observe.recorded_calls import StoredCalls
from quantdit.calibration.observe.timestep_salience import salient_calls
from quantdit.checkpoints import checkpoint, streaming
from quantdit.checkpoints.random_weights import open_scratch, write_random_transformer
from quantdit.checkpoints.streaming import Stream, stream_of
from quantdit.compiling import choose_steps, quantize_blocks, report, work_folder
from quantdit.compiling.block_inputs import describe_chain, links_of
from quantdit.compiling.choose_widths import quantize_to_target
from quantdit.compiling.identity import identity_of, run_of
from quantdit.compiling.job import Job
from quantdit.compiling.measure_together import together as together_errors
from quantdit.compiling.plan import Component, Plan, Target, check, check_finite, check_full_precision, component
from quantdit.compiling.quantize_blocks import QuantizedTransformer
from quantdit.compiling.report import REPORT, CompileResult
from quantdit.layers.quant_attention import attention_of
from quantdit.models.adapter import adapter_for, blocks
from quantdit.models.known_models import KNOWN_MODELS, locate, transformer_config
from quantdit.models.text_encoders import without_cache
from quantdit.pipelines.arguments import check_options
from quantdit.pipelines.components import TRANSFORMER_NAMES
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.pipelines.sampling import sample, sampled_times, sampling_plan_for
from quantdit.pipelines.source import MODEL, BareTransformer, Source
from quantdit.recipes.attention import AttentionRule, AttentionSpec
from quantdit.recipes.presets import (
    BEST,
    encoder_bits_of,
    finetuning_for,
    finetuning_of,
    from_any,
    is_bits,
    with_auto,
    with_encoders,
    with_weight_format,
)
from quantdit.recipes.rules import Recipe
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.recipes.steps import Steps
from quantdit.system import files, memory, progress
from quantdit.system.threads import threads
from quantdit.tensors.timesteps import buckets_of

SAMPLING = tuple(field.name for field in fields(SamplingPlan) if field.name not in ("buckets", "latent"))
# Options of `calibrate` -> fields of FineTuning.
FINETUNING = {"finetune_steps": "steps", "finetune_mode": "mode", "candidates": "candidates", "initial_ratios": "initial"}
LOADING = ("device", "weights", "memory_budget", "random_weights")


def calibrate(
    model: str | Path,
    recipe: Recipe | Mapping | str | Path,
    output: str | Path,
    *,
    method: str = BEST,
    size_budget: float | None = None,
    max_output_error: float | None = None,
    components: str | Sequence[str] = TRANSFORMER_NAMES[0],
    encoder_bits: str | None = None,
    attention: str | None = None,
    steps_plan: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: object,
) -> CompileResult:
    """Quantize a model and write the quantized pipeline's folder, as `quantdit calibrate` does.

    Args:
        model: name, hub id or folder, in full precision.
        recipe: bits such as `w4a8`, the path of a TOML file, a dictionary or a Recipe.
        output: folder to write.
        method: with bits, whose: `best`, today's presets, or a paper's of presets.METHODS.
        size_budget: choose each layer's weight bits so that all take this part of their size in 16 bits; 0.25 is 4 bits a weight.
        max_output_error: choose them for the smallest size whose model_rel_rmse is at most this; 0.05 is 5 %.
        components: what is quantized, in a list or a text with commas: `transformer`, all transformers of the pipeline; names of
            text encoders; `all`, these and the transformers.
        encoder_bits: of the text encoders among them, one of presets.ENCODER_BITS; None: as the recipe says, with bits `w8a16`,
            `w4a16` or `w3a16` by the transformer's bits a weight.
        attention: `int8`: all attention modules that diffusers' dispatcher serves compute in 8 bits.
        steps_plan: share of the sampling steps that are computed, such as 0.5; the others are forecast, in the way that measures
            best on the quantized model. The checkpoint carries the plan; `quantdit.step_plan` turns it on.
        resume: go on with an interrupted run of the same settings.
        overwrite: replace an output that quantdit wrote, unless it holds files of yours.
        options: what is sampled (fields of SamplingPlan: samples, steps, seed, guidance, height, width, frames, prompts,
            timesteps, timestep_choice, tokens, threads; what is not given suits the model); `weight_format`, with bits: `table`,
            `vq`, `ssvq` or `trellis`; fine-tuning (`finetune_steps`, `finetune_mode`, `candidates`, `initial_ratios`); `device`;
            `weights`, the folder of a known model's weights; `memory_budget` in bytes; `random_weights`, made up in a known
            model's shapes.

    Raises:
        ValueError: an option that there is not, a model that cannot be loaded, or as `compile`.
        OSError: the output cannot be written.
    """
    own = [name for name, each in inspect.signature(calibrate).parameters.items() if each.kind is not each.VAR_KEYWORD]
    check_options("calibrate", options, (*own, *SAMPLING, "weight_format", *FINETUNING, *LOADING))
    given = {key: value for key, value in options.items() if value is not None}
    model = str(files.check_path("model", model, MODEL))
    has_target = size_budget is not None or max_output_error is not None
    target = Target(size_budget, max_output_error) if has_target else None
    chosen = recipe_for(recipe, method, target, given.get("weight_format"))
    if attention is not None:
        chosen = replace(chosen, attention=(AttentionRule("*", AttentionSpec(attention)),))
    if steps_plan is not None:
        chosen = replace(chosen, steps=replace(chosen.steps or Steps(steps_plan), compute=steps_plan))
    output = Path(files.check_path("output", output))
    if method != BEST and given.get("samples") == 0:
        raise ValueError(f"--method {method} calibrates on samples that the model makes itself; leave out --samples 0")
    with work_folder.clear_disk_errors(output), ExitStack() as stack:
        work_folder.check_output(output, overwrite, resume)
        read = {} if is_bits(recipe) else {"recipe": recipe}
        read |= {"--weights folder": given["weights"]} if "weights" in given else {}
        work_folder.check_apart(output, {what: (Path(path),) for what, path in read.items() if isinstance(path, str | Path)})
        scratch = _scratch(model, output, stack) if given.get("random_weights") else None
        locate(model)
        progress.say(f"loading {model}")  # seconds go into it
        stack.enter_context(progress.alone())
        pipeline, source = _open(model, given | {"components": components}, scratch)
        chosen = with_encoders(chosen, source.encoders, encoder_bits or (encoder_bits_of(recipe) if is_bits(recipe) else None))
        device = str(given.get("device", "cpu"))
        sampling = sampling_plan_for(pipeline, source, device, {key: given[key] for key in SAMPLING if key in given})
        wanted = {field: given.get(name) for name, field in FINETUNING.items()}
        finetuning = finetuning_for(chosen, finetuning_of(recipe, method), sampling.samples > 0, **wanted)
        result = compile(pipeline, source, Plan(chosen, sampling, finetuning, target), output, resume, overwrite)
        if scratch is not None:
            shutil.rmtree(scratch)
        return result


def recipe_for(
    given: Recipe | Mapping | str | Path, method: str = BEST, target: Target | None = None, weight_format: object = None
) -> Recipe:
    """Return the recipe that is meant: bits with a target leave the widths open, and may be of another weight format.

    Raises:
        ValueError: it cannot be read, or what goes with some bits, or with none, is given beside others.
    """
    budget, error = (None, None) if target is None else (target.size_budget, target.max_output_error)
    beside = {"--recipe": None if is_bits(given) else given, "--weight-format": weight_format}
    beside |= {"--size-budget": budget, "--max-output-error": error}
    if method != BEST and (wrong := next((option for option, value in beside.items() if value is not None), None)):
        raise ValueError(f"--method {method} takes --bits and settles the weights itself; leave out {wrong}, or --method")
    recipe = from_any(given, method)
    if target is not None and is_bits(given):
        recipe = with_auto(recipe)
    if weight_format is None:
        return recipe
    if not is_bits(given):
        raise ValueError("--weight-format goes with --bits; a recipe names the weight format itself")
    return with_weight_format(recipe, str(weight_format))


def _scratch(model: str, output: Path, stack: ExitStack) -> Path:
    """Return the folder beside the output that made-up weights go into, locked; refuses a model whose shapes are not known."""
    if model not in KNOWN_MODELS or not KNOWN_MODELS[model].hub:
        raise ValueError(f"--random-weights needs a known model that is not embedded, got {model!r}; see quantdit models")
    place = work_folder.place_of(output)
    scratch = place.with_name(f"{place.name}.random")
    stack.enter_context(work_folder.locked(scratch))
    return scratch


def _open(model: str, given: Mapping[str, Any], scratch: Path | None) -> tuple[object, Source]:
    """Return the pipeline to calibrate, or its bare transformer, and its source."""
    weights = scratch or given.get("weights")
    if scratch is not None:
        seed = given.get("seed", 0)
        open_scratch(scratch, {"model": model, "seed": seed})
        for number, part in enumerate(KNOWN_MODELS[model].transformers):
            write_random_transformer(transformer_config(model), scratch / part, seed + number)
    how = {"device": given.get("device", "cpu"), "memory_budget": given.get("memory_budget"), "components": given["components"]}
    pipeline, source = load_pipeline(model, weights=None if weights is None else Path(weights), **how)
    if scratch is not None:
        source = replace(source, random_weights=True)
    elif isinstance(pipeline, BareTransformer):
        warnings.warn(files.Advice(f"{source.folder} has no pipeline, only a transformer: conditions are made up"), stacklevel=3)
    return pipeline, source


def compile(
    pipeline: object, source: Source, plan: Plan, output: Path, resume: bool = False, overwrite: bool = False
) -> CompileResult:
    """Quantize a pipeline's transformers as planned and write the quantized pipeline's folder.

    Work goes on in `OUTPUT.partial` beside the output and is renamed at the end, so the final name never holds half a model.
    Each finished block is stored there; `resume=True` continues after the last one. The same source, plan and versions give the
    same bytes of `transformer/`. If `resume=True` finds the output finished by a run of the same, that is returned.

    Raises:
        ValueError: an output that is not to be replaced, lies where the source does, or is being written by another process; a
            plan that does not fit, NaN or infinite weights or activations (the layer is named), or a partial run of another
            plan.
        OSError: the output cannot be written.
    """
    work_folder.check_output(output, overwrite, resume)
    if output.resolve().is_relative_to(source.folder.resolve()):
        raise ValueError(f"output {output} lies inside the source {source.folder}; choose a folder outside")
    work_folder.check_apart(output, {"source": work_folder.paths_of(source.folder)})
    if not source.bare:
        work_folder.rest_of(source.folder, _left(source))
    with work_folder.locked(output):
        return _compile(pipeline, source, plan, output, resume, overwrite)


def _compile(pipeline: object, source: Source, plan: Plan, output: Path, resume: bool, overwrite: bool) -> CompileResult:
    began = time.perf_counter()
    transformers = {part: getattr(pipeline, part).eval() for part in source.components}
    check_full_precision(transformers, str(source.folder))
    plan = plan.for_its_data()
    components = {part: component(t, plan.of(part).recipe) for part, t in transformers.items()}
    check(plan, components)
    for part, transformer in transformers.items():
        attention_of(plan.of(part).recipe.attention, transformer)  # refuses what cannot be
    if plan.recipe.steps is not None:
        choose_steps.check(pipeline, plan.recipe.steps, plan.sampling, any(map(streaming.is_streamed, transformers.values())))
    for transformer in transformers.values():
        check_finite(transformer)
    identity = identity_of(pipeline, source, plan)
    if (finished := _finished(output, source, identity, resume, overwrite)) is not None:
        return finished

    partial = work_folder.partial_of(output)
    with without_cache(transformers.values()), threads(plan.sampling.threads):
        jobs = _captured(pipeline, source, components, plan, partial / work_folder.WORK, run_of(identity))
        captured = time.perf_counter()
        made, allocation = {}, None
        for part, job in jobs.items():
            if job.plan.target is None:
                made[part] = quantize_blocks.quantize(job, components[part].plans, job.folder / "blocks")
            else:
                made[part], allocation = quantize_to_target(job, components[part], job.plan.target)
        together = _together(pipeline, source, components, jobs)
    quantized, step_plan = time.perf_counter(), None
    if plan.recipe.steps is not None:
        with without_cache(transformers.values()), threads(plan.sampling.threads):
            planned = {part: job.model for part, job in jobs.items() if part not in source.encoders}
            step_plan = choose_steps.choose(pipeline, planned, plan.recipe.steps, plan.sampling)
    chosen = time.perf_counter()
    written = _write(source, jobs, partial, identity)
    seconds = {"sample": captured - began, "quantize": quantized - captured, "write": time.perf_counter() - chosen}
    seconds |= {"steps": chosen - quantized} if step_plan is not None else {}
    result = _result(output, source, identity, components, jobs, made, seconds)
    result = replace(result, allocation=allocation, step_plan=step_plan, model_rel_rmse_together=together, files=written)
    files.write_json(partial / REPORT, report.to_json(result))
    work_folder.publish(partial, output, identity)
    return result


def _finished(output: Path, source: Source, identity: dict, resume: bool, overwrite: bool) -> CompileResult | None:
    """Return what a run of this identity made already, or None with its work folder begun or opened.

    Raises:
        ValueError: output or work folder are of another run.
    """
    partial = work_folder.partial_of(output)
    if not (resume and work_folder.is_finished(output, identity)):
        if resume and not overwrite and (before := _finished_before(output, source, identity)) is not None:
            return before
        work_folder.open_partial(output, identity, resume, overwrite)
        if not (resume and work_folder.is_finished(partial, identity)):
            return None
    work_folder.publish(partial, output, identity)
    return report.read(output)


def _finished_before(output: Path, source: Source, identity: dict) -> CompileResult | None:
    """Return what a finished run of this identity left in an output; None if that is not the whole result of a run.

    Raises:
        ValueError: it is that of a run of another identity; names the settings that differ.
    """
    try:
        content = files.read_json(output / REPORT)
        before = report.from_json(content, output, already_finished=True)
        if before.sha256 != files.digest(output / source.components[0]):
            return None
    except (files.CheckpointError, OSError):
        return None
    if other := work_folder.differences({key: content[key] for key in identity}, identity):
        raise ValueError(
            f"output {output} holds a finished run of other settings: {other}; choose another --output, or pass --overwrite to"
            " replace it"
        )
    return before


def _captured(
    pipeline: object, source: Source, components: Mapping[str, Component], plan: Plan, work: Path, run: str
) -> dict[str, Job]:
    """Sample from the pipeline, and return for each transformer its calls and what is needed to work on it."""
    streams = {
        part: stream_of(each.model, source.folder_of(part))
        for part, each in components.items()
        if streaming.is_streamed(each.model)
    }
    if streams:
        memory.give_back_at_once()
    sampling, edge_steps = plan.sampling, plan.recipe.edge_steps
    calls = dict.fromkeys(components, StoredCalls(()))
    if sampling.samples:
        with ExitStack() as stack:
            for part, stream in streams.items():
                stack.enter_context(stream.following(components[part].blocks))
            for rest in _rest(pipeline, source):
                stack.enter_context(rest.following([path for path, _ in blocks(rest.transformer, adapter_for(rest.transformer))]))
            calls = capture.transformer_calls(
                lambda: sample(pipeline, sampling, {part: each.adapter for part, each in components.items()}),
                {part: each.model for part, each in components.items()},
                sampling.steps,
                sampling.buckets,
                work / "calls",
                sampling.timesteps if sampling.timestep_choice == "even" else 0,
                edge_steps,
            )
    elif edge_steps:
        for part, each in components.items():
            if part in source.encoders:
                continue
            times = sampled_times(pipeline, each.model, each.adapter, sampling.steps)
            calls[part] = StoredCalls((), buckets_of(times, sampling.steps, sampling.buckets, edge_steps)[1])
    jobs = {}
    for part, each in components.items():
        folder = work / part
        folder.mkdir(parents=True, exist_ok=True)
        jobs[part] = Job(each.model, each.blocks, calls[part], plan.of(part), folder, streams.get(part), run)
        if sampling.timestep_choice == "salience" and sampling.samples and sampling.timesteps and part not in source.encoders:
            jobs[part] = _salient(jobs[part], sampling.timesteps)
    return jobs


def _together(
    pipeline: object, source: Source, components: Mapping[str, Component], jobs: Mapping[str, Job]
) -> dict[str, float] | None:
    """Return the errors of the transformers that read quantized text encoders' embeddings, where they can be measured."""
    sampling = next(iter(jobs.values())).plan.sampling
    transformers = {part: job for part, job in jobs.items() if part not in source.encoders}
    is_whole = sampling.samples and not sampling.timesteps and all(job.stream is None for job in jobs.values())
    if not is_whole or not transformers or len(transformers) == len(jobs):
        return None
    adapters = {part: each.adapter for part, each in components.items()}
    return together_errors(transformers, lambda: sample(pipeline, sampling, adapters))


def _rest(pipeline: object, source: Source) -> Iterator[Stream]:
    """Yield what reads the transformers that are sampled with, are not in memory, and are not to be quantized."""
    for part in TRANSFORMER_NAMES:
        model = getattr(pipeline, part, None)
        if part not in source.components and model is not None and streaming.is_streamed(model):
            yield stream_of(model, source.folder_of(part))


def _salient(job: Job, count: int) -> Job:
    """Return the job with the calls of its most salient timesteps alone."""
    links = links_of(job)
    if not links:
        raise ValueError("the transformer's blocks have no order to choose timesteps by; use --timestep-choice even")
    with job.loaded(links[0].path):
        return replace(job, calls=salient_calls(job.model, links[0].path, job.calls, count))


def _write(source: Source, jobs: Mapping[str, Job], partial: Path, identity: dict) -> list[str]:
    """Write the rest of the pipeline and the quantized transformers; returns the paths of all files in the folder."""
    written = [] if source.bare else work_folder.copy_rest(source.folder, partial, _left(source))
    scheduler = None if source.bare else checkpoint.scheduler_of(source.folder)
    for part, job in jobs.items():
        read = job.stream.read if job.stream is not None else None
        recipe, provenance = job.plan.recipe.to_dict(), identity["provenance"]
        of_trajectory = None if part in source.encoders else scheduler
        checkpoint.write_transformer(job.model, partial / part, recipe, provenance, read, of_trajectory)
    return [*written, *(f"{part}/{name}" for part in jobs for name in work_folder.files_in(partial / part))]


def _result(
    output: Path,
    source: Source,
    identity: dict,
    components: Mapping[str, Component],
    jobs: Mapping[str, Job],
    made: Mapping[str, QuantizedTransformer],
    seconds: Mapping[str, float],
) -> CompileResult:
    """Return what is to be said of transformers that lie written in the work folder."""
    partial, first = work_folder.partial_of(output), source.components[0]
    spent = sum((job.seconds for job in jobs.values()), Counter())
    return CompileResult(
        output,
        **identity,
        sha256=files.digest(partial / first),
        machine={"platform": platform.platform(), "torch": torch.__version__, "diffusers": version("diffusers")},
        seconds={stage: round(value, 1) for stage, value in seconds.items()},
        seconds_of_quantize={stage: round(value, 1) for stage, value in spent.items()},
        memory={
            "budget_bytes": source.memory_budget,
            "peak_bytes": memory.peak(),
            "streamed": any(job.stream is not None for job in jobs.values()),
        },
        blocks={part: describe_chain(job) for part, job in jobs.items()},
        model_rel_rmse=made[first].model_error,
        model_rel_rmse_of_parts={part: m.model_error for part, m in made.items()} if len(made) > 1 else None,
        size=report.added([report.size_of(job.model, partial / part) for part, job in jobs.items()]),
        dense_layers=sum(len(each.layers) - len(each.options) for each in components.values()),
        layers={
            name if part == first else f"{part}.{name}": layer
            for part, of_part in made.items()
            for name, layer in of_part.reports.items()
        },
        warning=report.RANDOM_WARNING if source.random_weights else None,
        files=[],
    )


def _left(source: Source) -> set[str]:
    """Return what of a pipeline's folder is not copied into the output."""
    return {*source.components, REPORT}
