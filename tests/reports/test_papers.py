"""The page of two papers: its recipes are possible, its intervals and gains right, full rows go before quick ones."""

from __future__ import annotations

from pathlib import Path

import pytest

import papers
from quantdit.recipes.finetuning import FineTuning, check_trains
from quantdit.recipes.presets import METHODS


def filled(scale: papers.Scale, start: float) -> list[dict]:
    rows = []
    for number, row in enumerate(papers.planned(scale)):
        values = [start + 0.1 * number, start + 0.1 * number + 0.5]
        measured = {"psnr": sum(values) / 2, "image_psnr": values, "layer_error": 0.1, "model_error": 0.2, "bits_per_weight": 2.2}
        rows.append(row | measured | {"file_mb": 1.5, "outlier_rotations": "1 of 9", "seconds": 3.0})
    return rows


def test_every_part_is_a_recipe_with_its_training():
    for places, parts, _ in papers.PAPERS.values():
        for _, bits in places:
            names = [part.name for part in parts(bits)]
            assert len(set(names)) == len(names) and "preset" in names
            for part in parts(bits):
                plan = papers.methods.changed(bits, part.changes, part.method)
                training = papers.methods.trained(bits, part.changes, part.method)
                assert {k: getattr(plan.rules[-1], k) for k in part.changes if not k.startswith("training.")} == {
                    k: v for k, v in part.changes.items() if not k.startswith("training.")
                }
                if training is not None:
                    assert isinstance(training, FineTuning)
                    check_trains(plan.rules)


def test_no_two_rows_have_one_key():
    keys = [papers.key(row) for scale in (papers.FULL, papers.QUICK) for row in papers.planned(scale)]
    assert len(set(keys)) == len(keys)


def test_a_gain_is_of_pairs():
    before = [{"psnr": 30.0, "image_psnr": [28.0, 32.0], "seed": 0, "samples": 2}]
    after = [{"psnr": 31.0, "image_psnr": [29.0, 33.0], "seed": 0, "samples": 2}]
    assert papers.gain(after, before) == (1.0, 0.0)
    assert papers.spread(before)[1] > 20  # two images that differ by 4 dB tell little of the mean
    seeds = [row | {"seed": seed, "psnr": row["psnr"] + 3 * seed} for seed in (0, 1, 2) for row in before]
    better = [row | {"psnr": row["psnr"] + 1} for row in seeds]
    assert papers.gain(better, seeds) == pytest.approx((1.0, 0.0))
    assert papers.spread(seeds) == pytest.approx((33.0, 3 * 4.302653 / 3**0.5), rel=1e-5)


def test_the_page_shows_full_rows_before_quick_ones(tmp_path: Path):
    quick = filled(papers.QUICK, 20.0)
    page = papers.page(quick)
    for paper in papers.PAPERS:
        assert f"arXiv {METHODS[paper].arxiv}" in page and f"--method {paper}" in page
        assert len(papers.shown(quick, paper)) == sum(row["paper"] == paper for row in quick)
    assert page.count(", quick") == len(quick)
    full = filled(papers.FULL, 40.0)
    assert papers.page(quick + full) == papers.page(full)
    assert "3 seeds" in papers.page(full) and ", quick" not in papers.page(full)
    papers.draw("lrq-dit", papers.shown(quick, "lrq-dit"), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
