"""Made-up weights: seeded, heavy-tailed, in the true shapes, and never taken for real ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantdit.checkpoints import random_weights
from quantdit.checkpoints.random_weights import OUTLIER_EVERY, OUTLIER_SCALE, write_random_transformer
from quantdit.compiling import compile as compile_module
from quantdit.compiling.report import RANDOM_WARNING, REPORT
from quantdit.models import known_models
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files
from quantdit.system.files import WEIGHTS

ALIAS = "wan-1.3b"
TINY = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 48,
    "freq_dim": 16,
    "ffn_dim": 1024,
    "num_layers": 2,
}
FEED = "blocks.0.ffn.net.0.proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "transformer"
    write_random_transformer(TINY, folder, 0)
    return folder


@pytest.fixture
def calibrate(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`quantdit calibrate --random-weights` of the tiny shapes under a known name; quick unless a test says otherwise."""
    from quantdit.recipes.sampling_plan import Size

    monkeypatch.setattr(compile_module, "transformer_config", lambda name: TINY)
    small = SamplingPlan(1, 2, guidance=3.0, height=64, width=64, frames=9, latent=Size(1, 3, 4, 4, 8))
    for name in (ALIAS, "wan-14b", "wan2.2-a14b"):
        monkeypatch.setitem(known_models.KNOWN_MODELS, name, replace(known_models.KNOWN_MODELS[name], cpu=small))

    def run(*more: object, model: str = ALIAS, output: str = "out"):
        where = ("--model", model, "--random-weights", "--bits", "w8a16", "--output", tmp_path / output)
        return cli("calibrate", *where, "--samples", "0", *more)

    return run


def kurtosis(x: Tensor) -> float:
    x = x.flatten().double() - x.double().mean()
    return float((x**4).mean() / (x**2).mean() ** 2)


# ---- the weights


def test_same_seed_same_bytes_other_seed_others(made: Path, tmp_path: Path):
    for name, seed in (("again", 0), ("other", 1)):
        write_random_transformer(TINY, tmp_path / name, seed)
    assert files.digest(made) == files.digest(tmp_path / "again") != files.digest(tmp_path / "other")
    mine, others = (load_file(folder / WEIGHTS) for folder in (made, tmp_path / "other"))
    assert mine.keys() == others.keys()
    assert not any(torch.equal(mine[name], others[name]) for name in mine)
    assert json.loads((made / "config.json").read_text()) == TINY


def test_the_default_dtype_changes_no_byte(made: Path, tmp_path: Path):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        write_random_transformer(TINY, tmp_path / "wide", 0)
    finally:
        torch.set_default_dtype(before)
    assert (tmp_path / "wide" / WEIGHTS).read_bytes() == (made / WEIGHTS).read_bytes()


def test_tensors_differ_from_each_other(made: Path):
    stored = load_file(made / WEIGHTS)
    assert not torch.equal(stored["blocks.0.attn1.to_q.weight"], stored["blocks.0.attn1.to_k.weight"])
    assert not torch.equal(stored["blocks.0.attn1.to_q.weight"], stored["blocks.1.attn1.to_q.weight"])
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_tails_are_heavy_and_a_few_channels_stand_out(made: Path):
    weight = load_file(made / WEIGHTS)[FEED].float()
    rows = weight.std(1)
    outliers = torch.arange(0, len(weight), OUTLIER_EVERY)
    usual = torch.ones(len(weight), dtype=torch.bool)
    usual[outliers] = False
    assert rows[outliers].min() > 0.6 * OUTLIER_SCALE * rows[usual].median()
    assert rows[usual].max() < 2 * rows[usual].median()
    # 3 for a normal variable, 9 for Student's t of 5 degrees; a sample's is below, and noisy.
    assert 5 < kurtosis(weight[usual]) < 30
    # The variance of what comes out is that of what goes in.
    assert float(weight[usual].std() * weight.shape[1] ** 0.5) == pytest.approx(1, abs=0.05)


def test_norms_are_near_one_and_biases_near_zero(made: Path):
    stored = load_file(made / WEIGHTS)
    assert float(stored["blocks.0.attn1.norm_q.weight"].float().mean()) == pytest.approx(1, abs=0.1)
    biases = torch.cat([t.float().flatten() for name, t in stored.items() if name.endswith("bias")])
    assert 0.01 < float(biases.std()) < 0.05


