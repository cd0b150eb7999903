"""VBench by its own package: the totals, the dimensions that are scored, and what is refused; with a stand-in for the package."""

from __future__ import annotations

import json
import shutil
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

from quantdit.evaluation import vbench_scores as vbench
from quantdit.evaluation.metrics.video import temporal_flickering
from quantdit.evaluation.samples import Samples


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


# Takes what the class of VBench 0.1.5 takes, leaves what it leaves; scores a tenth for each clip.
STAND_IN = """
import json, os
from pathlib import Path
from torch import device, hub

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert str(device) == "cpu" and Path(full_info_dir).name == "VBench_full_info.json"
        self.output_path = output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "custom_input" and local == ("VBENCH_CACHE_DIR" in os.environ)
        if dimension_list == ["subject_consistency"] and local:
            assert Path(hub.place, "checkpoints", "dino_vitbase16_pretrain.pth").read_text() == "made up"
        if dimension_list == [{fails!r}]:
            raise RuntimeError("Output size is too small")
        videos = sorted(p.name for p in Path(videos_path).glob("*.mp4"))
        score = {score} if dimension_list == ["imaging_quality"] else len(videos) / 10
        results = {{dimension_list[0]: [score, videos]}}
        Path(self.output_path, f"{{name}}_eval_results.json").write_text(json.dumps(results))
"""
TORCH = """
from types import SimpleNamespace
device = str
cuda = SimpleNamespace(is_available=lambda: False)
hub = SimpleNamespace(place=None, set_dir=lambda place: setattr(hub, "place", place))
"""


def environment(folder: Path, fails: str = "", score: str = "len(videos) / 10") -> Path:
    """A real environment, with stand-ins for vbench and torch in it; a space and a dollar in its path."""
    home = folder / "an $env"
    venv.create(home, with_pip=False, symlinks=True)
    packages = next(home.glob("lib/python*/site-packages"))
    for name, text in (("torch", TORCH), ("vbench", STAND_IN.format(fails=fails, score=score))):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(text)
    (packages / "vbench-0.1.5.dist-info").mkdir()
    (packages / "vbench-0.1.5.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")
    return home


def networks(folder: Path, *names: str) -> Path:
    """A folder that has these dimensions' networks, by name."""
    for path in (path for name in names for path in vbench.WEIGHTS[name]):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("made up")
    return folder


def samples(side: int = 32) -> Samples:
    clips = 0.2 * torch.rand(3, 4, 3, side, side, generator=torch.Generator().manual_seed(0))  # flickers little
    return Samples(clips, torch.zeros(3, 1, 1), (1.0,), ("a bat", "a bat", 'an "owl"/owl'), (0, 1, 2))


def test_vbench_s_own_package_scores_the_clips(tmp_path: Path):
    pytest.importorskip("av")
    env, weights = environment(tmp_path), networks(tmp_path / "weights", *vbench.WEIGHTS)
    vbench.check(env, weights)
    for given in (None, weights):
        large = samples(128)
        found = vbench.run(env, given, {"reference": large}, tmp_path / "out")["reference"]
        assert found["imaging_quality"] == 0.3 and found["quality_score"] > 0 and "total_score" not in found
    expected = np.mean([temporal_flickering(c) for c in large.images])
    assert found["temporal_flickering"] == pytest.approx(expected, rel=1e-5)
    names = sorted(p.name for p in (tmp_path / "out" / "reference" / "videos").iterdir())
    assert names == ["a bat-0.mp4", "a bat-1.mp4", "an _owl__owl-0.mp4"]


def test_small_clips_have_no_dynamic_degree(tmp_path: Path):
    """VBench's RAFT would say 0 of them, whatever moves, or fail."""
    pytest.importorskip("av")
    found = vbench.run(environment(tmp_path), None, {"candidate": samples()}, tmp_path / "out")["candidate"]
    assert found.keys() == {"temporal_flickering", *vbench.WEIGHTS} - {"dynamic_degree"}


def test_only_dimensions_whose_networks_are_there_are_scored(tmp_path: Path, clips: tuple[Path, Path], cli):
    """From the option to the rows: two dimensions and the flickering, and no total."""
    pytest.importorskip("av")
    pytest.importorskip("efficientnet_lite_pytorch")
    weights = networks(tmp_path / "weights", "imaging_quality", "motion_smoothness")
    ask = ("evaluate", *clips, "--samples", 4, "--steps", 1, "--probes", 1, "--output", tmp_path / "drift")
    ran = cli(*ask, "--vbench", environment(tmp_path), "--vbench-weights", weights)
    assert ran.code == 0, ran.err
    scores = json.loads((tmp_path / "drift" / "report.json").read_text())["vbench"]
    assert scores.keys() == {"reference", "candidate"}
    for found in scores.values():
        assert found.keys() == {"temporal_flickering", "motion_smoothness", "imaging_quality"} and found["imaging_quality"] == 0.4
    page = (tmp_path / "drift" / "report.html").read_text()
    assert "<h3>VBench</h3>" in page and "imaging quality" in page and "VBench imaging_quality" in ran.out


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that makes clips of 4 frames of 16 x 16 pixels, and one whose weights are a little off."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    from quantdit.models.pixel_wan import PixelWanPipeline

    folder = tmp_path_factory.mktemp("clips")
    sizes = {"patch_size": (2, 4, 4), "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 8, "out_channels": 3}
    torch.manual_seed(1)
    model = WanTransformer3DModel(**sizes, text_dim=384, freq_dim=64, ffn_dim=128, num_layers=1, rope_max_seq_len=16)
    for name in ("full", "off"):
        pipeline = PixelWanPipeline(model, FlowMatchEulerDiscreteScheduler(shift=3.0), 4, 16)
        pipeline.known = {p: torch.randn(16, 384).half() for p in ("", "a bat", "a fox")}
        pipeline.save_pretrained(folder / name)
        for tensor in model.parameters():
            tensor.data += 0.01 * torch.randn(tensor.shape)
    return folder / "full", folder / "off"


def test_what_vbench_lacks_is_said_before_sampling(tmp_path: Path, cli, pixel_dit: Path):
    pytest.importorskip("av")
    ask = ("evaluate", pixel_dit, pixel_dit, "--output", tmp_path / "drift")
    assert "no environment, which would hold bin/python" in cli(*ask, "--vbench", tmp_path / "none").error
    assert "goes with --vbench" in cli(*ask, "--vbench-weights", tmp_path).error
    env = environment(tmp_path)
    empty = cli(*ask, "--vbench", env, "--vbench-weights", tmp_path / "none").error
    assert "no dimension's networks are there" in empty and "motion_smoothness: amt_model/amt-s.pth" in empty
    shutil.rmtree(next(env.glob("lib/*/site-packages/vbench-0.1.5.dist-info")))
    assert "this environment has no vbench; make one with" in cli(*ask, "--vbench", env).error
    assert not (tmp_path / "drift").exists()


def test_vbench_s_failure_is_passed_on(tmp_path: Path):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="failed at imaging_quality with exit code 1: RuntimeError: Output size is too small"):
        vbench.run(environment(tmp_path, "imaging_quality"), None, {"reference": samples()}, tmp_path / "out")


@pytest.mark.parametrize("score", ["None", "float('nan')", "'high'"])
def test_scores_that_are_no_numbers_are_refused(tmp_path: Path, score: str):
    pytest.importorskip("av")
    weights = networks(tmp_path / "weights", "imaging_quality")
    with pytest.raises(ValueError, match=r"the score of imaging_quality is .*, expected a number"):
        vbench.run(environment(tmp_path, score=score), weights, {"reference": samples()}, tmp_path / "out")
