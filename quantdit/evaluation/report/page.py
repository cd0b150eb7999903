"""The report as one HTML file that needs no network: verdict, pictures worst first, measures, trajectory, layers, provenance."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quantdit.evaluation.formatting import number
from quantdit.evaluation.gate.judge import COLUMNS, NOTE, Finding, Verdict, headline, worst_first
from quantdit.evaluation.metrics.table import METRICS, READING
from quantdit.evaluation.report.charts import bar_chart, interval_chart, line_chart
from quantdit.evaluation.report.picture import GAIN
from quantdit.evaluation.samples import Samples

TEMPLATE = Path(__file__).with_name("page.html")
NO_VERDICT = '<div class="verdict">No verdict yet: <code>quantdit gate report.json --baseline FILE.json</code> adds it.</div>'
SHOWN = 24  # samples at most
LARGEST = 384  # pixels of the longer side of a picture in the file


def write(path: Path, report: dict, reference: Samples, candidate: Samples) -> None:
    """Write the page of a report (`report.json`'s content) and the two models' samples; complete or not at all."""
    _write(path, render(report, reference, candidate))


def render(report: dict, reference: Samples, candidate: Samples) -> str:
    """Return the page, without a verdict yet."""
    clips = reference.images.ndim == 5
    names = [html.escape(str(report[side]["name"])) for side in ("candidate", "reference")]
    rows = report["samples"]
    order = sorted(range(len(rows)), key=lambda i: rows[i]["psnr"])[:SHOWN]
    sampling = report["sampling"]
    frames, _, height, width = (1, *reference.images.shape[1:]) if not clips else reference.images.shape[1:]
    guidance = "the pipeline's" if sampling["guidance"] is None else f"{sampling['guidance']:g}"
    content = {
        "title": f"{names[0]} against {names[1]}",
        "subtitle": f"{len(rows)} {'clips' if clips else 'images'} of {len(sampling['prompts'])} prompts or classes,"
        f" seed {sampling['seed']}, {sampling['steps']} steps, guidance {guidance};"
        f" features: {html.escape(report['identity']['backbone'])}",
        "verdict": NO_VERDICT,
        "tiles": _tiles(report),
        "things": "Clips" if clips else "Images",
        "gallery_note": f"The {len(order)} lowest PSNRs of {len(rows)}. Difference times {GAIN}, black for none. A picture opens"
        " a comparison with a slider: arrow keys move it.",
        "playing": "" if clips else "hidden",
        "last_frame": str(frames - 1),
        "frames": str(frames),
        "aspect": f"{width} / {height}",
        "stack": f"{frames * 100}%",
        "gallery": "\n".join(_figure(rows[i], reference.images[i], candidate.images[i]) for i in order),
        "reading": html.escape(READING),
        "measures": _measures(report),
        "vbench": _vbench(report),
        "trajectory": _trajectory(report),
        "layers": _layers(report),
        "provenance": _provenance(report),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(content)


def add_verdict(path: Path, verdict: Verdict) -> bool:
    """Put the gate's verdict on top of a page and its intervals into the table of measures; returns False without a page."""
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8")
    for part, content in (("verdict", _banner(verdict)), ("measures", _findings(verdict))):
        begin, end = f"<!--{part}-->", f"<!--/{part}-->"
        text = re.sub(f"{begin}.*?{end}", lambda _, c=f"{begin}\n{content}\n{end}": c, text, count=1, flags=re.DOTALL)
    _write(path, text)
    return True


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _banner(verdict: Verdict) -> str:
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in verdict.notes)
    return (
        f'<div class="verdict {verdict.verdict}" role="status"><strong>{verdict.verdict.upper()}</strong>'
        f"{html.escape(headline(verdict))}{notes}</div>"
    )


def _findings(verdict: Verdict) -> str:
    head = (*COLUMNS[:5], "against its limit", *COLUMNS[5:])
    rows = [_finding(f) for f in worst_first(verdict)]
    cells = "".join(f"<th scope='col'>{h}</th>" for h in head)
    note = f"<p class='soft'>{NOTE} The dashed line is the limit, the grey line zero.</p>"
    return f"<div class='scroll'><table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"


