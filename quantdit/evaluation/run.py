"""Generate from two models with the same prompts and seeds, compare, and write what a person wants to see."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quantdit import checkpoint, files
from quantdit.compiler import size_of
from quantdit.evaluation import gate, page, text, vbench
from quantdit.evaluation.backbones import Clip, inception, load_clip, read_images
from quantdit.evaluation.drift import DriftReport, compare, table
from quantdit.evaluation.measures import (
    EFFICIENTNET,
    Backbone,
    alone_of,
    drift_over_steps,
    features_of,
    mean_harm,
    paired_of,
    probe_of,
    rows_of,
    sets_of,
)
from quantdit.evaluation.picture import side_by_side
from quantdit.evaluation.probe import Probe, probe
from quantdit.evaluation.real import load_real
from quantdit.evaluation.samples import Samples, Sampling, batches, caller, folder_digest, prompts_of, sample, versions
from quantdit.linear import QuantLinear, weight_bits
from quantdit.models.aliases import EMBEDDED
from quantdit.pipeline import Source, load_pipeline, sample_seed, sampling_arguments
from quantdit.streaming import is_streamed

PICTURE_COLUMNS = 8
PICTURE_IMAGES = 40
SAMPLES, LEAST_SAMPLES = 64, 4
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
        floor: mean measures, as gated, of full precision against itself: other seeds, and if asked for other batch, bfloat16.
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
    floor: dict[str, dict[str, float]]
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
        candidate: of the quantized one.
        output: folder, made if need be.
        samples: of each model, prompts in turn; SAMPLES if neither this nor `seeds` is given.
        seeds: of each prompt, instead.
        seed: the first.
        steps: of the sampler.
        guidance: scale; None for the pipeline's own.
        prompts: texts; None for the model's own, or its classes.
        batch: samples at once.
        probes: samples whose inputs both transformers are given.
        device: where.
        cache: folder of samples; `output`/samples if None.
        noise_floor: measure also what the reference differs from itself by with another batch size and in bfloat16.
        real: folder of real images.
        inception_weights: of the original FID network.
        clip_weights: folder of a CLIP model.
        vbench: folder of an environment that has the vbench package.
        vbench_weights: folder of its networks.
    """

    reference: str
    candidate: str
    output: Path
    samples: int | None = None
    seeds: int | None = None
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    prompts: tuple[str, ...] | None = None
    batch: int = 32
    probes: int = PROBES
    device: str = "cpu"
    cache: Path | None = None
    noise_floor: bool = False
    real: Path | None = None
    inception_weights: Path | None = None
    clip_weights: Path | None = None
    vbench: Path | None = None
    vbench_weights: Path | None = None


def evaluate(request: Request) -> str:
    """Compare two models; writes report.json, report.md, report.html and drift.png, and returns the tables as text.

    Raises:
        ValueError: a model, weights or images that cannot be loaded, fewer than LEAST_SAMPLES, or models that generate different
            shapes.
    """
    backbone = inception(request.inception_weights) if request.inception_weights else EFFICIENTNET
    clip = load_clip(request.clip_weights) if request.clip_weights else None
    real = torch.cat([backbone.features(x) for x in read_images(request.real)]) if request.real else None
    vbench.check(request.vbench, request.vbench_weights)
    candidate = open_model(request.candidate, request.device)  # a wrong name should not cost minutes of sampling the reference
    cache = request.output / "samples" if request.cache is None else request.cache
    sampling = _sampling(request, candidate.pipeline)
    reference = sample_reference(request.reference, sampling, request.device, cache, request.noise_floor, backbone, clip)
    made = compare_models(reference, candidate, real, request.probes)
    if request.vbench:
        both = {"reference": reference.samples, "candidate": made.samples}
        made.report["vbench"] = vbench.run(request.vbench, request.vbench_weights, both, request.output / "vbench")
    request.output.mkdir(parents=True, exist_ok=True)
    _draw(reference, candidate, made.samples, made.drift, request.output / "drift.png")
    files.write_json(request.output / "report.json", made.report)
    summary = report_text(made.report, made.drift)
    (request.output / "report.md").write_text(summary + "\n")
    page.write(request.output / "report.html", made.report, reference.samples, made.samples)
    return summary


def _sampling(request: Request, pipeline) -> Sampling:
    """Return what each model is asked for, its number of samples settled."""
    count = request.samples or SAMPLES
    if request.seeds:
        # As many as are asked for come back in turn, so that a spread of many classes is one of SPREAD.
        (_, names), *_ = sampling_arguments(pipeline, SPREAD, request.prompts).items()
        count = request.seeds * len(dict.fromkeys(request.prompts or names))
    if count < LEAST_SAMPLES:
        raise ValueError(f"got {count} samples, but a distance of sets needs at least {LEAST_SAMPLES}, better 64")
    return Sampling(count, request.seed, request.steps, request.guidance, request.prompts, request.batch)


def open_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Opened:
    """Load a model and take its size.

    Raises:
        ValueError: as `load_pipeline`.
    """
    pipeline, source = load_pipeline(name, dtype, device)
    folder = source.part("transformer")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if checkpoint.quant_layers(pipeline.transformer):
        return Opened(pipeline, source, stored, size_of(pipeline.transformer, folder)["bits_per_weight"])
    values = sum(t.numel() for t in pipeline.transformer.state_dict().values())
    return Opened(pipeline, source, stored, round(8 * stored / values, 2))


