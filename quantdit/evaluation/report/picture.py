"""Pictures that compare two models' images at a glance: titled grids side by side, with their amplified difference."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

GAIN = 8
Panel = tuple[str, torch.Tensor]

_CELL = 72  # least pixels an image is enlarged to; smaller ones cannot be read
_GAP, _MARGIN = 3, 24
_LINES_ACROSS = 90  # the text is a 90th of the sheet's width high: readable when a page shows the sheet reduced
_LEAST_TEXT = 14
# Pillow's built-in font has no glyph for these.
_PLAIN = str.maketrans({"\N{MULTIPLICATION SIGN}": "x", "±": "+-", "\N{EN DASH}": "-", "→": "->"})
_PAPER, _INK, _FRAME, _SOFT_INK = "white", "#1a1a1a", "#d0d0d0", "#555555"


def image_grid(images: torch.Tensor, columns: int) -> Image.Image:
    """Draw images in rows of `columns`, small ones enlarged by a whole factor (nearest pixel) to at least 72 pixels.

    Args:
        images: `[n, c, h, w]` float, c = 1 or 3, [-1, 1] from black to white; values beyond are clipped.
        columns: images in a row.

    Returns:
        An RGB picture; unused places of the last row show the frame colour.

    Raises:
        ValueError: if the images are not such a tensor, contain NaN, or columns is not positive.
    """
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3) or columns < 1:
        raise ValueError(f"images are {list(images.shape)} in {columns} columns, expected [n, 1 or 3, h, w], n and columns >= 1")
    if torch.isnan(images).any():
        raise ValueError("images contain NaN: find the layer that overflowed before drawing")
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    pixels = ((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
    scale = -(-_CELL // max(height, width))
    cell_w, cell_h = width * scale + _GAP, height * scale + _GAP
    grid = Image.new("RGB", (columns * cell_w + _GAP, rows * cell_h + _GAP), _FRAME)
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).contiguous()):
        picture = Image.fromarray(image.numpy()).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        grid.paste(picture, (_GAP + i % columns * cell_w, _GAP + i // columns * cell_h))
    return grid


def difference_panel(reference: torch.Tensor, candidate: torch.Tensor, gain: int = GAIN) -> Panel:
    """Return the absolute difference times `gain`, black for none, with a title that says so; both `[n, c, h, w]`.

    Raises:
        ValueError: if the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"panels are {list(reference.shape)} and {list(candidate.shape)}, expected equal to draw a difference")
    return f"absolute difference x {gain}", (reference - candidate).abs() * gain - 1


def first_frames(samples: torch.Tensor, count: int, columns: int) -> torch.Tensor:
    """Return the first `count` images `[n, c, h, w]`; of clips `[n, f, c, h, w]` a row of `columns` frames each."""
    if samples.ndim == 4:
        return samples[:count]
    frames = torch.linspace(0, samples.shape[1] - 1, columns).round().long()
    return samples[: count // columns, frames].flatten(0, 1)


def side_by_side(panels: Sequence[Panel], columns: int, path: str | Path, footer: Sequence[str] = ()) -> None:
    """Write grids of images side by side, each under its title, to a PNG file.

    Two panels of equal shape get a third: their absolute difference times eight. The file appears complete or not at all.

    Args:
        panels: (title, images `[n, c, h, w]` in [-1, 1]) from left to right.
        columns: images in a row of each grid.
        path: the PNG file; replaced if it exists.
        footer: lines of text below, such as the measured drift.

    Raises:
        ValueError: if there are no panels, two panels differ in shape, or images are not as in `image_grid`.
    """
    if not panels:
        raise ValueError("no panels given, expected at least one (title, images)")
    if len(panels) == 2:
        panels = [*panels, difference_panel(panels[0][1], panels[1][1])]
    titles = [title.translate(_PLAIN) for title, _ in panels]
    footer = [line.translate(_PLAIN) for line in footer]
    grids = [image_grid(images, columns) for _, images in panels]
    text = max(_LEAST_TEXT, sum(grid.width for grid in grids) // _LINES_ACROSS)
    title = round(1.3 * text)
    title_font, text_font = ImageFont.load_default(title), ImageFont.load_default(text)
    # A title or footer line wider than the images widens its column or the sheet, rather than run out of it.
    widths = [max(grid.width, round(title_font.getlength(line))) for grid, line in zip(grids, titles, strict=True)]
    inner = max(sum(widths) + _MARGIN * (len(grids) - 1), *(round(text_font.getlength(line)) for line in footer), 0)
    top = _MARGIN + round(1.5 * title)
    bottom = top + max(grid.height for grid in grids)
    step = round(1.5 * text)
    foot = _MARGIN // 2 + step * len(footer) if footer else 0
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, bottom + foot + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = _MARGIN
    for line, grid, width in zip(titles, grids, widths, strict=True):
        draw.text((left, _MARGIN), line, _INK, title_font)
        sheet.paste(grid, (left, top))
        left += width + _MARGIN
    for i, line in enumerate(footer):
        draw.text((_MARGIN, bottom + _MARGIN // 2 + i * step), line, _SOFT_INK, text_font)
    with whole_file(Path(path)) as part:
        sheet.save(part, "PNG", optimize=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    try:
        handle, name = tempfile.mkstemp(suffix=path.suffix.lower(), dir=path.parent)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write into {path.parent}", str(path)) from error
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)  # mkstemp makes files that only their owner can read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
