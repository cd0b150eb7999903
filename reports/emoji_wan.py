"""The embedded video model, full precision against quantized: the same prompts, the same seeds.

    python reports/emoji_wan.py [--work DIR] [--only "w4a8" "w2a16, codebooks"]

Calibrates emoji-wan to each of RECIPES as `quantdit calibrate --model emoji-wan` does, samples every prompt that it has
the embeddings of with SEEDS, and writes `emoji-wan.json` and `emoji-wan.md`, a sheet of frames and the same clips moving. Beside
the paired error there is what the model is for: the share of clips whose thing moves the way its prompt says
(reports/training/emoji_quality.py). With --work an interrupted run goes on where it was; --only makes the clips of some
recipes there, and leaves the report to a run that has all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

from quantdit.cli import main as quantdit
from quantdit.compiling.report import REPORT
from quantdit.evaluation.metrics.intervals import bootstrap
from quantdit.evaluation.metrics.paired import psnr
from quantdit.evaluation.report.clips import write_clips
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.system import files

HERE = Path(__file__).parent
# PYTHONSAFEPATH, which the Makefile sets, keeps this folder off the path.
sys.path.append(str(HERE / "training"))
from emoji_clips import MOTIONS  # noqa: E402
from emoji_quality import motion_of, share  # noqa: E402

MODEL = "emoji-wan"
RECIPES = {
    "w4a8": ("--bits", "w4a8"),
    "w4a8, trellis": ("--bits", "w4a8", "--weight-format", "trellis"),
    "w4a4": ("--bits", "w4a4"),
    "w3a8": ("--bits", "w3a8"),
    "w2a16": ("--bits", "w2a16"),
    "w2a16, codebooks": ("--bits", "w2a16", "--weight-format", "vq"),
    "w2a16, not trained": ("--bits", "w2a16", "--calibration-steps", "0"),
    "w2a16, level tables": ("--bits", "w2a16", "--weight-format", "table", "--calibration-steps", "0"),
}
SEEDS, STEPS, GUIDANCE, BATCH = (1, 2), 20, 3.0, 8
SHOWN, FRAMES_SHOWN = 8, 8  # prompts, frames of each
CELL, MARGIN, LABEL, LINE = 64, 4, 150, 18


def asked(prompt: str) -> int:
    """Return the place in MOTIONS of what a prompt asks for."""
    return next(m for m, phrases in enumerate(MOTIONS.values()) if prompt.endswith(phrases[0]))


def sampled(model: str, prompts: list[str]) -> torch.Tensor:
    """Return clips `[seeds * prompts, f, 3, h, w]` in [-1, 1], seed by seed."""
    pipeline, _ = load_pipeline(model)
    count = len(prompts)
    return torch.cat(
        [generate(pipeline, count, s, STEPS, GUIDANCE, BATCH, prompts, description=f"{Path(model).name} {s}") for s in SEEDS]
    )


def row_of(clips: torch.Tensor, reference: torch.Tensor, prompts: list[str]) -> dict:
    """Return the figures of one model's clips."""
    wanted = torch.tensor([asked(p) for p in prompts] * len(SEEDS))
    row = {"motion": share(motion_of(clips) == wanted)}
    if clips is not reference:
        decibels = psnr(reference.flatten(1, 2), clips.flatten(1, 2))
        found = bootstrap(decibels.numpy())
        row["psnr"] = {"mean": round(found.estimate, 2), "interval_95": [round(found.low, 2), round(found.high, 2)]}
    return row