def _finding(f: Finding) -> str:
    d = f.difference
    name, verdict, *figures, limit, floor, seeds = (html.escape(cell) for cell in f.cells())
    chart = interval_chart(d.estimate, d.low, d.high, f.limit, f.lowest)
    cells = [f"<th scope='row'>{name}</th>", f"<td class='{f.verdict}'>{verdict}</td>"]
    cells += [f"<td>{cell}</td>" for cell in (*figures, chart, limit, floor, seeds)]
    note = f"<tr><td class='note' colspan='{len(cells)}'>{html.escape(f.note)}</td></tr>" if f.note else ""
    return f"<tr>{''.join(cells)}</tr>{note}"


def _tiles(report: dict) -> str:
    first, second, drift = report["reference"], report["candidate"], report["drift"]
    low, high = drift["PSNR"]["interval"]
    tiles = [
        ("paired PSNR, dB", f"{drift['PSNR']['mean']:.2f}", f"[{low:.2f}, {high:.2f}], min {drift['PSNR']['min']:.2f}"),
        ("SSIM", f"{drift['SSIM']['mean']:.4f}", f"[{drift['SSIM']['interval'][0]:.4f}, {drift['SSIM']['interval'][1]:.4f}]"),
        (
            "transformer file",
            f"{second['file_bytes'] / 1e6:.2f} MB",
            f"{second['bits_per_weight']:.2f} bits a weight; was {first['file_bytes'] / 1e6:.2f} MB",
        ),
    ]
    if report["probe"]["samples"]:
        error = np.mean([row["output_error"] for row in report["probe"]["samples"]])
        tiles.append(("transformer's output error", f"{error:.1f} dB", "on the reference's own inputs"))
    for name, entry in list(report["sets"].items())[:1]:
        tiles.append((name, f"{entry['drift']:.4g}", f"other seeds: {entry['noise_floor']:.4g}"))
    return "".join(
        f"<div class='tile'><span class='soft'>{html.escape(what)}</span><b>{value}</b>"
        f"<span class='soft'>{html.escape(more)}</span></div>"
        for what, value, more in tiles
    )


def _figure(row: dict, reference: Tensor, candidate: Tensor) -> str:
    name = html.escape(f"{row['prompt']}, seed {row['seed']}")
    difference = (reference - candidate).abs() * GAIN - 1
    titles = ("full precision", "quantized", f"difference x {GAIN}")
    shots = []
    for title, picture in zip(titles, (reference, candidate, difference), strict=True):
        image = f"<span class='shot' style=\"background-image:url('{_data_uri(picture)}')\"></span>"
        what = f"<span class='what'>{title}</span>"
        if title.startswith("difference"):
            shots.append(f"<div>{image}{what}</div>")
        else:
            shots.append(f"<button class='open' aria-label='Compare {name}: {title}'>{image}{what}</button>")
    caption = f"<b>{name}</b><br>PSNR {row['psnr']:.1f} dB, SSIM {row['ssim']:.4f}, perceptual distance {row['perceptual']:.4f}"
    return f"<figure><div class='row'>{''.join(shots)}</div><figcaption>{caption}</figcaption></figure>"


