"""Two models compared: the reference sampled, the candidate sampled with its prompts and seeds, and the report of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.streaming import is_streamed
from quantdit.compiling.report import size_of
from quantdit.evaluation import equal_compute
from quantdit.evaluation.apply_metrics import (
    alone_of,
    cmmd_of,
    distances_of,
    drift_of,
    drift_over_steps,
    means_of,
    paired_of,
    probe_of,
    rows_of,
    sets_of,
    six,
)
from quantdit.evaluation.kept_samples import folder_digest, versions
from quantdit.evaluation.metrics import text_alignment
from quantdit.evaluation.metrics.frechet import frechet_distance
from quantdit.evaluation.metrics.table import FORMAT, meanings
from quantdit.evaluation.networks.backbone import Backbone
from quantdit.evaluation.networks.clip import Clip
from quantdit.evaluation.networks.efficientnet import EFFICIENTNET
from quantdit.evaluation.probe import Probe, probe
from quantdit.evaluation.real_images import load_real
from quantdit.evaluation.samples import Samples, Sampling, batches, caller, prompts_of, sample
from quantdit.layers.quant_linear import QuantLinear, weight_bits
from quantdit.models.known_models import EMBEDDED
from quantdit.pipelines.arguments import SEEDS, dtype_of
from quantdit.pipelines.call_arguments import accepted_arguments
from quantdit.pipelines.components import COMPONENTS, TRANSFORMER_NAMES, named_components
from quantdit.pipelines.generate import sample_seed
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.pipelines.source import BareTransformer, Source
from quantdit.pipelines.step_plans import following
from quantdit.step_plans.step_plan import StepPlan
from quantdit.system import files, progress

LEAST_SAMPLES = 4
PROBES = 16  # samples whose inputs both transformers are given
# Seed of the probes' noise, whatever the samples' seeds are: report and baseline are then probed on the same inputs.
PROBE_SEED = 2**31 - 1


@dataclass(frozen=True)
class LoadedModel:
    """A model that was loaded, and the size of its transformer.

    Attributes:
        pipeline: a diffusers pipeline.
        source: where it was loaded from.
        file_bytes: of the transformer's weights on disk.
        bits_per_weight: of the transformer, scales included.
        only: components that are the model's own, all others being the reference's; empty: all are its own.
    """

    pipeline: Any
    source: Source
    file_bytes: int
    bits_per_weight: float
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """The original model, its samples, and how far it is from itself.

    Attributes:
        model: as loaded.
        sampling: what every model is asked for.
        samples: with that.
        other: of the next seed.
        floor: measures of full precision against itself (`means_of`, `distances_of`) with other seeds and, if asked for, with
            another batch size and in another dtype.
        backbone: of the features.
        features: of `samples` and `other`.
        alone: what `measures.alone_of` says of `samples`.
        alignment: to texts; None if there is too little to fit it to.
        clip: CLIP, where it is given.
        cache: where samples are kept.
    """

    model: LoadedModel
    sampling: Sampling
    samples: Samples
    other: Samples
    floor: dict[str, dict[str, dict[str, float]]]
    backbone: Backbone
    features: tuple[Tensor, Tensor]
    alone: dict[str, Tensor]
    alignment: text_alignment.Alignment | None
    clip: Clip | None
    cache: Path | None


@dataclass(frozen=True)
class Comparison:
    """The whole report as JSON, and the candidate's samples."""

    report: dict
    samples: Samples


def open_model(name: str, device: str = "cpu", dtype: str = "float32", accept_config: bool = False) -> LoadedModel:
    """Load a model, what is not quantized in a dtype as `dtype_of` takes it, and take its size.

    Raises:
        ValueError: as `load_pipeline`.
    """
    progress.say(f"loading {name} in {dtype}")
    pipeline, source = load_pipeline(name, dtype_of(dtype), device, accept_config=accept_config)
    accepted_arguments(pipeline)  # refuses a transformer alone
    assert not isinstance(pipeline, BareTransformer)
    folder = source.folder_of("transformer")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if checkpoint.quant_layers(pipeline.transformer):
        return LoadedModel(pipeline, source, stored, size_of(pipeline.transformer, folder)["bits_per_weight"])
    values = sum(t.numel() for t in pipeline.transformer.state_dict().values())
    return LoadedModel(pipeline, source, stored, round(8 * stored / values, 2))


def keep_only(candidate: LoadedModel, original: LoadedModel, only: Sequence[str]) -> LoadedModel:
    """Return a candidate whose transformers and text encoders are the original's, but for those of some names.

    Args:
        candidate: loaded; its pipeline is changed.
        original: loaded.
        only: as `pipeline.named_components` takes it: `transformer` means all transformers.

    Raises:
        ValueError: a name that the candidate has no component of.
    """
    parts = {name: part for name in COMPONENTS if isinstance(part := getattr(candidate.pipeline, name, None), nn.Module)}
    kept = named_components(only, tuple(parts), candidate.source.label)
    for name in parts.keys() - set(kept):
        setattr(candidate.pipeline, name, getattr(original.pipeline, name))
    return replace(candidate, only=kept)


