"""Comparison pictures: pixels where they belong, a labelled third panel, and files that are whole or untouched."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from quantdit.evaluation.report.picture import difference_panel, image_grid, side_by_side

SCALE = 3  # 28 pixels reach 72 with a factor of 3


def test_grid_enlarges_whole_pixels():
    images = -torch.ones(3, 1, 28, 28)
    images[1, 0, 0, 0] = 1.0  # one white pixel in the corner of the second image
    grid = image_grid(images, columns=2)
    white = [(x, y) for x in range(grid.width) for y in range(grid.height) if grid.getpixel((x, y)) == (255, 255, 255)]
    xs, ys = sorted({x for x, _ in white}), sorted({y for _, y in white})
    assert len(white) == SCALE**2 and len(xs) == len(ys) == SCALE
    assert xs[0] > grid.width // 2 - SCALE and ys[-1] < grid.height // 2  # upper right of a 2 x 2 grid
    assert grid.width == grid.height > 2 * 28 * SCALE


def test_grid_of_colours_and_large_images():
    images = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 100, 80)
    grid = image_grid(images, columns=5)
    colours = dict((colour, count) for count, colour in grid.getcolors())
    assert colours[(255, 128, 0)] == 2 * 100 * 80  # not enlarged, and no empty places
    column = image_grid(images * 9, columns=1)  # values beyond the range are clipped
    assert dict((colour, count) for count, colour in column.getcolors())[(255, 128, 0)] == 2 * 100 * 80


def test_difference_is_amplified_and_says_so():
    reference = torch.zeros(2, 1, 28, 28)
    title, images = difference_panel(reference, reference - 0.125)
    assert "x 8" in title
    torch.testing.assert_close(images, torch.zeros_like(reference))  # 8 * 0.125 above black, which is -1
    assert (difference_panel(reference, reference)[1] == -1).all()


def test_two_panels_get_a_third(tmp_path):
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = image_grid(images, 2)
    one, two, three = tmp_path / "one.png", tmp_path / "two.png", tmp_path / "three.png"
    side_by_side([("reference", images)], 2, one)
    side_by_side([("reference", images), ("candidate", images)], 2, two)
    side_by_side([("reference", images), ("candidate", images), difference_panel(images, images)], 2, three)
    assert two.read_bytes() == three.read_bytes() != one.read_bytes()
    with Image.open(two) as picture:
        assert picture.format == "PNG" and picture.width > 3 * grid.width
        right = picture.convert("RGB").crop((picture.width * 3 // 4, 0, picture.width, picture.height))
        colours = {colour: count for count, colour in right.getcolors(1 << 20)}
    assert colours[(0, 0, 0)] > 0.5 * right.width * grid.height  # the difference of equal panels is black


def test_footer_and_titles_stay_inside(tmp_path):
    images = torch.zeros(1, 1, 28, 28)
    bare, footed, wide = tmp_path / "bare.png", tmp_path / "footed.png", tmp_path / "wide.png"
    side_by_side([("a", images)], 1, bare)
    side_by_side([("a", images)], 1, footed, ["one", "two"])
    side_by_side([("a", images)], 1, wide, ["KID-EffNetLite0 0.01 ± 0.002, " * 5])
    with Image.open(bare) as x, Image.open(footed) as y, Image.open(wide) as z:
        assert y.height > x.height and y.width == x.width
        assert z.width > 5 * x.width
        margin = z.convert("L").crop((z.width - 12, 0, z.width, z.height))
        assert margin.getextrema() == (255, 255)


def test_a_failed_picture_leaves_the_old_one(tmp_path):
    images = torch.zeros(2, 1, 28, 28)
    path = tmp_path / "picture.png"
    side_by_side([("a", images), ("b", images)], 2, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="NaN"):
        side_by_side([("a", images), ("b", images * float("nan"))], 2, path)
    with pytest.raises(ValueError, match="difference"):
        side_by_side([("a", images), ("b", images[:1])], 2, path)
    with pytest.raises(ValueError, match="no panels"):
        side_by_side([], 2, path)
    with pytest.raises(ValueError, match="expected"):
        image_grid(images, 0)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["picture.png"]
