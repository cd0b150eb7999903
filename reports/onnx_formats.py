"""Export models of five classes in seven recipes and write how far each graph is from PyTorch: `make onnx-formats`.

The embedded models also sample from their graphs: paired PSNR against the pictures and clips that PyTorch makes of the same
checkpoint. Weights are quantized without data, or with very little where a recipe needs some, which makes no difference to what
is compared here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.evaluation.metrics.paired import capped, psnr
from quantdit.evaluation.samples import as_images
from quantdit.exporters.onnx_session import use_graph
from quantdit.exporters.to_onnx import to_onnx
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits, with_weight_format
from quantdit.recipes.rules import Recipe, Rule
from quantdit.recipes.sampling_plan import SamplingPlan

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests" / "models"))
import tiny_models  # noqa: E402

OUTPUT = HERE / "onnx-formats.json"
EMBEDDED = {"fashion-dit": (16, 20), "emoji-wan": (4, 10)}  # samples, steps
RANK = "w4a8 rotated, rank 8"
NO_DATA, LITTLE = SamplingPlan(samples=0), SamplingPlan(samples=2, steps=2)
CLASSES = ("FluxTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel")
SEED = 1


def recipes() -> dict[str, Recipe]:
    """Return what is exported: presets, and w4a8 with other last rules."""
    *before, last = from_bits("w4a8").to_dict()["rule"]

    def other(name: str, **changes: object) -> Recipe:
        return Recipe(name, tuple(Rule(**rule) for rule in (*before, last | changes)))

    return {
        "w8a8": from_bits("w8a8"),
        "w4a8": from_bits("w4a8"),
        "w4a16": from_bits("w4a16"),
        "w2a16 vq256x4": with_weight_format(from_bits("w2a16"), "vq"),
        "w4a8 twin-log": other("twin-log", table="twin-log"),
        "w3a8 trellis3_l12": with_weight_format(from_bits("w3a8"), "trellis"),
        RANK: other("low-rank", weight="int4", low_rank=8, method="rtn"),
    }


def models(folder: Path) -> dict[str, str]:
    """Return models by name: the embedded ones, and tiny random ones of other classes, written to the folder."""
    found = {name: name for name in EMBEDDED}
    for name in CLASSES:
        tiny_models.tiny(name)[0].save_pretrained(folder / name)
        found[f"tiny {name}"] = str(folder / name)
    return found


def paired_psnr(folder: Path, graph: Path, count: int, steps: int) -> tuple[float, float]:
    """Return mean and least PSNR in dB of samples from the graph against PyTorch's, same seeds."""
    pipeline, source = load_pipeline(str(folder))
    expected = generate(pipeline, count, SEED, steps)
    use_graph(pipeline, source, graph)
    decibels = capped(psnr(as_images(expected), as_images(generate(pipeline, count, SEED, steps))))
    return float(decibels.mean()), float(decibels.min())


def row(name: str, model: str, plan: str, folder: Path) -> dict:
    """Quantize, export, compare."""
    made, graph = folder / "made", folder / "graph.onnx"
    pipeline, source = load_pipeline(model)
    compile(pipeline, source, Plan(recipes()[plan], LITTLE if plan == RANK else NO_DATA), made, overwrite=True)
    graph.unlink(missing_ok=True)
    content = to_onnx(made, graph)
    found = content["verified"]
    result = {"model": name, "recipe": plan, "dynamic": content["dynamic"], "bytes": graph.stat().st_size}
    result |= {key: found[key] for key in ("rel_rmse", "parts_rel_rmse", "ties", "onnxruntime", "torch")}
    if name in EMBEDDED:
        result["psnr_mean"], result["psnr_least"] = (round(v, 2) for v in paired_psnr(made, graph, *EMBEDDED[name]))
    return result


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table."""
    first = rows[0]
    lines = [
        "# Exported graphs and PyTorch",
        "",
        f"ONNX Runtime {first['onnxruntime']}, torch {first['torch']}, on a CPU, seed {SEED}. Made by `make onnx-formats`.",
        "",
        "Whole: rel_rmse of the transformer's output over two sampler calls. Ties: what PyTorch's own output moves when its",
        "inputs change by one part in a million, because 8-bit activations then round otherwise. Parts: the worst of all",
        "quantized layers and of what lies between them, on PyTorch's own values. PSNR: samples against PyTorch's.",
        "",
        "| model | recipe | whole | ties | parts | PSNR, dB: mean, least | may vary | file, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        decibels = f"{r['psnr_mean']:.1f}, {r['psnr_least']:.1f}" if "psnr_mean" in r else ""
        errors = " | ".join(f"{r[key]:.1e}" for key in ("rel_rmse", "ties", "parts_rel_rmse"))
        varying = ", ".join(r["dynamic"]) or "nothing"
        lines.append(f"| {r['model']} | {r['recipe']} | {errors} | {decibels} | {varying} | {r['bytes'] / 1e6:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the figures and the table; rows that are there are kept."""
    rows = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else []
    done = {(r["model"], r["recipe"]) for r in rows}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models(Path(scratch)).items():
            for plan in recipes():
                if (name, plan) in done:
                    continue
                rows.append(row(name, model, plan, Path(scratch)))
                print(json.dumps(rows[-1]), flush=True)
                OUTPUT.write_text(json.dumps(rows, indent=1) + "\n")
                OUTPUT.with_suffix(".md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
