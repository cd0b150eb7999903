"""What every row of the study is measured with, whoever quantized: the same seeds, the same images, the same numbers.

`sample` and `captured_inputs` run in any environment that has quantdit; `measure` needs its `eval` extra. As a command:

    python reports/study/measure.py WORK/sdnq WORK/hqq --output reports/study/peers.jsonl    (collect what peers.py left)
    python reports/study/measure.py --floor --output reports/study/floor.jsonl               (full precision, other seeds)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantdit.models import adapter as adapters
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline

MODEL, SAMPLES, STEPS, GUIDANCE = "fashion-dit", 64, 20, 2.0
SEEDS, OTHER_SEEDS = (1, 2, 3, 4), (5, 6, 7, 8)
LEVEL = 0.95
WORK = Path(tempfile.gettempdir()) / "quantdit-study"

# Inputs for the error of a layer's output: as many images as make each class show at every step, of a seed no row samples.
CAPTURE_SEED, CAPTURE_IMAGES, CAPTURE_ROWS = 100, 20, 2048

METRICS = ("psnr", "ssim", "fd", "kid", "class_accuracy")


def sample(pipeline, seeds: Iterable[int] = SEEDS, samples: int = SAMPLES) -> Tensor:
    """Return images `[len(seeds) * samples, 1, 28, 28]` in [-1, 1], seed by seed; image i of a seed is of class i % 10."""
    return torch.cat([generate(pipeline, samples, s, STEPS, GUIDANCE, batch=samples, description=f"seed {s}") for s in seeds])


def load_reference(work: Path = WORK, model: str = MODEL) -> tuple[Tensor, Tensor]:
    """Return images and features of full precision, made once and kept in `work`, a folder of this model alone."""
    path = work / "reference.safetensors"
    if not path.exists():
        images = sample(load_pipeline(model)[0])
        save({"images": images, "features": _features(images)}, path)
    stored = load_file(path)
    return stored["images"], stored["features"]


def measure(reference: Tensor, candidate: Tensor, reference_features: Tensor | None = None, seeds: int = len(SEEDS)) -> dict:
    """Compare images made from the same seeds; every metric as mean, t-interval over the seeds, and the value of each seed.

    Args:
        reference: `[seeds * samples, 1, 28, 28]` float in [-1, 1], seed by seed, as `sample` returns them.
        candidate: the same shape.
        reference_features: `[seeds * samples, 1280]` of the reference, computed here if not given.
        seeds: how many parts of equal length the images are cut into.

    Returns:
        `psnr` (dB, each image capped, with the `worst` image), `ssim`, `fd`, `kid` (both on EfficientNet-Lite0 features,
        between the two sets of one seed) and `class_accuracy`; `pooled` is the same over all images at once.

    Raises:
        ValueError: the shapes differ, values are not finite, or the images are not `seeds` equal parts.
    """
    from quantdit.evaluation.metrics.discrepancy import kernel_distance
    from quantdit.evaluation.metrics.frechet import frechet_distance
    from quantdit.evaluation.metrics.paired import capped, psnr, ssim

    sys.path.append(str(Path(__file__).parents[1] / "training"))
    from fashion_classifier import recognised

    if reference.shape != candidate.shape or len(reference) % seeds:
        raise ValueError(f"images are {list(reference.shape)} and {list(candidate.shape)}, expected equal, {seeds} equal parts")
    each = len(reference) // seeds
    decibels, similarity = capped(psnr(reference, candidate)), ssim(reference, candidate)
    features = [_features(reference) if reference_features is None else reference_features, _features(candidate)]
    labels = torch.arange(each).repeat(seeds) % 10
    parts = [x.split(each) for x in features]
    found = {
        "psnr": ([x.mean().item() for x in decibels.split(each)], decibels.mean().item()),
        "ssim": ([x.mean().item() for x in similarity.split(each)], similarity.mean().item()),
        "fd": ([frechet_distance(b, a) for a, b in zip(*parts, strict=True)], frechet_distance(features[1], features[0])),
        "kid": ([kernel_distance(b, a) for a, b in zip(*parts, strict=True)], kernel_distance(features[1], features[0])),
        "class_accuracy": (
            [recognised(x, y) for x, y in zip(candidate.split(each), labels.split(each), strict=True)],
            recognised(candidate, labels),
        ),
    }
    metrics = {name: summary(values) | {"pooled": six(pooled)} for name, (values, pooled) in found.items()}
    metrics["psnr"] |= {"worst": six(decibels.min().item()), "worst_values": [six(x.min().item()) for x in decibels.split(each)]}
    return metrics


def summary(values: list[float]) -> dict:
    """Return mean, t-interval of the mean and the values; one value has no interval."""
    x = torch.tensor(values, dtype=torch.float64)
    mean = x.mean().item()
    if len(values) < 2:
        return {"mean": six(mean), "interval": None, "values": [six(v) for v in values]}
    from scipy.stats import t

    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * x.std().item() / len(values) ** 0.5
    return {"mean": six(mean), "interval": [six(mean - half), six(mean + half)], "values": [six(v) for v in values]}


def row(
    package: str,
    version: str,
    method: str,
    bits: str,
    bits_per_weight: float | None = None,
    group_size: int | str | None = None,
    seconds: float | None = None,
    mean_rel_rmse: float | None = None,
    command: str = "",
    note: str = "",
    metrics: dict | None = None,
    error: str | None = None,
) -> dict:
    """Return one row of the study in its fixed order; `error` stands in place of the metrics of a row that failed."""
    facts = {
        "package": package,
        "version": version,
        "method": method,
        "bits": bits,
        "bits_per_weight": None if bits_per_weight is None else six(bits_per_weight),
        "group_size": group_size,
        "seconds": None if seconds is None else six(seconds),
    }
    result = {"error": error} if error is not None else dict(metrics or {})
    rest = {
        "mean_rel_rmse": None if mean_rel_rmse is None else six(mean_rel_rmse),
        "seeds": list(SEEDS),
        "command": command,
        "note": note,
        "machine": machine(),
    }
    return facts | result | rest


def quantized_linears(transformer: nn.Module) -> list[str]:
    """Return the paths of the linears every row quantizes: all inside the blocks."""
    found = adapters.layers(transformer, adapters.adapter_for(transformer))
    return [layer.name for layer in found if layer.role != "outside"]


def side_linears(transformer: nn.Module) -> list[str]:
    """Return the paths of those that see one row per image: modulation and embedder; they get max(X, 4) bits, weight only."""
    found = adapters.layers(transformer, adapters.adapter_for(transformer))
    return [layer.name for layer in found if layer.role in ("modulation", "embedder")]


def captured_inputs(work: Path = WORK, model: str = MODEL) -> dict[str, Tensor]:
    """Return up to CAPTURE_ROWS input rows `[rows, in]` per linear of the blocks, from full precision; kept in `work`."""
    path = work / "inputs.safetensors"
    if not path.exists():
        pipeline, _ = load_pipeline(model)
        names = quantized_linears(pipeline.transformer)
        save(capture(pipeline, names, CAPTURE_IMAGES, STEPS), path)
    return load_file(path)


def capture(pipeline, names: list[str], images: int, steps: int) -> dict[str, Tensor]:
    """Return input rows of the named linears while the pipeline samples, equally many from every call, at random."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(0)
    per_call = -(-CAPTURE_ROWS // steps)

    def hook(name: str):
        def collect(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2)
            rows[name].append(x[torch.randperm(len(x), generator=generator)[:per_call]].clone())

        return collect

    handles = [pipeline.transformer.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        generate(pipeline, images, CAPTURE_SEED, steps, GUIDANCE, batch=images, description="inputs of the layers")
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(found) for name, found in rows.items()}


def rel_rmse(reference: nn.Module, candidate: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Return |y - y0| / |y0| of each layer's output without bias on `inputs`, activation quantization included."""
    errors = {}
    with torch.no_grad():
        for name, x in inputs.items():
            first, second = reference.get_submodule(name), candidate.get_submodule(name)
            bias = 0 if first.bias is None else first.bias
            y = first(x)
            errors[name] = float((second(x).float() - y).norm() / (y - bias).norm().clamp_min(1e-30))
    return errors


def mean_rel_rmse(transformer: nn.Module, work: Path = WORK, model: str = MODEL) -> float:
    """Return the mean over all linears of the blocks of their relative output error on captured inputs."""
    errors = rel_rmse(load_pipeline(model)[0].transformer, transformer, captured_inputs(work, model))
    return sum(errors.values()) / len(errors)


def stored_bits(tensors: Iterable[Tensor], weights: int) -> float:
    """Return stored bits per weight: bytes of `tensors` (a subclass counts what it is made of) times 8 over `weights`.

    Tensors that share their memory are counted once: a codebook of all layers is stored once.
    """
    seen: dict[tuple, int] = {}
    for tensor in tensors:
        for part in plain_tensors(tensor):
            # A file holds the values of a view, not the storage around it.
            seen[part.data_ptr(), part.shape, part.dtype] = part.numel() * part.element_size()
    return 8 * sum(seen.values()) / weights


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor subclass is made of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]
    return [plain for part in parts if part is not None for plain in plain_tensors(part)]


def machine() -> dict:
    """Return where a row was made."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def six(value: float) -> float:
    """Round to six significant digits: the last bits depend on the machine."""
    return float(f"{value:.6g}")


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
    os.replace(part, path)


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines; none if it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(rows: list[dict], path: Path) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def collect(folders: list[Path], work: Path = WORK, model: str = MODEL) -> list[dict]:
    """Return the rows of what `peers.py` left in these folders: its facts, and the metrics of its images."""
    reference, features = load_reference(work, model)
    rows = []
    for path in [p for folder in folders for p in sorted(folder.glob("*.safetensors"))]:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["row"])
            images = file.get_tensor("images") if "images" in file.keys() else None  # noqa: SIM118, it is no mapping
        if images is None:
            metrics = {"error": facts.pop("error")}
        elif not torch.isfinite(images).all():
            metrics = {"error": f"{int((~torch.isfinite(images).flatten(1).all(1)).sum())} of {len(images)} images are NaN"}
        else:
            metrics = measure(reference, images, features)
        ends = ("mean_rel_rmse", "seeds", "command", "note", "machine")
        rows.append({k: v for k, v in facts.items() if k not in ends} | metrics | {k: facts[k] for k in ends})
        print(f"{path.parent.name}/{path.stem}: {metrics.get('error') or metrics['psnr']['mean']}", flush=True)
    return rows


def floor(work: Path = WORK) -> list[dict]:
    """Return two rows: full precision against itself, and its images of other seeds against these."""
    import quantdit

    reference, features = load_reference(work)
    other = sample(load_pipeline(MODEL)[0], OTHER_SEEDS)
    command = "python reports/study/measure.py --floor"
    notes = {"full precision": "the reference itself", "noise floor": f"full precision, seeds {OTHER_SEEDS} against {SEEDS}"}
    return [
        row("quantdit", quantdit.__version__, name, "w32a32", 32.0, command=command, note=notes[name], metrics=metrics)
        for name, metrics in {
            "full precision": measure(reference, reference, features),
            "noise floor": measure(reference, other, features),
        }.items()
    ]


def _features(images: Tensor) -> Tensor:
    from quantdit.evaluation.networks.efficientnet import efficientnet_lite0_features

    return efficientnet_lite0_features(images)


def main() -> None:
    """Collect the peers' folders, or measure the noise floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="what peers.py wrote, a folder a peer")
    parser.add_argument("--floor", action="store_true", help="measure full precision with other seeds instead")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK, help="where reference images and layer inputs are kept")
    args = parser.parse_args()
    write_rows(floor(args.work) if args.floor else collect(args.folders, args.work), args.output)


if __name__ == "__main__":
    main()