def sample_reference(
    model: LoadedModel,
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
    # Opened before minutes are spent on sampling, since it may be refused.
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
    features = {kind: backbone.of_samples(s.images) for kind, s in ({"": samples} | again).items()}
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


def compare_models(
    reference: Reference,
    candidate: LoadedModel,
    real: Tensor | None = None,
    probes: int = PROBES,
    plans: Mapping[str, StepPlan] | None = None,
) -> Comparison:
    """Sample the candidate, which makes samples of the reference's shape, with the reference's seeds, and measure.

    Args:
        reference: sampled.
        candidate: loaded.
        real: features `[n, d]` of real images.
        probes: samples whose inputs both transformers are given; the probe computes every step.
        plans: that the candidate is sampled by, by the names of its transformers; None: it computes every step.
    """
    first, sampling, backbone = reference.samples, reference.sampling, reference.backbone
    cache = None if candidate.only else reference.cache  # kept samples are known by the folder of a whole model
    with following(candidate.pipeline, plans or {}):
        second = sample(candidate.pipeline, candidate.source, sampling, cache, candidate.source.label)
    features = (reference.features[0], backbone.of_samples(second.images))
    paired = paired_of(first.images, second.images)
    sets = sets_of(*features, reference.features[1], first.prompts, backbone)
    drift = drift_of(first, paired, sets, backbone, _to_real(reference, features, real))
    score = None if reference.clip is None else reference.clip.score
    alone = (reference.alone, alone_of(second, features[1], reference.alignment, score))
    rows = rows_of(first, second, features, alone, paired)
    if reference.clip is not None:
        embedded = [reference.clip.embeddings(x.images) for x in (first, second, reference.other)]
        sets[f"CMMD ({reference.clip.name})"] = cmmd_of(embedded[0], embedded[1], embedded[2], first.prompts)
    report = {
        "format": FORMAT,
        "identity": _identity(reference) | _identity_of_candidate(candidate, plans),
        "versions": versions(),
        "reference": _json(reference.model),
        "candidate": _json(candidate),
        "sampling": asdict(sampling) | {"prompts": list(dict.fromkeys(first.prompts))},
        "drift": drift,
        "sets": sets,
        "floor": reference.floor,
        "probe": _probe(reference, candidate, probes),
        "over_steps": drift_over_steps(first, second),
        "layers": _layer_sizes(candidate.pipeline.transformer),
        "recipe": _recipe(candidate.source),
        "measures": meanings(rows[0]),
        "samples": rows,
    }
    if plans:
        original, quantized = ((m.pipeline, m.source) for m in (reference.model, candidate))
        report["step_plan"] = equal_compute.rows_of(original, quantized, plans, sampling, first, second)
    return Comparison(report, second)


def _to_real(reference: Reference, features: tuple[Tensor, Tensor], real: Tensor | None) -> dict[str, float]:
    """Return the Frechet distances of both models to real images; none where there are no real images of the model's kind."""
    # The shipped real images show what the embedded model was trained on; they say nothing of other models.
    embedded = reference.model.source.folder == EMBEDDED / "fashion-dit" and reference.backbone is EFFICIENTNET
    known = real if real is not None else load_real().statistics if embedded else None
    if known is None:
        return {}
    names = ("reference_to_real", "candidate_to_real")
    return {name: six(frechet_distance(x, known)) for name, x in zip(names, features, strict=True)}


def _probe(reference: Reference, candidate: LoadedModel, probes: int) -> dict:
    """Return the errors on the reference's inputs; empty where the models cannot both be run at once."""
    nothing = {"timesteps": [], "samples": [], "by_timestep": [], "layers": {}}
    pipeline = reference.model.pipeline
    names = [name for name in reference.model.source.components if name in candidate.source.components]
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


def _alignment(pipeline: Any, features: Tensor, prompts: tuple[str, ...]) -> text_alignment.Alignment | None:
    """Return the proxy of text alignment, fitted to the reference's other samples; None if they are too few, or of no text."""
    if "prompt" not in accepted_arguments(pipeline):
        return None
    if len(set(prompts)) < 2 or len(prompts) < LEAST_SAMPLES:
        return None
    encode = getattr(pipeline, "encode_prompt", None) if hasattr(pipeline, "known") else None
    if encode is None:
        return text_alignment.proxy(features, prompts, text_alignment.one_place_each(prompts))
    return text_alignment.proxy(features, prompts, lambda asked: encode(list(asked)).double().mean(1))


def _identity(reference: Reference) -> dict:
    """Return what a report and the baseline it is compared with must have in common."""
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


def _identity_of_candidate(candidate: LoadedModel, plans: Mapping[str, StepPlan] | None) -> dict:
    """Return what of the candidate the two must have in common: what is compared, and how many steps it computes."""
    found: dict[str, object] = {"only": list(candidate.only)} if candidate.only else {}
    specs = {
        str(spec)
        for name in TRANSFORMER_NAMES
        for spec in getattr(getattr(candidate.pipeline, name, None), "attention_specs", {}).values()
    }
    found |= {"attention": sorted(specs)} if specs else {}
    return found | ({"step plan": [f"{len(p.computed)} of {len(p.times)} steps" for p in plans.values()]} if plans else {})


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
    folder = source.folder_of("transformer")
    if not checkpoint.is_quantized(folder):
        return None
    config = files.read_json(folder / "config.json")["quantization_config"]
    return {key: config[key] for key in ("recipe", "provenance") if key in config}


def _json(model: LoadedModel) -> dict:
    return {"name": model.source.label, "file_bytes": model.file_bytes, "bits_per_weight": model.bits_per_weight}
