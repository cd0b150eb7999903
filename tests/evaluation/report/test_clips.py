"""Clips as files: what comes back is what went in."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quantdit.evaluation.report.clips import SUFFIXES, clip_grid, contact_sheet, write_clips
from quantdit.system.optional_import import install

# Six frames of two clips: a white square walks one pixel a frame, to the right in the first, down in the second.
CLIPS = torch.full((2, 6, 3, 32, 32), -1.0)
for t in range(6):
    CLIPS[0, t, :, 8:16, 4 + t : 12 + t] = 1
    CLIPS[1, t, :, 4 + t : 12 + t, 8:16] = 1
LABELS = ["a square moving right", "a square moving down, at no great speed but steadily"]


def white(frame: Image.Image, left: int) -> tuple[float, float]:
    """Return the mean column and row of the white pixels of the 128 x 128 picture at `left`, in pixels of the clip."""
    pixels = np.asarray(frame.convert("L"))[4:132, left : left + 128] > 128
    rows, columns = np.nonzero(pixels)
    return columns.mean() / 4, rows.mean() / 4


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_an_animation_shows_each_clip_moving_its_own_way(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clips{suffix}"
    write_clips(CLIPS, LABELS, path, frames_a_second=10)
    picture = Image.open(path)
    assert (picture.n_frames, picture.info["loop"]) == (6, 0)
    for t in (0, 5):
        picture.seek(t)
        frame = picture.convert("RGB")
        assert picture.info["duration"] == 100
        assert np.allclose(white(frame, 4), (4 + t + 3.9, 11.9), atol=0.3)
        assert np.allclose(white(frame, 136), (11.9, 4 + t + 3.9), atol=0.3)


def test_mp4_decodes_to_the_same_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clips.mp4"
    write_clips(CLIPS, LABELS, path)
    with av.open(str(path)) as file:
        frames = [frame.to_image() for frame in file.decode(video=0)]
    assert len(frames) == 6
    assert np.allclose(white(frames[5], 4), (12.9, 11.9), atol=0.5)


def test_a_contact_sheet_has_a_row_for_each_clip_and_a_column_for_each_frame(tmp_path: Path) -> None:
    write_clips(CLIPS, LABELS, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == contact_sheet(CLIPS, LABELS).size == (6 * 97 + 8, 2 * 116 + 4)
    # The third frame of the first clip, enlarged three times.
    cell = sheet.crop((4 + 2 * 97, 4 + 16, 4 + 2 * 97 + 96, 4 + 16 + 96)).resize((32, 32), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(cell.convert("RGB")), ((CLIPS[0, 2] + 1) * 127.5).byte().permute(1, 2, 0).numpy())


def test_grey_clips_are_drawn_and_a_grid_has_even_sides() -> None:
    frames = clip_grid(torch.zeros(3, 2, 1, 5, 7), ["a", "b", "c"], columns=2)
    assert len(frames) == 2 and all(side % 2 == 0 for side in frames[0].size)
    assert frames[0].getpixel((10, 10)) == (128, 128, 128)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "clips.webp"
    write_clips(CLIPS, LABELS, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="NaN"):
        write_clips(CLIPS * float("nan"), LABELS, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["clips.webp"]


def test_wrong_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"written as {', '.join(SUFFIXES)}"):
        write_clips(CLIPS, LABELS, tmp_path / "clips.avi")
    with pytest.raises(ValueError, match=r"clips are \[6, 3, 32, 32\], expected \[n, frames, 1 or 3, h, w\]"):
        clip_grid(CLIPS[0], LABELS, 1)
    with pytest.raises(ValueError, match="got 1 labels for 2 clips"):
        clip_grid(CLIPS, LABELS[:1], 1)
    with pytest.raises(ValueError, match="columns is 0"):
        clip_grid(CLIPS, LABELS, 0)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=re.escape(install("video"))):
        write_clips(CLIPS, LABELS, tmp_path / "clips.mp4")
