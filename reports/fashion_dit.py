"""Make `reports/fashion-dit.md`, `.json` and the pictures: the embedded model at several bit widths, with its noise floor.

Run `make study`. Every row calibrates with seed 0 and compares 128 images of seed 1 (20 Euler steps, guidance 2) with full
precision through the same code; the noise floor is full precision against itself with the seeds of seed 2.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from quantdit import recipe
from quantdit.compiler import Settings, calibrate
from quantdit.evaluation.run import compare_models, sample_reference
from quantdit.pipeline import load_pipeline

HERE = Path(__file__).parent
SAMPLES, SEED, STEPS, GUIDANCE = 128, 1, 20, 2.0


def recipes() -> list[recipe.Recipe]:
    """Presets, and round-to-nearest where it says what error feedback is worth."""
    rows = [recipe.from_bits(bits) for bits in ("w8a8", "w6a8", "w4a8", "w4a16", "w3a16", "w2a16")]
    for bits in ("w4a8", "w3a16"):
        preset = recipe.from_bits(bits)
        rows.append(recipe.Recipe(f"{bits}-rtn", tuple(replace(rule, method="rtn") for rule in preset.rules)))
    return rows


def main() -> None:
    """Calibrate and compare every recipe; write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quantdit-study")
    args = parser.parse_args()
    reference = sample_reference("fashion-dit", SAMPLES, SEED, STEPS, GUIDANCE)
    rows = []
    for entry in recipes():
        folder = args.work / f"fashion-dit-{entry.name}"
        pipeline, source = load_pipeline("fashion-dit")
        report = calibrate(pipeline, source, entry, folder, Settings(guidance=GUIDANCE), overwrite=True)
        result = compare_models(reference, *load_pipeline(str(folder)), HERE / "pictures" / f"fashion-dit-{entry.name}.png")
        errors = [layer["rel_rmse"] for layer in report["layers"].values()]
        mean_error = round(sum(errors) / len(errors), 5)
        rows.append({"recipe": entry.name, "mean_rel_rmse": mean_error, "seconds": report["seconds"], **result})
    (HERE / "fashion-dit.json").write_text(json.dumps(rows, indent=2) + "\n")
    (HERE / "fashion-dit.md").write_text(_markdown(rows))


def _markdown(rows: list[dict]) -> str:
    lines = [
        "# fashion-dit: size and drift per recipe",
        "",
        f"{SAMPLES} images, seed {SEED}, {STEPS} Euler steps, guidance {GUIDANCE}; calibration seed 0. Made by `make study`.",
        "",
        "| recipe | MB | bits per weight | mean rel_rmse | PSNR, dB | worst image | SSIM | FD-EffNetLite0 | KID-EffNetLite0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        drift = row["drift"]
        psnr, ssim, fd, kid = drift["PSNR"], drift["SSIM"], drift["FD-EffNetLite0"], drift["KID-EffNetLite0"]
        low, high = psnr["interval"]
        lines.append(
            f"| {row['recipe']} | {row['candidate']['file_bytes'] / 1e6:.2f} | {row['candidate']['bits_per_weight']:.3f}"
            f" | {row['mean_rel_rmse']:.4f} | {psnr['mean']:.1f} [{low:.1f}, {high:.1f}] | {psnr['min']:.1f} | {ssim['mean']:.4f}"
            f" | {fd['drift']:.1f} | {kid['drift']['mean']:.5f} ± {kid['drift']['standard_error']:.5f} |"
        )
    fd, kid = rows[0]["drift"]["FD-EffNetLite0"], rows[0]["drift"]["KID-EffNetLite0"]
    floor = f"{kid['noise_floor']['mean']:.5f} ± {kid['noise_floor']['standard_error']:.5f}"
    reference = rows[0]["reference"]
    return "\n".join(
        [
            *lines,
            f"| noise floor | {reference['file_bytes'] / 1e6:.2f} | {reference['bits_per_weight']:.3f} | | | | |"
            f" {fd['noise_floor']:.1f} | {floor} |",
            "",
            "Noise floor: full precision against itself with other seeds. Bits per weight: stored bytes of quantized linears,",
            "scales, tables and rotation signs included. FD and KID are on EfficientNet-Lite0 features, not Inception.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