def sample_reference(
    name: str,
    sampling: Sampling,
    device: str = "cpu",
    cache: Path | None = None,
    noise_floor: bool = False,
    backbone: Backbone = EFFICIENTNET,
    clip: Clip | None = None,
) -> Reference:
    """Sample the reference with the seeds of the first and of the next number, and for the noise floor in other ways as well.

    Raises:
        ValueError: a model that cannot be loaded.
    """
    model = open_model(name, device)
    samples = sample(model.pipeline, model.source, sampling, cache, model.source.label)
    other = sample(model.pipeline, model.source, replace(sampling, seed=sampling.seed + 1), cache, "reference, other seeds")
    again = {"other seeds": other}
    if noise_floor:
        size = max(1, min(sampling.batch, sampling.samples) // 2)
        again["other batch"] = sample(
            model.pipeline, model.source, replace(sampling, batch=size), cache, "reference, other batch size"
        )
        half = open_model(name, device, torch.bfloat16)
        again["bfloat16"] = sample(half.pipeline, half.source, sampling, cache, "reference in bfloat16")
    features = {kind: features_of(s.images, backbone) for kind, s in ({"": samples} | again).items()}
    alignment = _alignment(model.pipeline, features["other seeds"], other.prompts)
    score = None if clip is None else clip.score
    alone = alone_of(samples, features[""], alignment, score)
    floor = {}
    for kind, found in again.items():
        measured = alone_of(found, features[kind], alignment, score)
        floor[kind] = mean_harm(rows_of(samples, found, (features[""], features[kind]), (alone, measured)))
    pair = (features[""], features["other seeds"])
    return Reference(model, sampling, samples, other, floor, backbone, pair, alone, alignment, clip, cache)


def compare_models(reference: Reference, candidate: Opened, real: Tensor | None = None, probes: int = PROBES) -> Compared:
    """Sample the candidate with the reference's seeds, and measure.

    Raises:
        ValueError: the candidate generates other shapes.
    """
    first, sampling, backbone = reference.samples, reference.sampling, reference.backbone
    label = candidate.source.label
    second = sample(candidate.pipeline, candidate.source, sampling, reference.cache, label)
    if first.images.shape != second.images.shape:
        shapes = f"{tuple(first.images.shape)} and {tuple(second.images.shape)}"
        both = f"{reference.model.source.label} and {label}"
        raise ValueError(f"{both} make images of shapes {shapes}; compare models of one kind")
    features = (reference.features[0], features_of(second.images, backbone))
    # The shipped real set is the embedded model's; another model has nothing to do with it.
    embedded = reference.model.source.folder == EMBEDDED / "fashion-dit" and backbone is EFFICIENTNET
    known = real if real is not None else load_real().statistics if embedded else None
    sets = (*features, reference.features[1])
    paired = paired_of(first.images, second.images)
    names = (backbone.frechet, backbone.kernel)
    drift = compare(first.images, second.images, reference.other.images, known, sampling.seed, sets, names, paired)
    looked = _probe(reference, candidate, probes)
    score = None if reference.clip is None else reference.clip.score
    alone = (reference.alone, alone_of(second, features[1], reference.alignment, score))
    samples = rows_of(first, second, features, alone, paired)
    distances = sets_of(*features, reference.features[1], first.prompts, backbone)
    if reference.clip is not None:
        distances |= reference.clip.distances([s.images for s in (first, second, reference.other)], first.prompts)
    report = {
        "format": gate.FORMAT,
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
        "measures": gate.meanings(samples[0]),
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
    parts = ["\n".join(gate.markdown(rows)), table(drift)]
    if given := _given(report):
        parts.append("\n".join(gate.markdown([("by the networks given", first["name"], second["name"]), *given])))
    probed = report["probe"]
    if probed["samples"]:
        error = sum(row["output_error"] for row in probed["samples"]) / len(probed["samples"])
        line = f"Error of the transformer's output on the reference's inputs: {error:.1f} dB"
        if probed["layers"]:
            mean = {name: sum(values) / len(values) for name, values in probed["layers"].items()}
            worst = max(mean, key=mean.get)
            line += f"; of a layer's, at most {mean[worst]:.1f} dB ({worst})"
        parts.append(f"{line}.")
    return "\n\n".join(parts)


def _given(report: dict) -> list[tuple[str, str, str]]:
    """Return what CLIP and VBench say of both models, where they are given; of a distance, other seeds take the first place."""
    rows = []
    if "clip_score" in report["samples"][0]:
        sides = [[row[f"clip_score_{side}"] for row in report["samples"]] for side in ("reference", "candidate")]
        rows.append(("CLIP score", *(f"{sum(values) / len(values):.2f}" for values in sides)))
    for name, entry in report["sets"].items():
        if name.startswith("CMMD"):
            rows.append((name, f"{gate.number(entry['noise_floor'])} (other seeds)", gate.number(entry["drift"])))
    first, second = (report.get("vbench", {}).get(side, {}) for side in ("reference", "candidate"))
    return rows + [(f"VBench {name}", gate.number(value), gate.number(second[name])) for name, value in first.items()]


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
    """Return the proxy of text alignment, fitted to the reference's other samples; None if they are too few."""
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
