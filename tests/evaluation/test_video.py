"""Measures of clips: VBench's flickering to the last digit, the proxies on clips whose motion is known, VBench's totals."""

from __future__ import annotations

import itertools
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantdit.evaluation import vbench
from quantdit.evaluation.samples import Samples
from quantdit.evaluation.video import (
    as_bytes,
    consistency_proxy,
    dynamic_degree_proxy,
    motion_smoothness_proxy,
    temporal_flickering,
)

FRAMES, SIDE = 12, 32


def moving(speed: float, jitter: float = 0.0, noise: float = 0.0) -> Tensor:
    """A soft disc that moves to the right by `speed` pixels a frame, `[FRAMES, 3, SIDE, SIDE]`; jitter moves it to and fro."""
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    frames = []
    for t in range(FRAMES):
        centre = SIDE / 2 + speed * (t - FRAMES / 2) + jitter * (-1) ** t
        frames.append(2 * torch.exp(-((x - centre) ** 2 + (y - SIDE / 2) ** 2) / 40) - 1)
    clip = torch.stack(frames)[:, None].expand(-1, 3, -1, -1)
    return (clip + noise * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def test_temporal_flickering_is_vbench_s():
    """VBench's loop: `255 - mean of cv2.absdiff` of successive 8-bit frames, over 255."""
    clip = moving(1.0, noise=0.1)
    frames = [((f + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for f in clip]
    differences = [np.mean(np.maximum(a, b) - np.minimum(a, b), dtype=np.float64) for a, b in itertools.pairwise(frames)]
    assert temporal_flickering(clip) == pytest.approx((255.0 - np.mean(differences)) / 255.0, abs=1e-12)
    assert temporal_flickering(clip[:1].expand(FRAMES, -1, -1, -1)) == 1.0
    assert np.array_equal(as_bytes(clip), np.stack(frames))


def test_a_still_is_not_dynamic_and_a_fast_thing_is():
    pytest.importorskip("skimage")
    # VBench's threshold is 6 pixels for a side of 256, hence 0.75 for 32.
    assert [dynamic_degree_proxy(moving(speed)) for speed in (0.0, 0.2, 1.5)] == [0.0, 0.0, 1.0]


def test_even_motion_is_smoother_than_jerky_motion():
    pytest.importorskip("skimage")
    even, jerky = motion_smoothness_proxy(moving(1.0)), motion_smoothness_proxy(moving(1.0, jitter=1.5))
    assert 0.98 < even <= 1 and jerky < even - 0.01


def test_consistency_is_vbench_s_formula():
    """On features that are the pixels: the mean of the cosines to the frame before and to the first, none below 0."""
    clip = moving(1.0)
    x = clip.flatten(1).double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    expected = [(max(0.0, x[t] @ x[t - 1]) + max(0.0, x[t] @ x[0])) / 2 for t in range(1, FRAMES)]
    assert consistency_proxy(clip, lambda images: images.flatten(1)) == pytest.approx(np.mean(expected))


def test_totals_need_every_dimension():
    """Smallest scores make 0, largest make 1; the weights are VBench's: dynamic degree half, quality four times semantic."""
    ends = [{d: limits[end] for d, limits in (vbench.QUALITY | vbench.SEMANTIC).items()} for end in (0, 1)]
    for value, scores in enumerate(ends):
        assert vbench.totals(scores) == pytest.approx({k: value for k in ("quality_score", "semantic_score", "total_score")})
    mixed = ends[0] | {"dynamic_degree": 1.0}
    assert vbench.totals(mixed)["quality_score"] == pytest.approx(0.5 / 6.5)
    assert vbench.totals(mixed)["total_score"] == pytest.approx(0.8 * 0.5 / 6.5)
    del mixed["scene"]
    assert vbench.totals(mixed).keys() == {"quality_score"}
    del mixed["imaging_quality"]
    assert vbench.totals(mixed) == {}


PROGRAM = """#!{python}
import json, os, sys
from pathlib import Path
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "evaluate" and given["--mode"] == "custom_input" and os.environ["VBENCH_CACHE_DIR"] == {cache!r}
videos = sorted(p.name for p in Path(given["--videos_path"]).glob("*.mp4"))
if {fails!r} == given["--dimension"]:
    sys.exit("CUDA is not available")
score = len(videos) / 10
Path(given["--output_path"], "results_x_eval_results.json").write_text(json.dumps({{given["--dimension"]: [score, videos]}}))
"""


def program(folder: Path, fails: str = "") -> Path:
    """A stand-in for the vbench program: takes its arguments, and scores a tenth for each clip."""
    path = folder / "vbench"
    path.write_text(PROGRAM.format(python=sys.executable, cache=str(folder.resolve()), fails=fails))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def samples() -> Samples:
    clips = torch.stack([moving(1.0), moving(0.5), moving(0.0)])
    return Samples(clips, torch.zeros(3, 1, 1), (1.0,), ("a bat", "a bat", 'an "owl"/owl'), (0, 1, 2))


def test_vbench_s_own_program_scores_the_clips(tmp_path: Path):
    pytest.importorskip("av")
    found = vbench.run(program(tmp_path), tmp_path, {"reference": samples()}, tmp_path / "out")["reference"]
    assert found["imaging_quality"] == 0.3 and found["quality_score"] > 0 and "total_score" not in found
    assert found["temporal_flickering"] == pytest.approx(np.mean([temporal_flickering(c) for c in samples().images]), rel=1e-5)
    names = sorted(p.name for p in (tmp_path / "out" / "reference" / "videos").iterdir())
    assert names == ["a bat-0.mp4", "a bat-1.mp4", "an _owl__owl-0.mp4"]


def test_vbench_s_failure_is_passed_on(tmp_path: Path, cli, pixel_dit: Path):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="failed at dynamic_degree with exit code 1: CUDA is not available"):
        vbench.run(program(tmp_path, "dynamic_degree"), tmp_path, {"reference": samples()}, tmp_path / "out")
    ask = ("evaluate", pixel_dit, pixel_dit, "--output", tmp_path / "drift")
    assert "no program that can be run" in cli(*ask, "--vbench", tmp_path / "none").error
    assert "goes with --vbench" in cli(*ask, "--vbench-weights", tmp_path).error


def test_results_of_another_form_are_refused(tmp_path: Path):
    path = program(tmp_path)
    path.write_text(path.read_text().replace("json.dumps(", "json.dumps(1 or "))
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="not the results"):
        vbench.run(path, tmp_path, {"reference": samples()}, tmp_path / "out")
