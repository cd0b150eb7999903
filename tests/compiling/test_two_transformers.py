"""Two transformers in one pipeline (the experts of Wan 2.2): calibrated in one go, written, loaded, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from quantdit.checkpoints import streaming
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.compiling import quantize_blocks
from quantdit.compiling.report import REPORT
from quantdit.pipelines import pipeline
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.system import files

PARTS = ("transformer", "transformer_2")
TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
}
RECIPE = """
[[rule]]
match = "*.attn1.to_q"
weight = "int4"
activation_bits = 8
[[rule]]
match = "*"
weight = "dense"
"""
SMALL = ("--samples", "1", "--steps", "4", "--height", "32", "--width", "32", "--frames", "5", "--guidance", "3")


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diffusers' WanPipeline of two tiny experts, text encoder, tokenizer and autoencoder."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "bat", "moving", "left", "red"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = UMT5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    made = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        scheduler=UniPCMultistepScheduler(**flow),
        transformer=WanTransformer3DModel(**TINY_WAN),
        transformer_2=WanTransformer3DModel(**TINY_WAN),
        boundary_ratio=0.875,
    )
    folder = tmp_path_factory.mktemp("wan") / "tiny-wan"
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its two transformers alone."""
    folder = tmp_path_factory.mktemp("bare") / "two"
    for part in PARTS:
        shutil.copytree(tiny_wan / part, folder / part)
    return folder


@pytest.fixture
def calibrate(cli, tmp_path: Path):
    (tmp_path / "r.toml").write_text(RECIPE)

    def run(model: Path, *more: object, output: str = "out"):
        where = ("--model", model, "--recipe", tmp_path / "r.toml", "--output", tmp_path / output)
        return cli("calibrate", *where, *more)

    return run


def check_both(source: Path, out: Path) -> dict:
    """Both are quantized, on calls of their own, and come back; returns the report."""
    report = files.read_json(out / REPORT)
    names = [f"blocks.{i}.attn1.to_q" for i in range(2)]
    assert report["layers"].keys() == {*names, *(f"transformer_2.{name}" for name in names)}
    assert report["model_rel_rmse_of_parts"].keys() == set(PARTS)
    assert all(0 < error < 0.5 for error in report["model_rel_rmse_of_parts"].values())
    assert len(set(report["model_rel_rmse_of_parts"].values())) == 2
    assert {part: chain["count"] for part, chain in report["blocks"].items()} == dict.fromkeys(PARTS, 2)
    loaded, origin = load_pipeline(str(out))
    assert origin.components == PARTS
    assert all(quant_layers(getattr(loaded, part)).keys() == set(names) for part in PARTS)
    stored = sum(path.stat().st_size for part in PARTS for path in files.weight_files(out / part))
    assert report["size"]["file_bytes"] == stored and report["size"]["quantized_weights"] == 4 * 64 * 64
    assert not torch.equal(*(getattr(loaded, part).blocks[0].attn1.to_q.data for part in PARTS))
    return report


def test_whole_pipeline(calibrate, cli, tiny_wan: Path, tmp_path: Path):
    """Text is encoded, both experts are called on their own part of the trajectory, and the output generates clips."""
    (tmp_path / "prompts.txt").write_text("a bat moving left\n\n a red bat \n")
    ran = calibrate(tiny_wan, *SMALL, "--prompts", tmp_path / "prompts.txt")
    assert ran.code == 0, ran.err
    report = check_both(tiny_wan, tmp_path / "out")
    found = report["provenance"]["calibration"]
    assert found["prompts"] == ["a bat moving left", " a red bat "] and (found["height"], found["frames"]) == (32, 5)
    assert found["conditions"] == {"prompt": found["prompts"][: found["samples"]]}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in tiny_wan.iterdir()} | {REPORT}
    ran = cli("inspect", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    formats = {name: layer["format"].split()[0] for name, layer in json.loads(ran.out)["layers"].items()}
    assert list(formats.values()) == ["int4"] * 4 and "transformer_2.blocks.1.attn1.to_q" in formats
    loaded, _ = load_pipeline(str(tmp_path / "out"))
    arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "np"}
    frames = [
        p("a bat", generator=torch.Generator().manual_seed(0), **arguments).frames
        for p in (loaded, load_pipeline(str(tiny_wan))[0])
    ]
    assert frames[0].shape == (1, 5, 32, 32, 3) and 0 < abs(frames[0] - frames[1]).max() < 0.5


def test_other_prompts_give_other_bytes(calibrate, tiny_wan: Path, tmp_path: Path):
    sums = []
    for number, prompt in enumerate(("a bat", "a bat", "red")):
        (tmp_path / "prompts.txt").write_text(prompt)
        assert calibrate(tiny_wan, *SMALL, "--prompts", tmp_path / "prompts.txt", output=f"o{number}").code == 0
        report = files.read_json(tmp_path / f"o{number}" / REPORT)
        sums.append(json.dumps(report["model_rel_rmse_of_parts"]))
    assert sums[0] == sums[1] != sums[2]


