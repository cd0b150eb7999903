"""Clips of one emoji doing one thing, made to order: the data of `emoji-wan` and the words of its prompts.

A sprite of the npm package `@iconify-json/noto` (Google's Noto Emoji, Apache-2.0), drawn by PyPI's `resvg-py`, moves over a soft
gradient in one of eight ways. Its name comes from the npm package `emojibase-data` (MIT). Nothing of either is stored here;
`npm pack @iconify-json/noto@1.2.9 emojibase-data@17.0.0` fetches the two archives, and ARCHIVES pins their bytes.

    clip = background (1 - alpha) + sprite colour,   sprite placed by centre(t), size(t), angle(t) of its motion

Each thing has one motion that training never shows with it (`held_out`), so that the two words can be seen to combine.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from pathlib import Path

import torch

FRAMES, SIZE = 16, 32
SPRITE = 48  # pixels across of the drawn sprite; on screen it is 7 to 22
OVERSAMPLE = 2

ARCHIVES = {
    "iconify-json-noto-1.2.9.tgz": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "emojibase-data-17.0.0.tgz": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}

# Motion -> the ways a prompt says it; the first is the one that demos and scores use.
MOTIONS = {
    "left": ("moving left", "moves to the left"),
    "right": ("moving right", "moves to the right"),
    "up": ("moving up", "moves upwards"),
    "down": ("moving down", "moves downwards"),
    "spin": ("spinning", "turning around"),
    "bounce": ("bouncing", "jumping up and down"),
    "grow": ("growing", "getting bigger"),
    "shrink": ("shrinking", "getting smaller"),
}

# Names of the noto set: single things that stay recognisable at 16 pixels and look unlike each other.
_ANIMALS = ("bat", "fox", "frog", "penguin", "octopus", "tropical-fish")
_FOOD = ("red-apple", "banana", "carrot", "mushroom")
_OBJECTS = ("rocket", "automobile", "soccer-ball", "balloon", "ghost", "sunflower")
THINGS = (*_ANIMALS, *_FOOD, *_OBJECTS)


def held_out(thing: int, motion: int) -> bool:
    """Tell whether training leaves out this pair of places in THINGS and MOTIONS."""
    return thing % len(MOTIONS) == motion


def caption(label: str, phrase: str) -> str:
    """Return "a bat moving left"; "an" before a vowel."""
    return f"{'an' if label[0] in 'aeio' else 'a'} {label} {phrase}"


def read_archives(folder: Path) -> tuple[list[str], torch.Tensor]:
    """Return the labels of THINGS and their sprites `[things, 4, 48, 48]` float32, red, green, blue times alpha, and alpha.

    Raises:
        ValueError: an archive is missing or is not the pinned one.
        ImportError: resvg-py is not installed.
    """
    import numpy as np
    import resvg_py
    from PIL import Image

    for name, digest in ARCHIVES.items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"{path} is missing; run `npm pack @iconify-json/noto@1.2.9 emojibase-data@17.0.0` in {folder}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} is not the pinned archive (sha256 {digest}); fetch it again with npm pack")
    noto, emojibase = (folder / name for name in ARCHIVES)
    icons, code_points = _member(noto, "package/icons.json"), _member(noto, "package/chars.json")
    labels = {row["hexcode"].replace("-FE0F", ""): row["label"] for row in _member(emojibase, "package/en/data.json")}
    by_name = {name: labels.get(code.upper(), "") for code, name in code_points.items()}
    names, sprites = [], []
    for thing in THINGS:
        names.append(by_name[thing].lower().removesuffix(" face"))
        drawing = icons["icons"][thing]["body"]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' width="{SPRITE}" height="{SPRITE}" viewBox="0 0 {icons["width"]} {icons["height"]}">{drawing}</svg>'
        )
        picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
        rgba = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        sprites.append(torch.cat([rgba[:3] * rgba[3:], rgba[3:]]))
    return names, torch.stack(sprites)


def _member(archive: Path, name: str) -> dict | list:
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile(name))


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 1, generator=generator)


def paths(motions: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw where each clip's sprite is: centre `[n, frames, 2]` (x, y) and size `[n, frames]` in pixels, angle in radians.

    Args:
        motions: places in MOTIONS, `[n]` int64.
        generator: draws the free choices: place, size, length of the way.
    """
    n = len(motions)
    t = torch.linspace(0, 1, FRAMES).expand(n, -1)
    way = _uniform(n, 13, 15, generator) * (t - 0.5)
    wander = torch.cat([_uniform(n, -2.5, 2.5, generator), _uniform(n, -2.5, 2.5, generator)], 1)[:, None].expand(-1, FRAMES, -1)
    jitter = _uniform(n, -1, 1, generator)
    size = _uniform(n, 15, 17, generator).expand(-1, FRAMES)
    height = _uniform(n, 9, 11, generator) * torch.sin(2 * math.pi * t).abs()
    swell = 7 + _uniform(n, 13, 15, generator) * t
    middle = SIZE / 2
    x, y = middle + wander[..., 0], middle + wander[..., 1]
    calm = middle + 0.5 * wander  # the growing and the spinning ones keep inside the frame
    still = torch.zeros_like(t)
    ways = {
        "left": (middle + jitter - way, y, size, still),
        "right": (middle + jitter + way, y, size, still),
        "up": (x, middle + jitter - way, size, still),
        "down": (x, middle + jitter + way, size, still),
        # A full turn in the time of a clip that repeats: its last frame is one step short of its first.
        "spin": (calm[..., 0], calm[..., 1], size + 2, 2 * math.pi * t * (FRAMES - 1) / FRAMES),
        "bounce": (x, SIZE - 9 - height, size - 1, still),
        "grow": (calm[..., 0], calm[..., 1], swell, still),
        "shrink": (calm[..., 0], calm[..., 1], swell.flip(1), still),
    }
    table = torch.stack([torch.stack(ways[name], -1) for name in MOTIONS])  # [motions, n, frames, 4]
    chosen = table[motions, torch.arange(n)]
    return chosen[..., :2], chosen[..., 2], chosen[..., 3]


