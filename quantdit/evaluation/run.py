"""Generate from two models with the same seeds, compare, and write what a person wants to see."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quantdit import checkpoint, files
from quantdit.compiler import size_of
from quantdit.evaluation.drift import DriftReport, compare, table
from quantdit.evaluation.picture import side_by_side
from quantdit.evaluation.real import load_real
from quantdit.models.aliases import EMBEDDED
from quantdit.pipeline import Source, generate, load_pipeline

PICTURE_COLUMNS = 8
PICTURE_IMAGES = 40
LEAST_SAMPLES = 4


@dataclass(frozen=True)
class Sampling:
    """What both models are asked for; `guidance` None is the pipeline's default."""

    samples: int
    seed: int
    steps: int
    guidance: float | None


@dataclass(frozen=True)
class Model:
    """One side of a comparison: its images `[n, c, h, w]` or clips `[n, f, c, h, w]`, and what its file holds."""

    name: str
    images: torch.Tensor
    file_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Reference:
    """A model, how it was sampled, and its images of other seeds, for the noise floor."""

    model: Model
    sampling: Sampling
    other_seeds: torch.Tensor
    embedded: bool


def evaluate(
    reference: str,
    candidate: str,
    output: Path,
    samples: int = 64,
    seed: int = 0,
    steps: int = 20,
    guidance: float | None = None,
    device: str = "cpu",
) -> str:
    """Compare two models; writes `drift.json`, `drift.md` and `drift.png` into `output` and returns the tables as text.

    Raises:
        ValueError: a model that cannot be loaded, fewer than LEAST_SAMPLES, or models that generate different shapes.
    """
    loaded = load_pipeline(candidate, device=device)  # first: a wrong name should not cost minutes of sampling the reference
    result = compare_models(sample_reference(reference, samples, seed, steps, guidance, device), *loaded, output / "drift.png")
    text = result.pop("table")
    files.write_json(output / "drift.json", result)
    (output / "drift.md").write_text(text + "\n")
    return text


def sample_reference(
    name: str, samples: int, seed: int, steps: int, guidance: float | None = None, device: str = "cpu"
) -> Reference:
    """Sample the reference with the seeds of `seed`, and with those of `seed + 1` for the noise floor.

    Raises:
        ValueError: a model that cannot be loaded, or fewer than LEAST_SAMPLES.
    """
    if samples < LEAST_SAMPLES:
        raise ValueError(f"got {samples} samples, but a kernel distance with its error needs at least {LEAST_SAMPLES}, better 64")
    sampling = Sampling(samples, seed, steps, guidance)
    pipeline, source = load_pipeline(name, device=device)
    model = _sample(pipeline, source, sampling)
    other = generate(pipeline, samples, seed + 1, steps, guidance, description="reference, other seeds")
    return Reference(model, sampling, other, source.folder == EMBEDDED / "fashion-dit")


def compare_models(reference: Reference, pipeline, source: Source, picture: Path) -> dict:
    """Sample the candidate with the reference's seeds, draw both, and return the JSON of the comparison, tables included.

    Raises:
        ValueError: the candidate generates other shapes.
    """
    first, sampling = reference.model, reference.sampling
    second = _sample(pipeline, source, sampling)
    if first.images.shape != second.images.shape:
        shapes = f"{tuple(first.images.shape)} and {tuple(second.images.shape)}"
        raise ValueError(f"{first.name} and {second.name} make images of shapes {shapes}; compare models of one kind")
    # The shipped real set is the embedded model's; another model has nothing to do with it.
    real = load_real().statistics if reference.embedded else None
    report = compare(first.images, second.images, reference.other_seeds, real, sampling.seed)
    picture.parent.mkdir(parents=True, exist_ok=True)
    _draw(first, second, report, sampling, picture)
    sides = {"reference": _json(first), "candidate": _json(second)}
    text = f"{_size_table(first, second)}\n\n{table(report)}"
    return {**sides, "sampling": asdict(sampling), "drift": report.to_json(), "table": text}


def _sample(pipeline, source: Source, sampling: Sampling) -> Model:
    name = source.label
    images = generate(pipeline, sampling.samples, sampling.seed, sampling.steps, sampling.guidance, description=name)
    folder = source.part("transformer")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if checkpoint.quant_layers(pipeline.transformer):
        return Model(name, images, stored, size_of(pipeline.transformer, folder)["bits_per_weight"])
    values = sum(t.numel() for t in pipeline.transformer.state_dict().values())
    return Model(name, images, stored, round(8 * stored / values, 2))


def _draw(first: Model, second: Model, report: DriftReport, sampling: Sampling, picture: Path) -> None:
    sizes = [f"{m.name}: {m.file_bytes / 1e6:.2f} MB, {m.bits_per_weight:.2f} bits per weight" for m in (first, second)]
    how = f"seed {sampling.seed}, {sampling.steps} steps"
    things = "clips" if report.clips else "images"
    quality = f"paired PSNR {report.psnr_mean:.1f} dB over {sampling.samples} {things}, SSIM {report.ssim_mean:.4f}; {how}"
    panels = [(m.name, _pictures(m.images)) for m in (first, second)]
    side_by_side(panels, PICTURE_COLUMNS, picture, ["   ".join(sizes), quality])


def _pictures(samples: torch.Tensor) -> torch.Tensor:
    """Return the images to draw: the first ones, or of clips a row of frames each."""
    if samples.ndim == 4:
        return samples[:PICTURE_IMAGES]
    frames = torch.linspace(0, samples.shape[1] - 1, PICTURE_COLUMNS).round().long()
    return samples[: PICTURE_IMAGES // PICTURE_COLUMNS, frames].flatten(0, 1)


def _size_table(first: Model, second: Model) -> str:
    rows = (
        ("", first.name, second.name),
        ("transformer file", f"{first.file_bytes / 1e6:.2f} MB", f"{second.file_bytes / 1e6:.2f} MB"),
        ("bits per weight, scales included", f"{first.bits_per_weight:.2f}", f"{second.bits_per_weight:.2f}"),
    )
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _json(model: Model) -> dict:
    return {"name": model.name, "file_bytes": model.file_bytes, "bits_per_weight": model.bits_per_weight}