def test_transformers_without_their_pipeline(calibrate, bare: Path, tmp_path: Path):
    ran = calibrate(bare, "--samples", "1", "--steps", "2")
    assert ran.code == 0, ran.err
    check_both(bare, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*PARTS, REPORT}


def test_both_are_exported_dense(calibrate, cli, bare: Path, tmp_path: Path):
    from diffusers import WanTransformer3DModel

    assert calibrate(bare, "--samples", "0").code == 0
    shutil.rmtree(tmp_path / "out" / "transformer")
    shutil.copytree(bare / "transformer", tmp_path / "out" / "transformer")  # the first may also be in full precision
    for folder in (bare, tmp_path / "out"):
        ran = cli("export", folder, "--to", "dense", "--output", tmp_path / "dense")
        assert (ran.code == 1 and "no quantization_config" in ran.error) if folder == bare else ran.code == 0, ran.err
    for part in PARTS:
        plain = WanTransformer3DModel.from_pretrained(tmp_path / "dense" / part)
        assert "quantization_config" not in plain.config and plain.blocks[0].attn1.to_q.weight.shape == (64, 64)


def test_known_model_with_one_of_its_two_is_refused(calibrate, bare: Path, tmp_path: Path):
    """Quantizing half a model without a word would be found out much later."""
    half = tmp_path / "half"
    shutil.copytree(bare / "transformer", half / "transformer")
    for folder in (half, half / "transformer"):
        ran = calibrate("wan2.2-a14b", "--weights", folder)
        assert ran.code == 1 and "no transformer_2" in ran.error and "--model" in ran.error
    assert calibrate(half, "--samples", "0").code == 0


def test_streamed_gives_the_bytes_of_resident(calibrate, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert calibrate(bare, "--samples", "1", "--steps", "2", output="resident").code == 0
    monkeypatch.setattr(streaming, "need_of", lambda *a: streaming.Need(resident=2**60, streamed=0))
    assert calibrate(bare, "--samples", "1", "--steps", "2", output="streamed").code == 0
    for part in PARTS:
        assert files.digest(tmp_path / "resident" / part) == files.digest(tmp_path / "streamed" / part)


def test_interrupted_in_the_second_goes_on_there(calibrate, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quick = ("--samples", "1", "--steps", "2")
    assert calibrate(bare, *quick, output="whole").code == 0
    done: list[int] = []
    real = quantize_blocks.quantize_layers

    def interrupted(*args: object) -> object:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_blocks, "quantize_layers", interrupted)
        assert calibrate(bare, *quick).code == 130
    with monkeypatch.context() as patch:
        patch.setattr(quantize_blocks, "quantize_layers", lambda *a: done.append(1) or real(*a))
        assert calibrate(bare, *quick, "--resume").code == 0
    assert len(done) == 4, "only the last block was left"
    for part in PARTS:
        assert files.digest(tmp_path / "out" / part) == files.digest(tmp_path / "whole" / part)


def test_text_encoder_that_does_not_fit_stays_on_the_disk(
    calibrate, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert calibrate(tiny_wan, *SMALL, output="resident").code == 0
    monkeypatch.setattr(pipeline, "_numbers", lambda path: 2**60)
    loaded, _ = load_pipeline(str(tiny_wan))
    assert type(loaded.text_encoder).__name__ == "UMT5EncoderModel"
    ran = calibrate(tiny_wan, *SMALL, output="offloaded")
    assert ran.code == 0, ran.err
    for part in PARTS:
        assert files.digest(tmp_path / "resident" / part) == files.digest(tmp_path / "offloaded" / part)


def test_a_real_pipeline_is_evaluated_at_the_size_it_was_calibrated_at(cli, tiny_wan: Path, tmp_path: Path) -> None:
    """Sizes, frames and the negative prompt reach diffusers' own pipeline; what it refuses is one line, and no traceback."""
    pytest.importorskip("efficientnet_lite_pytorch")
    (tmp_path / "prompts.txt").write_text("a bat\nred bat\n")
    ask = ("evaluate", tiny_wan, tiny_wan, "--samples", 4, "--steps", 2, "--probes", 1, "--output", tmp_path / "out")
    ask += ("--prompts", tmp_path / "prompts.txt", "--frames", 5, "--guidance", 3, "--negative-prompt", "moving left")
    assert "divisible by 16" in cli(*ask, "--height", 33, "--width", 32).error
    ran = cli(*ask, "--height", 32, "--width", 32, "--dtype", "bfloat16")
    assert ran.code == 0, ran.err
    report = files.read_json(tmp_path / "out" / "report.json")
    assert report["identity"]["shape"] == [5, 3, 32, 32] and report["identity"]["negative_prompt"] == "moving left"
