"""Measure `emoji-wan`: the share of clips whose thing moves the way its prompt says.

The motion is measured, not learned. What differs from the background gives the thing's centroid and size in every frame; turning
it about its centroid until it matches the next frame gives the angle between them. Each of the eight motions then has a score
that is about 1 for a clip that training would show of it and 0 for a thing at rest; the largest one, if above a half, is the
motion of the clip. The same measure of scripted clips says how far it can be trusted (`scripted` in the report).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from scipy.stats import binomtest

from emoji_clips import FRAMES, MOTIONS, THINGS, caption, held_out, read_archives, render

LEAST_SCORE = 0.5
LEAST_CONTRAST = 0.12  # of the data range 2; what generated backgrounds stay below
ANGLES, RADII = 64, 8
WAY, LEAP, SWELLING, TURN = 14.0, 10.0, math.log(3.0), 2 * math.pi * (FRAMES - 1) / FRAMES  # means of emoji_clips.paths


def foreground(clips: torch.Tensor) -> torch.Tensor:
    """Return how much each pixel stands out from its row's background, `[n, f, h, w]`, of clips `[n, f, 3, h, w]` in [-1, 1]."""
    # The background does not move and changes from row to row only; the outer columns show it most of the time.
    edges = torch.cat([clips[..., :3], clips[..., -3:]], -1).transpose(1, 3)  # [n, h, 3, f, 6]
    background = edges.flatten(3).median(-1).values.transpose(1, 2)[:, None, ..., None]
    return ((clips - background).abs().mean(2) - LEAST_CONTRAST).clamp_min(0)


def centroid_and_size(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centroid `[n, f, 2]` (x, y) and the root mean square radius `[n, f]` of a weight `[n, f, h, w]`, in pixels."""
    total = weight.sum((-2, -1)).clamp_min(1e-6)
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in weight.shape[-2:]), indexing="ij")
    centre = torch.stack([(weight * axis).sum((-2, -1)) / total for axis in (x, y)], -1)
    square = (x - centre[..., 0, None, None]) ** 2 + (y - centre[..., 1, None, None]) ** 2
    return centre, ((weight * square).sum((-2, -1)) / total).sqrt()


def turned(clips: torch.Tensor, weight: torch.Tensor, centre: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return by how many radians the thing turns clockwise from each frame to the next, `[n, f - 1]`, at most a quarter turn."""
    n, f, _, height, width = clips.shape
    angle = torch.arange(ANGLES) * (2 * math.pi / ANGLES)
    ring = torch.stack([angle.cos(), angle.sin()], -1) * (torch.arange(1, RADII + 1)[:, None, None] / RADII)
    # Rings reach a little beyond the root mean square radius of the thing in the middle of the clip.
    radius = 1.5 * size.median(1).values[:, None, None, None, None]
    place = (centre[:, :, None, None] + radius * ring) * 2 / torch.tensor([width, height]) - 1
    seen = (clips * (weight[:, :, None] > 0)).flatten(0, 1)
    polar = torch.nn.functional.grid_sample(seen, place.flatten(0, 1), align_corners=False).unflatten(0, (n, f))
    spectrum = torch.fft.rfft(polar - polar.mean(-1, keepdim=True))
    match = torch.fft.irfft((spectrum[:, 1:] * spectrum[:, :-1].conj()).sum((2, 3)), n=ANGLES)
    quarter = ANGLES // 4
    near = torch.cat([match[..., -quarter:], match[..., : quarter + 1]], -1)
    return (near.argmax(-1) - quarter) * (2 * math.pi / ANGLES)


def scores(clips: torch.Tensor) -> torch.Tensor:
    """Return the score of each of MOTIONS for clips `[n, f, 3, h, w]` in [-1, 1], as `[n, 8]`."""
    weight = foreground(clips)
    centre, size = centroid_and_size(weight)
    t = torch.linspace(0, 1, clips.shape[1])
    line = (t - 0.5) / (t - 0.5).square().sum()
    x, y = (centre * line[:, None]).sum(1).unbind(-1)
    swelling = (size.clamp_min(0.5).log() * line).sum(1)
    arc = torch.sin(2 * math.pi * t).abs()
    arc = (arc - arc.mean()) / (arc - arc.mean()).square().sum()
    leap = -(centre[..., 1] * arc).sum(1)
    turn = turned(clips, weight, centre, size).sum(1)
    table = {
        "left": -x / WAY,
        "right": x / WAY,
        "up": -y / WAY,
        "down": y / WAY,
        "spin": turn / TURN,
        "bounce": leap / LEAP,
        "grow": swelling / SWELLING,
        "shrink": -swelling / SWELLING,
    }
    return torch.stack([table[name] for name in MOTIONS], -1)


def motion_of(clips: torch.Tensor) -> torch.Tensor:
    """Return the place in MOTIONS of what each clip `[n, f, 3, h, w]` shows, -1 for none, as `[n]`."""
    best = scores(clips).max(-1)
    return torch.where(best.values > LEAST_SCORE, best.indices, -1)


def share(hits: torch.Tensor) -> dict[str, object]:
    """Return the share of true entries, with the 95 % interval of Wilson."""
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    bounds = [round(interval.low, 4), round(interval.high, 4)]
    return {"clips": len(hits), "matched": round(float(hits.float().mean()), 4), "interval_95": bounds}


def report_of(found: torch.Tensor, pairs: torch.Tensor) -> dict[str, object]:
    """Compare the motions found `[n]` with those asked for in pairs (thing, motion) `[n, 2]`, in all, by motion, by pair."""
    hits = found == pairs[:, 1]
    names = [*MOTIONS, "none"]
    mistaken = {}
    for m, name in enumerate(MOTIONS):
        seen = found[(pairs[:, 1] == m) & ~hits].tolist()
        mistaken[name] = {names[s]: seen.count(s) for s in sorted(set(seen))}
    unseen = torch.tensor([held_out(*pair) for pair in pairs.tolist()])
    return {
        **share(hits),
        "per_motion": {name: share(hits[pairs[:, 1] == m]) for m, name in enumerate(MOTIONS)},
        "pairs_seen_in_training": share(hits[~unseen]),
        "pairs_held_out": share(hits[unseen]),
        "mistaken_for": {name: counts for name, counts in mistaken.items() if counts},
    }


def main() -> None:
    """Sample every thing in every motion, measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-wan")
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives that emoji_clips.ARCHIVES names")
    parser.add_argument("--things", type=int, default=len(THINGS), help="how many of the things, evenly spread")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("reports/emoji-wan-quality.json"))
    args = parser.parse_args()
    from quantdit.pipelines.generate import generate
    from quantdit.pipelines.pipeline import load_pipeline

    labels, sprites = read_archives(args.data)
    things = [i * len(THINGS) // args.things for i in range(args.things)]
    pairs = torch.tensor([(thing, m) for thing in things for m in range(len(MOTIONS))])
    phrases = [phrases[0] for phrases in MOTIONS.values()]
    prompts = [caption(labels[thing], phrases[m]) for thing, m in pairs.tolist()]
    pipeline, source = load_pipeline(args.model)
    clips = generate(pipeline, len(pairs), args.seed, args.steps, args.guidance, batch=8, prompts=prompts)
    scripted = render(sprites[pairs[:, 0]], pairs[:, 1], torch.Generator().manual_seed(args.seed)).transpose(1, 2)
    report = {
        "model": source.label,
        "seed": args.seed,
        "guidance": args.guidance,
        "steps": args.steps,
        "generated": report_of(motion_of(clips), pairs),
        "scripted": report_of(motion_of(scripted), pairs),
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
