"""Clips as files: animated WebP and GIF and MP4 of a labelled grid, and a PNG contact sheet; the suffix chooses."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from quantdit.evaluation.report.picture import whole_file
from quantdit.system.optional_import import install
from quantdit.system.output_places import ANIMATIONS, PICTURES, require_suffix

SUFFIXES = (*PICTURES, *ANIMATIONS)
FRAMES_A_SECOND = 10

_CELL = 128  # least pixels a clip is enlarged to; a smaller one has no room for its label
_SHEET_CELL = 72
_GAP, _TEXT, _LINE = 4, 12, 16
_PAPER, _INK = "white", "#1a1a1a"


def write_clips(
    clips: torch.Tensor, labels: Sequence[str], path: str | Path, columns: int = 4, frames_a_second: int = FRAMES_A_SECOND
) -> None:
    """Write clips to one file: `.webp`, `.gif` or `.mp4` shows them moving in a grid, `.png` as rows of frames.

    The animations of WebP and GIF repeat for ever. The file appears complete or not at all.

    Args:
        clips: `[n, f, c, h, w]` float, c = 1 or 3, [-1, 1] from black to white; values beyond are clipped.
        labels: one line of text for each clip.
        path: the file; replaced if it exists.
        columns: clips in a row of the grid.
        frames_a_second: of the animation.

    Raises:
        ValueError: another suffix, clips that are no such tensor or contain NaN, or another number of labels than clips.
        ImportError: `.mp4` without PyAV; names the extra to install.
    """
    path = Path(path)
    require_writer(path)
    suffix = path.suffix.lower()
    frames = [contact_sheet(clips, labels)] if suffix == ".png" else clip_grid(clips, labels, columns)
    with whole_file(path) as part:
        _WRITERS[suffix](frames, part, frames_a_second)


def require_writer(path: Path) -> None:
    """Check that clips can be written to `path`, before minutes are spent on sampling them.

    Raises:
        ValueError: its suffix names none of the formats.
        ImportError: `.mp4` without PyAV.
    """
    require_suffix(path, SUFFIXES, "clips")
    if path.suffix.lower() == ".mp4":
        _av()


def clip_grid(clips: torch.Tensor, labels: Sequence[str], columns: int) -> list[Image.Image]:
    """Draw one picture per frame: the clips in rows of `columns`, enlarged by a whole factor, each above its label.

    Arguments and errors are those of `write_clips`.
    """
    pixels = _pixels(clips, labels)
    count, length, height, width, _ = pixels.shape
    if columns < 1:
        raise ValueError(f"columns is {columns}, expected at least 1")
    columns = min(columns, count)
    scale = -(-_CELL // max(height, width))
    font = ImageFont.load_default(_TEXT)
    lines = [_wrapped(label, width * scale, font) for label in labels]
    cell_w, cell_h = width * scale + _GAP, height * scale + _LINE * max(map(len, lines)) + _GAP
    # Both sides even: the colour planes of MP4 have half the resolution.
    wide, high = columns * cell_w + _GAP, -(-count // columns) * cell_h + _GAP
    paper = Image.new("RGB", (wide + wide % 2, high + high % 2), _PAPER)
    draw = ImageDraw.Draw(paper)
    corners = [(_GAP + i % columns * cell_w, _GAP + i // columns * cell_h) for i in range(count)]
    for (left, top), text in zip(corners, lines, strict=True):
        draw.text((left, top + height * scale), "\n".join(text), _INK, font, spacing=_LINE - _TEXT)
    frames = []
    for t in range(length):
        frame = paper.copy()
        for i, corner in enumerate(corners):
            frame.paste(_enlarged(pixels[i, t], scale), corner)
        frames.append(frame)
    return frames


def contact_sheet(clips: torch.Tensor, labels: Sequence[str]) -> Image.Image:
    """Draw every clip as a row of its frames, first to last, under its label.

    Arguments and errors are those of `write_clips`.
    """
    pixels = _pixels(clips, labels)
    count, length, height, width, _ = pixels.shape
    scale = -(-_SHEET_CELL // max(height, width))
    cell_w, cell_h = width * scale + 1, height * scale + _LINE + _GAP
    sheet = Image.new("RGB", (length * cell_w + 2 * _GAP, count * cell_h + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT)
    for i, label in enumerate(labels):
        top = _GAP + i * cell_h
        draw.text((_GAP, top), label, _INK, font)
        for t in range(length):
            sheet.paste(_enlarged(pixels[i, t], scale), (_GAP + t * cell_w, top + _LINE))
    return sheet


def _pixels(clips: torch.Tensor, labels: Sequence[str]) -> torch.Tensor:
    """Return uint8 `[n, f, h, w, 3]`."""
    if clips.ndim != 5 or len(clips) == 0 or clips.shape[1] == 0 or clips.shape[2] not in (1, 3):
        raise ValueError(f"clips are {list(clips.shape)}, expected [n, frames, 1 or 3, h, w] with n and frames >= 1")
    if len(labels) != len(clips):
        raise ValueError(f"got {len(labels)} labels for {len(clips)} clips; give one per clip")
    if torch.isnan(clips).any():
        raise ValueError("clips contain NaN: find the layer that overflowed before drawing")
    scaled = ((clips.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return scaled.expand(-1, -1, 3, -1, -1).permute(0, 1, 3, 4, 2).contiguous()


def _enlarged(frame: torch.Tensor, scale: int) -> Image.Image:
    height, width, _ = frame.shape
    return Image.fromarray(frame.numpy()).resize((width * scale, height * scale), Image.Resampling.NEAREST)


def _wrapped(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    return textwrap.wrap(label, max(1, int(width / font.getlength("n")))) or [""]


def _animation(frames: list[Image.Image], path: Path, frames_a_second: int, **options: Any) -> None:
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // frames_a_second, loop=0, **options)


def _webp(frames: list[Image.Image], path: Path, frames_a_second: int) -> None:
    _animation(frames, path, frames_a_second, lossless=True)


def _gif(frames: list[Image.Image], path: Path, frames_a_second: int) -> None:
    # One palette for the whole animation: with one for each frame the colours of the background flicker.
    stack = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for i, frame in enumerate(frames):
        stack.paste(frame, (0, i * frame.height))
    palette = stack.quantize(256)
    _animation([frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames], path, frames_a_second)


def _mp4(frames: list[Image.Image], path: Path, frames_a_second: int) -> None:
    av = _av()
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=frames_a_second)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())


def _png(frames: list[Image.Image], path: Path, frames_a_second: int) -> None:
    frames[0].save(path, optimize=True)


def _av():
    try:
        import av
    except ImportError as error:
        raise ImportError(f"writing .mp4 needs PyAV; run: {install('video')}, or choose .webp or .gif") from error
    return av


_WRITERS = {".webp": _webp, ".gif": _gif, ".mp4": _mp4, ".png": _png}