def backgrounds(n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw soft vertical gradients `[n, 3, 1, 32, 32]` in [0, 1]."""
    hue = torch.rand(n, 1, generator=generator) + torch.tensor([0.0, 1 / 3, 2 / 3])
    tint = 0.5 + 0.5 * torch.cos(2 * math.pi * hue)
    top = _uniform(n, 0.85, 1.0, generator) * (1 - _uniform(n, 0.1, 0.4, generator) * tint)
    shade = 1 - _uniform(n, 0.0, 0.25, generator) * torch.linspace(0, 1, SIZE)
    return (top[:, :, None] * shade[:, None])[:, :, None, :, None].expand(-1, -1, -1, -1, SIZE)


def render(
    sprites: torch.Tensor, motions: torch.Tensor, generator: torch.Generator, frames: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw clips `[n, 3, frames, 32, 32]` float32 in [-1, 1].

    Args:
        sprites: `[n, 4, h, w]`, as `read_archives` returns them.
        motions: places in MOTIONS, `[n]`.
        generator: draws the free choices.
        frames: which frames to draw of each clip, `[n, f]` int64; all if None.
    """
    n = len(sprites)
    centre, size, angle = paths(motions, generator)
    if frames is not None:
        rows = torch.arange(n)[:, None]
        centre, size, angle = centre[rows, frames], size[rows, frames], angle[rows, frames]
    ground = backgrounds(n, generator)
    fine = SIZE * OVERSAMPLE
    pixel = (torch.arange(fine) + 0.5) / OVERSAMPLE
    dx = pixel[None, None, None, :] - centre[..., 0, None, None]
    dy = pixel[None, None, :, None] - centre[..., 1, None, None]
    cos, sin, half = (v[..., None, None] for v in (angle.cos(), angle.sin(), size / 2))
    grid = torch.stack([(cos * dx + sin * dy) / half, (cos * dy - sin * dx) / half], -1)
    sprites = sprites[:, None].expand(-1, size.shape[1], -1, -1, -1).flatten(0, 1)
    drawn = torch.nn.functional.grid_sample(sprites, grid.flatten(0, 1), align_corners=False)
    drawn = torch.nn.functional.avg_pool2d(drawn, OVERSAMPLE).unflatten(0, size.shape).transpose(1, 2)
    return (ground * (1 - drawn[:, 3:]) + drawn[:, :3]) * 2 - 1