def test_the_model_runs_and_its_output_is_finite(made: Path):
    from quantdit.checkpoints.streaming import whole
    from quantdit.models.adapter import adapter_for
    from quantdit.models.synthetic import synthetic_inputs
    from quantdit.recipes.sampling_plan import Size

    model = whole(made, torch.float32)
    inputs = synthetic_inputs(model, adapter_for(model), Size(1, 3, 4, 4, 8), torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(**inputs).sample
    assert bool(torch.isfinite(output).all()) and 0.01 < float(output.std()) < 100


def test_whole_folder_is_left_as_it_is_and_an_interrupted_one_is_not(made: Path, tmp_path: Path):
    folder = Path(shutil.copytree(made, tmp_path / "x"))
    (folder / WEIGHTS).write_text("mine")
    write_random_transformer(TINY, folder, 5)
    assert (folder / WEIGHTS).read_text() == "mine"
    (folder / "config.json").unlink()
    write_random_transformer(TINY, folder, 0)
    assert files.digest(folder) == files.digest(made)


# ---- the command


def test_output_says_loudly_that_its_weights_are_made_up(calibrate, tmp_path: Path):
    ran = calibrate()
    assert ran.code == 0 and f"warning: {RANDOM_WARNING}" in ran.err and "RANDOM WEIGHTS" in RANDOM_WARNING
    report = files.read_json(tmp_path / "out" / REPORT)
    assert report["warning"] == RANDOM_WARNING and report["provenance"]["random_weights"] is True
    config = files.read_json(tmp_path / "out" / "transformer" / "config.json")["quantization_config"]
    assert config["provenance"]["random_weights"] is True and config["provenance"]["source"] == ALIAS
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"transformer", REPORT}


def test_real_weights_are_not_called_made_up(calibrate, cli, made: Path, tmp_path: Path):
    ran = cli("calibrate", "--model", made, "--bits", "w8a16", "--output", tmp_path / "real", "--samples", "0")
    report = files.read_json(tmp_path / "real" / REPORT)
    assert ran.code == 0 and "RANDOM" not in ran.err and "warning" not in report
    assert "random_weights" not in report["provenance"]


def test_the_seed_makes_the_weights(calibrate, tmp_path: Path):
    digests = []
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert calibrate("--seed", seed, output=output).code == 0
        digests.append(files.read_json(tmp_path / output / REPORT)["provenance"]["source_sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_two_experts_have_weights_of_their_own(calibrate, tmp_path: Path):
    ran = calibrate(model="wan2.2-a14b")
    assert ran.code == 0, ran.err
    report = files.read_json(tmp_path / "out" / REPORT)
    assert report["model_rel_rmse_of_parts"].keys() == {"transformer", "transformer_2"}
    parts = [load_file(tmp_path / "out" / part / WEIGHTS) for part in ("transformer", "transformer_2")]
    assert not torch.equal(parts[0]["blocks.0.ffn.net.2.data"], parts[1]["blocks.0.ffn.net.2.data"])


@pytest.mark.parametrize("model", ["fashion-dit", "wan-1.4b", "some/where"])
def test_unknown_and_embedded_names_are_refused(calibrate, tmp_path: Path, model: str):
    ran = calibrate(model=model)
    assert ran.code == 1 and "--random-weights needs a known model that is not embedded" in ran.error and model in ran.error
    assert not list(tmp_path.iterdir())


def test_not_with_weights(calibrate, tmp_path: Path):
    ran = calibrate("--weights", tmp_path)
    assert ran.code == 2 and "not allowed with" in ran.err


def test_weights_of_another_seed_or_model_are_not_taken_up(calibrate, tmp_path: Path):
    """What a killed run left beside its output belongs to that run."""
    assert calibrate("--seed", "1", output="right").code == 0
    random_weights.open_scratch(tmp_path / "out.random", {"model": ALIAS, "seed": 0})
    write_random_transformer(TINY, tmp_path / "out.random" / "transformer", 0)
    assert calibrate("--seed", "1").code == 0
    made = [files.read_json(tmp_path / name / REPORT)["provenance"]["source_sha256"] for name in ("out", "right")]
    assert made[0] == made[1]
    random_weights.open_scratch(tmp_path / "next.random", {"model": "wan-14b", "seed": 0})
    write_random_transformer(TINY | {"num_layers": 1}, tmp_path / "next.random" / "transformer", 0)
    assert calibrate(output="next").code == 0
    assert "blocks.1.ffn.net.2.weight" not in files.read_json(tmp_path / "next" / REPORT)["layers"]
    assert "blocks.1.ffn.net.2" in files.read_json(tmp_path / "next" / REPORT)["layers"]


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)])
def test_folder_of_the_user_is_never_deleted(calibrate, tmp_path: Path, more: tuple[str, ...]):
    (tmp_path / "out.random").mkdir()
    (tmp_path / "out.random" / "precious").write_text("x")
    ran = calibrate(*more)
    assert ran.code == 1 and "out.random" in ran.error and "holds something else" in ran.error
    assert (tmp_path / "out.random" / "precious").read_text() == "x"


def test_output_that_is_there_is_refused_before_weights_are_made(calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    monkeypatch.setattr(compile_module, "write_random_transformer", lambda *a: pytest.fail("weights were made"))
    ran = calibrate()
    assert ran.code == 1 and "not empty" in ran.error and "--overwrite" in ran.error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resumed_run_takes_up_its_weights(calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from quantdit.checkpoints import checkpoint

    assert calibrate(output="whole").code == 0

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_transformer", interrupt)
        assert calibrate().code == 130
    before = (tmp_path / "out.random" / "transformer" / WEIGHTS).stat()
    with monkeypatch.context() as patch:
        patch.setattr(random_weights, "write_tensors", lambda *a: pytest.fail("weights were made anew"))
        assert calibrate("--resume").code == 0
    assert before.st_size and files.digest(tmp_path / "out" / "transformer") == files.digest(tmp_path / "whole" / "transformer")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "whole"}
