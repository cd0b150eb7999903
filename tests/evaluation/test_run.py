"""`quantdit evaluate` on tiny pipelines."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quantdit
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.evaluation import comparison, run, samples
from quantdit.evaluation.gate import judge
from quantdit.evaluation.samples import Sampling, sample
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files

SAMPLES, STEPS = 4, 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 16 x 16 pixels, which is enough for SSIM's window, and its w4a8 form."""
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from quantdit.models.pixel_dit import PixelDiTPipeline

    folder = tmp_path_factory.mktemp("pair")
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=3,
    )
    PixelDiTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / "full")
    pipeline, source = load_pipeline(str(folder / "full"))
    compile(pipeline, source, Plan(from_bits("w4a8"), SamplingPlan(samples=2, steps=STEPS)), folder / "w4a8")
    return folder / "full", folder / "w4a8"


def test_evaluate_writes_numbers_table_page_and_picture(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    out = tmp_path / "drift"
    ran = cli("evaluate", *pair, "--samples", SAMPLES, "--steps", STEPS, "--output", out)
    assert ran.code == 0, ran.err
    result = json.loads((out / "report.json").read_text())
    assert result["candidate"]["file_bytes"] < result["reference"]["file_bytes"]
    report = json.loads((pair[1] / "calibration_report.json").read_text())
    assert result["candidate"]["bits_per_weight"] == report["size"]["bits_per_weight"]
    assert result["sampling"] == {
        "samples": 4,
        "seed": 0,
        "steps": 2,
        "guidance": None,
        "prompts": ["class 0", "class 1", "class 2"],
        "batch": 32,
        "classes": None,
        "negative_prompt": None,
        "height": None,
        "width": None,
        "frames": None,
        "dtype": "float32",
    }
    assert set(result["drift"]) >= {"PSNR", "SSIM", "FD-EffNetLite0", "KID-EffNetLite0"}
    assert "reference_to_real" not in result["drift"]["FD-EffNetLite0"]  # the real set is another model's
    assert set(result["samples"][0]) >= {"prompt", "seed", "psnr", "ssim", "perceptual", "latent_cosine"}
    assert set(result["sets"]) >= {"FD-EffNetLite0", "KID-EffNetLite0", "MMD-EffNetLite0"}
    assert len(result["probe"]["samples"]) == SAMPLES
    assert all(-100 < row["output_error"] < 0 for row in result["probe"]["samples"])
    assert result["probe"]["layers"].keys() == result["layers"].keys() == report["layers"].keys()
    assert (out / "drift.png").stat().st_size > 1000
    assert (out / "report.md").read_text().strip() in ran.out
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == SAMPLES and "http" not in page.replace("http-equiv", "")


def test_mean_of_the_rows_is_the_drift(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    assert cli("evaluate", *pair, "--seeds", 2, "--steps", STEPS, "--output", tmp_path).code == 0
    result = json.loads((tmp_path / "report.json").read_text())
    assert len(result["samples"]) == 6  # three classes
    for name in ("psnr", "ssim"):
        mean = sum(row[name] for row in result["samples"]) / 6
        assert mean == pytest.approx(result["drift"][name.upper()]["mean"], rel=1e-5)


def test_a_model_does_not_drift_from_itself(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    assert cli("evaluate", pair[0], pair[0], "--samples", SAMPLES, "--steps", STEPS, "--output", tmp_path).code == 0
    result = json.loads((tmp_path / "report.json").read_text())
    drift = result["drift"]
    assert drift["PSNR"]["identical"] == SAMPLES
    assert drift["FD-EffNetLite0"]["drift"] < 1e-3 * drift["FD-EffNetLite0"]["noise_floor"]
    assert result["probe"]["layers"] == {} and {row["output_error"] for row in result["probe"]["samples"]} == {-100.0}


def test_kept_samples_are_used_and_damaged_ones_made_again(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    """Asked again, nothing is sampled; a file cut short is as one that is not there; another seed is another sample."""
    pytest.importorskip("efficientnet_lite_pytorch")
    cache = tmp_path / "kept"
    ask = ("evaluate", *pair, "--samples", SAMPLES, "--steps", STEPS, "--cache", cache, "--output")
    assert cli(*ask, tmp_path / "a").code == 0
    times = {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    assert len(times) == 3 * SAMPLES  # reference, its other seeds, candidate
    cut = sorted(times)[0]
    cut.write_bytes(cut.read_bytes()[:100])
    assert cli(*ask, tmp_path / "b").code == 0
    after = {path: path.stat().st_mtime_ns for path in cache.glob("*")}
    assert {path for path in after if after[path] != times.get(path)} == {cut} and cut.stat().st_size > 100
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    # Made alone rather than in its batch, the one sample differs in its last bits.
    pairs = zip(first["samples"], second["samples"], strict=True)
    assert all(a["psnr"] == pytest.approx(b["psnr"], abs=0.01) for a, b in pairs)
    assert sum(a["psnr"] != b["psnr"] for a, b in zip(first["samples"], second["samples"], strict=True)) <= 1
    assert cli(*ask, tmp_path / "c", "--seed", 5).code == 0
    assert len(list(cache.glob("*"))) == 6 * SAMPLES


def _other_file(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def _one_bit(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _negated(path: Path, other: Path) -> None:
    with safe_open(path, "pt") as file:
        made, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(made | {"image": -made["image"]}, path, said)


@pytest.mark.parametrize("damage", [_other_file, _one_bit, _negated])
def test_a_kept_sample_that_is_not_what_was_written_is_made_again(pair: tuple[Path, Path], tmp_path: Path, damage) -> None:
    pipeline, source = load_pipeline(str(pair[0]))
    asked = Sampling(SAMPLES, 0, STEPS, batch=1)  # made alone as before, it is the same to the last bit
    first = sample(pipeline, source, asked, tmp_path)
    paths = sorted(tmp_path.glob("*"))
    whole = paths[0].read_bytes()
    damage(*paths[:2])
    assert paths[0].read_bytes() != whole
    with pytest.warns(files.Advice, match=f"1 of {SAMPLES} kept samples are not what was written .*sampled again"):
        again = sample(pipeline, source, asked, tmp_path)
    assert torch.equal(first.images, again.images) and paths[0].read_bytes() == whole
    assert sorted(tmp_path.glob("*")) == paths


def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(
    pair: tuple[Path, Path], plain_dit: Path, pixel_dit: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(comparison, "sample", none)
    (tmp_path / "file").write_text("precious")
    out = ("--output", tmp_path / "out")
    for arguments, words in (
        ((pair[0], plain_dit, *out), "compare models of one kind"),
        ((pixel_dit, pixel_dit, *out), "SSIM needs at least 11 x 11"),
        ((*pair, *out, "--samples", 3), "at least 4"),
        ((*pair, *out, "--real", tmp_path / "none"), "none"),
        ((*pair, "--output", tmp_path / "file"), "is a file"),
        ((*pair, "--output", tmp_path / "file" / "deeper"), "is a file"),
        ((*pair, *out, "--cache", tmp_path / "file"), "is a file"),
        ((*pair, *out, "--frames", 5), "takes no frames; leave out --frames"),
        ((*pair, *out, "--height", 32), "makes samples of height 16 alone; leave out --height"),
        ((*pair, *out, "--negative-prompt", "blurred"), "takes no negative prompt; leave out --negative-prompt"),
    ):
        assert words in cli("evaluate", *arguments).error, arguments
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert "pip install" in cli("evaluate", tmp_path / "not even a model", pair[1], *out).error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bfloat16_is_what_both_models_are_loaded_in_and_the_report_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    ask = {"samples": SAMPLES, "steps": STEPS, "probes": 2, "cache": tmp_path / "kept", "height": 16}
    reports = {d: quantdit.evaluate(*pair, tmp_path / d, dtype=d, **ask) for d in ("float32", "bfloat16")}
    for dtype, report in reports.items():
        assert report["sampling"]["dtype"] == report["identity"]["dtype"] == dtype
        assert json.loads((tmp_path / dtype / "report.json").read_text()) == report
    assert reports["float32"]["samples"] != reports["bfloat16"]["samples"]
    assert len(list((tmp_path / "kept").glob("*"))) == 2 * 3 * SAMPLES, "neither takes the other's samples"
    assert "text_alignment_proxy" not in reports["float32"]["samples"][0], "classes are no text"
    with pytest.raises(ValueError, match="float8"):
        quantdit.evaluate(*pair, tmp_path / "out", dtype="float8")


def test_noise_floor_has_another_batch_and_opens_the_other_dtype_first(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's config was changed and accepted: that holds for the other dtype, too, and is known before sampling."""
    pytest.importorskip("efficientnet_lite_pytorch")
    changed = Path(shutil.copytree(pair[1], tmp_path / "changed"))
    place = changed / "transformer" / "config.json"
    files.write_json(place, files.read_json(place) | {"norm_eps": 1e-4})
    opened, sampled = [], []

    def record(pipeline, source, asked: Sampling, *more: object) -> None:
        sampled.append((asked.batch, asked.seed))
        assert opened == ["float32", "float32", "bfloat16"]
        if len(sampled) == 3:
            raise InterruptedError

    load = comparison.open_model
    for module in (run, comparison):
        monkeypatch.setattr(module, "open_model", lambda *given: opened.append(given[2]) or load(*given))
    monkeypatch.setattr(comparison, "sample", record)
    ask = {"samples": SAMPLES, "steps": STEPS, "batch": 1, "noise_floor": True, "accept_config": True}
    with pytest.raises(InterruptedError):
        quantdit.evaluate(changed, changed, tmp_path / "out", **ask)
    assert sampled == [(1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize("kept", [True, False])
def test_samples_of_several_shapes_are_refused(pair: tuple[Path, Path], tmp_path: Path, monkeypatch, kept: bool) -> None:
    def several(pipeline, part: dict, asked: Sampling) -> list[dict]:
        empty = {"latents": torch.zeros(1), "timesteps": torch.zeros(1)}
        return [{"image": torch.zeros(1, 16, 16 + i)} | empty for i in range(asked.samples)]

    monkeypatch.setattr(samples, "_run", several)
    pipeline, source = load_pipeline(str(pair[0]))
    words = "kept: kept samples differ in shape" if kept else "^full: its samples differ in shape"
    with pytest.raises(ValueError, match=words):
        sample(pipeline, source, Sampling(samples=2, steps=1), tmp_path / "kept" if kept else None)


def test_one_run_says_one_value_of_each_measure(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The drift table, the sets, the rows and the gate agree to the last digit."""
    pytest.importorskip("efficientnet_lite_pytorch")
    report = quantdit.evaluate(*pair, tmp_path, samples=8, steps=STEPS, noise_floor=True)
    drift, sets = report["drift"], report["sets"]
    kid, fd = sets["KID-EffNetLite0"], sets["FD-EffNetLite0"]
    assert drift["KID-EffNetLite0"]["drift"] == {"mean": kid["drift"], "standard_error": kid["standard_error"]}
    assert drift["FD-EffNetLite0"]["drift"] == fd["drift"]
    found = {f.name: f for f in judge.gate(report, judge.make_baseline(report)).findings}
    assert found["SSIM"].candidate == pytest.approx(drift["SSIM"]["mean"], rel=1e-5)
    assert found["PSNR"].candidate == pytest.approx(drift["PSNR"]["mean"], rel=1e-5)
    assert found["KID-EffNetLite0"].candidate == kid["drift"]


def test_a_single_image_is_no_distribution(pixel_dit: Path, tmp_path: Path, cli) -> None:
    ran = cli("evaluate", pixel_dit, pixel_dit, "--samples", 1, "--output", tmp_path)
    assert ran.code == 1 and "at least 4, better 64; give --samples 64" in ran.error
    ran = cli("evaluate", pixel_dit, pixel_dit, "--seeds", 1, "--output", tmp_path)
    assert ran.code == 1 and "got 3 samples, " in ran.error and "give --seeds 22" in ran.error, "of three classes"