def sheet(clips: dict[str, torch.Tensor], prompts: list[str]) -> Image.Image:
    """Draw for each prompt a row of frames of every model, first to last."""
    names = list(clips)
    length = next(iter(clips.values())).shape[1]
    frames = torch.linspace(0, length - 1, FRAMES_SHOWN).round().long()
    block = LINE + len(names) * (CELL + 2) + MARGIN
    paper = Image.new("RGB", (2 * (LABEL + FRAMES_SHOWN * (CELL + 2)) + 3 * MARGIN, -(-len(prompts) // 2) * block), "white")
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(13)
    for i, prompt in enumerate(prompts):
        left, top = MARGIN + i % 2 * (paper.width // 2), i // 2 * block
        draw.text((left, top + 2), prompt, "#1a1a1a", font)
        for r, name in enumerate(names):
            y = top + LINE + r * (CELL + 2)
            draw.text((left, y + CELL // 2 - 8), name, "#555555", font)
            pixels = ((clips[name][i, frames].clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
            for t, frame in enumerate(pixels):
                picture = Image.fromarray(frame.contiguous().numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
                paper.paste(picture, (left + LABEL + t * (CELL + 2), y))
    return paper


def table(report: dict) -> str:
    """Return the figures as a Markdown page."""
    lines = [
        "# The embedded video model, quantized",
        "",
        f"`{MODEL}`, {len(report['prompts'])} prompts x seeds {', '.join(map(str, SEEDS))}, {STEPS} steps, guidance {GUIDANCE:g}."
        " Motion: the share of clips whose thing moves the way its prompt says, measured without a network (95 % interval of"
        " Wilson). PSNR against full precision with the same seeds (95 % bootstrap interval). Made by `make emoji-wan`.",
        "",
        "| | bits a weight | transformer file | calibration | PSNR, dB | motion as asked |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["models"].items():
        least, most = row["motion"]["interval_95"]
        motion = f"{100 * row['motion']['matched']:.1f} % [{100 * least:.1f}, {100 * most:.1f}]"
        cells = [name, "16", f"{row['file_bytes'] / 1e6:.2f} MB", "", "", motion]
        if "psnr" in row:
            mean, (low, high) = row["psnr"]["mean"], row["psnr"]["interval_95"]
            cells[1] = f"{row['bits_per_weight']:.3f}"
            cells[3:5] = [f"{row['seconds']:.0f} s", f"{mean:.2f} [{low:.2f}, {high:.2f}]"]
        lines.append(f"| {' | '.join(cells)} |")
    pictures = "![Frames of eight clips, each in full precision and quantized](pictures/emoji-wan.png)"
    return "\n".join([*lines, "", pictures, "", "![The same clips moving](pictures/emoji-wan.webp)", ""])


def clips_of(recipe: str, prompts: list[str], work: Path) -> tuple[torch.Tensor, dict]:
    """Calibrate by a recipe and sample; returns the clips and the calibration's report, which `work` keeps."""
    output = work / recipe.replace(", ", "-").replace(" ", "-")
    kept = output.with_suffix(".safetensors")
    if not kept.exists():
        arguments = ["calibrate", "--model", MODEL, *RECIPES[recipe], "--output", str(output), "--resume"]
        if quantdit(arguments):
            raise SystemExit(f"{recipe}: calibration failed")
        save_file({"clips": sampled(str(output), prompts)}, kept)
    return load_file(kept)["clips"], files.read_json(output / REPORT)


def main() -> None:
    """Make all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep calibrated folders and clips here, and take what is here already")
    parser.add_argument("--only", nargs="+", choices=RECIPES, metavar="RECIPE", help="with --work: make these, no report")
    args = parser.parse_args()
    if args.only and not args.work:
        parser.error("--only needs --work, where what it makes is kept")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        pipeline, source = load_pipeline(MODEL)
        prompts = list(pipeline.prompts)
        made = {recipe: clips_of(recipe, prompts, work) for recipe in args.only or RECIPES}
    if not args.only:
        stored = sum(path.stat().st_size for path in source.folder_of("transformer").glob("*.safetensors"))
        write(prompts, stored, made)


def write(prompts: list[str], stored: int, made: dict[str, tuple[torch.Tensor, dict]]) -> None:
    """Write the report and the pictures; `stored`: bytes of the transformer in full precision."""
    reference = sampled(MODEL, prompts)
    models = {"full precision": {"file_bytes": stored, **row_of(reference, reference, prompts)}}
    clips = {"full precision": reference}
    for recipe, (sample, calibration) in made.items():
        clips[recipe] = sample
        models[recipe] = {
            "bits_per_weight": calibration["size"]["bits_per_weight"],
            "file_bytes": calibration["size"]["file_bytes"],
            "seconds": sum(calibration["seconds"].values()),
            **row_of(sample, reference, prompts),
        }
    report = {"prompts": prompts, "seeds": SEEDS, "steps": STEPS, "guidance": GUIDANCE, "models": models}
    (HERE / "emoji-wan.json").write_text(json.dumps(report, indent=2) + "\n")
    (HERE / "emoji-wan.md").write_text(table(report))
    chosen = sorted(range(len(prompts)), key=lambda i: asked(prompts[i]))[:: max(1, len(prompts) // SHOWN)][:SHOWN]
    shown = {name: of[chosen] for name, of in clips.items()}
    names = [prompts[i] for i in chosen]
    (HERE / "pictures").mkdir(exist_ok=True)
    sheet(shown, names).save(HERE / "pictures" / "emoji-wan.png", optimize=True)
    moving = torch.cat([torch.stack([of[i] for of in shown.values()]) for i in range(len(names))])
    labels = [f"{name}" if j else prompt for prompt in names for j, name in enumerate(shown)]
    write_clips(moving, labels, HERE / "pictures" / "emoji-wan.webp", columns=2 * len(shown))
    print(table(report))


if __name__ == "__main__":
    main()
