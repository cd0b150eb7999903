"""report.md: the report's tables as Markdown that is readable as plain text, too."""

from __future__ import annotations

from quantdit.evaluation.formatting import markdown_table, number
from quantdit.evaluation.metrics.table import READING


def summary(report: dict, frechet: str, kernel: str) -> str:
    """Return the tables of a report (`report.json`'s content).

    Args:
        report: of `evaluate`.
        frechet: name of the Frechet distance in it.
        kernel: name of the kernel distance.
    """
    first, second = report["reference"], report["candidate"]
    rows = [
        ("", first["name"], second["name"]),
        ("transformer file", *(f"{m['file_bytes'] / 1e6:.2f} MB" for m in (first, second))),
        ("bits per weight, scales included", *(f"{m['bits_per_weight']:.2f}" for m in (first, second))),
    ]
    parts = ["\n".join(markdown_table(rows)), _drift_table(report["drift"], frechet, kernel)]
    if "step_plan" in report:
        parts.append(_step_plan_table(report["step_plan"]))
    if given := _given(report):
        parts.append("\n".join(markdown_table([("by the networks given", first["name"], second["name"]), *given])))
    probed = report["probe"]
    if probed["samples"]:
        error = sum(row["output_error"] for row in probed["samples"]) / len(probed["samples"])
        line = f"Error of the transformer's output on the reference's inputs: {error:.1f} dB"
        if probed["layers"]:
            mean = {name: sum(values) / len(values) for name, values in probed["layers"].items()}
            worst = max(mean, key=lambda name: mean[name])
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
            rows.append((name, f"{number(entry['noise_floor'])} (other seeds)", number(entry["drift"])))
    first, second = (report.get("vbench", {}).get(side, {}) for side in ("reference", "candidate"))
    return rows + [(f"VBench {name}", number(value), number(second[name])) for name, value in first.items()]


def _step_plan_table(found: dict) -> str:
    """Return what the step plan is worth, beside as many computed steps spent otherwise."""
    rows = [("at equal compute", "steps computed", "PSNR to the reference, dB")]
    for row in found["rows"]:
        low, high = row["PSNR"]["interval"]
        rows.append((row["what"], f"{row['computed']} of {found['of']}", f"{row['PSNR']['mean']:.2f} [{low:.2f}, {high:.2f}]"))
    plans = "; ".join(f"{part}: {plan}" for part, plan in found["plans"].items())
    return "\n".join([*markdown_table(rows), "", f"Step plan of {plans}."])


def _drift_table(drift: dict, frechet: str, kernel: str) -> str:
    """Return the paired measures and the distances of the sets, beside those of other seeds."""
    psnr, ssim, fd, kid = (drift[name] for name in ("PSNR", "SSIM", frechet, kernel))
    same = f", {psnr['identical']} identical" if psnr["identical"] else ""
    low, high = psnr["interval"]
    ssim_low, ssim_high = ssim["interval"]
    rows = [
        (f"{drift['count']} {drift['of']}", "drift", "other seeds"),
        ("PSNR, dB", f"{psnr['mean']:.2f} [{low:.2f}, {high:.2f}], min {psnr['min']:.2f}{same}", ""),
        ("SSIM", f"{ssim['mean']:.4f} [{ssim_low:.4f}, {ssim_high:.4f}]", ""),
        (frechet, f"{fd['drift']:.2f}", f"{fd['noise_floor']:.2f}"),
        (kernel, *(f"{kid[of]['mean']:.5f} ± {kid[of]['standard_error']:.5f}" for of in ("drift", "noise_floor"))),
    ]
    if "reference_to_real" in fd:
        to_real = f"{fd['candidate_to_real']:.2f}", f"{fd['reference_to_real']:.2f} (reference)"
        rows.append((f"{frechet} to real images", *to_real))
    note = f"[a, b]: {drift['interval_level']:.0%} bootstrap interval."
    note += " ±: standard error. Other seeds: the reference against itself."
    if drift["of"] == "clips":
        note += f" PSNR is of whole clips, SSIM the mean over frames; {frechet} and {kernel} are of each clip's middle frame."
    return "\n".join([*markdown_table(rows), "", note])