def _data_uri(picture: Tensor) -> str:
    """Return an image `[c, h, w]`, or the frames of a clip one above the other, as WebP without loss."""
    frames = picture if picture.ndim == 4 else picture[None]
    if max(frames.shape[-2:]) > LARGEST:
        scale = LARGEST / max(frames.shape[-2:])
        frames = torch.nn.functional.interpolate(frames, scale_factor=scale, mode="area")
    pixels = ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).flatten(0, 1)
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _measures(report: dict) -> str:
    """Return the table of measures, every figure in the measure's own unit."""
    rows = (*report["samples"], *report["probe"]["samples"])
    lines = []
    for name, metric in METRICS.items():
        values = [row[f"{name}_candidate" if metric.equal else name] for row in rows if name in row]
        if not values:
            continue
        full = [row[f"{name}_reference"] for row in rows if metric.equal and name in row]
        floors = {kind: entry[name]["mean"] for kind, entry in report["floor"].items() if name in entry}
        lines.append(
            (
                metric.label,
                number(float(np.mean(values)), metric.unit),
                number(float(np.mean(full)), metric.unit) if full else "",
                f"{number(min(values))} to {number(max(values))}",
                ", ".join(f"{kind} {number(mean, metric.unit)}" for kind, mean in floors.items()),
            )
        )
    lines += [
        (n, f"{number(e['drift'])} ± {number(e['standard_error'])}", "", "", f"other seeds {number(e['noise_floor'])}")
        for n, e in report["sets"].items()
    ]
    head = ("measure", "candidate", "full precision", "range of the candidate's samples", "full precision against itself")
    return _table(head, lines)


def _vbench(report: dict) -> str:
    """Return VBench's own scores, which the gate does not judge."""
    sides = [report.get("vbench", {}).get(side, {}) for side in ("reference", "candidate")]
    lines = [(name.replace("_", " "), *(number(side[name]) for side in sides)) for name in sides[0]]
    return f"<h3>VBench</h3>{_table(('dimension', 'full precision', 'quantized'), lines)}" if lines else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th scope='col'>{html.escape(h)}</th>" for h in head)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(line[0])}</th>{''.join(f'<td>{html.escape(c)}</td>' for c in line[1:])}</tr>"
        for line in lines
    )
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _trajectory(report: dict) -> str:
    steps, probe = report["over_steps"], report["probe"]
    lines = {"median sample": steps["median"], "highest decile": steps["highest_decile"]}
    parts = ["<h3>How far the samples part</h3>"]
    parts.append(line_chart("distance of the two models' latents", steps["timesteps"], lines, "timestep", "relative distance"))
    if probe["samples"]:
        table = np.array(probe["by_timestep"])
        lines = {"mean": table.mean(0).tolist(), "worst sample": table.max(0).tolist()}
        parts.append("<h3>Error of the transformer's output on the reference's inputs</h3>")
        parts.append(line_chart("error of the transformer's output", probe["timesteps"], lines, "timestep", "dB"))
    return "".join(parts)


def _layers(report: dict) -> str:
    sizes, errors = report["layers"], report["probe"]["layers"]
    parts = []
    if errors:
        names = list(errors)
        means = [float(np.mean(errors[name])) for name in names]
        kinds = [sizes.get(name, {}).get("format", "dense") for name in names]
        parts.append("<h3>Error of each layer alone, on the reference's inputs</h3>")
        parts.append(bar_chart("error of each layer", names, means, kinds, "dB"))
        worst = sorted(zip(names, means, kinds, strict=True), key=lambda item: -item[1])[:10]
        lines = [(n, f"{v:.2f} dB", k, f"{sizes.get(n, {}).get('bits', 0):.3f}") for n, v, k in worst]
        parts.append(_table(("ten worst layers", "error", "format", "bits a weight"), lines))
    if sizes:
        names = list(sizes)
        stored = [sizes[n]["bits"] * sizes[n]["weights"] / 8 / 1000 for n in names]
        parts.append("<h3>Size</h3>")
        parts.append(bar_chart("stored size of each layer", names, stored, [sizes[n]["format"] for n in names], "kB", base=0.0))
    return "".join(parts) or "<p>The candidate has no quantized layers.</p>"


def _provenance(report: dict) -> str:
    blocks = {
        "Recipe of the candidate": report.get("recipe"),
        "Sampling": report["sampling"],
        "Versions": report["versions"] | report["identity"],
    }
    return "".join(
        f"<details><summary>{name}</summary><pre>{html.escape(json.dumps(content, indent=2))}</pre></details>"
        for name, content in blocks.items()
        if content
    )
