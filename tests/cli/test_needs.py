"""What a prompt alone cannot do: pipelines that need an image, experts that no token reaches."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

import quantdit
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan, Target
from quantdit.compiling.report import REPORT
from quantdit.layers.quant_linear import QuantLinear
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.resolve import layer_without_data, resolve
from quantdit.recipes.rules import Layer, Recipe, Rule
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files
from quantdit.system.files import Advice


@pytest.fixture(scope="module")
def image_to_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    folder = tmp_path_factory.mktemp("models") / "i2v"
    WanImageToVideoPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=12,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=64,
            num_layers=2,
        ),
        image_encoder=None,
        image_processor=None,
    ).save_pretrained(folder)
    return folder


def test_pipeline_that_needs_an_image_says_so_before_any_work(cli, image_to_video: Path, tmp_path: Path):
    ran = cli("calibrate", "--model", image_to_video, "--bits", "w8a8", "--steps", "1", "--output", tmp_path / "out")
    assert ran.code == 1 and not list(tmp_path.iterdir())
    for words in ("WanImageToVideoPipeline needs image", "--samples 0", "quantdit.quantize(pipeline.transformer"):
        assert words in ran.error
    ran = cli("generate", image_to_video, "--prompt", "a bat", "--steps", "1", "--output", tmp_path / "x.webp")
    assert ran.code == 1 and "WanImageToVideoPipeline needs image" in ran.error
    assert cli("calibrate", "--model", image_to_video, "--bits", "w8a8", "--samples", "0", "--output", tmp_path / "out").code == 0


# ---- experts without tokens


class Routed(nn.Module):
    """A linear beside another that no token is sent to: it is called with none, or not at all."""

    def __init__(self, width: int, with_nothing: bool) -> None:
        super().__init__()
        self.busy, self.idle, self.with_nothing = nn.Linear(width, width), nn.Linear(width, width), with_nothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.with_nothing:
            self.idle(x.reshape(-1, x.shape[-1])[:0])
        return x + 0.1 * self.busy(x)


@pytest.fixture(params=[True, False], ids=["called-with-nothing", "never-called"])
def routed(pixel_dit: Path, request: pytest.FixtureRequest):
    """A pipeline whose first block has experts, one of them idle."""
    pipeline, source = load_pipeline(str(pixel_dit))
    attention = pipeline.transformer.transformer_blocks[0].attn1
    attention.to_q = nn.Sequential(attention.to_q, Routed(64, request.param))
    return pipeline, source


IDLE = "transformer_blocks.0.attn1.to_q.1.idle"
# What needs data is left out for the one layer that has none.
HARD = Rule("*.attn1.to_q*", "int8", activation_bits=8, activation_scale="static", rotation="auto", smooth="rms", low_rank=4)
REST = Rule("*", "dense")


@pytest.mark.parametrize("rule", [HARD, Rule("*.attn1.to_q*", "trellis2_l12")], ids=lambda rule: rule.weight)
def test_layer_that_saw_nothing_is_quantized_without_data(routed, tmp_path: Path, rule: Rule):
    pipeline, source = routed
    from quantdit.recipes.finetuning import FineTuning

    training = FineTuning(steps=2, candidates=1) if rule is not HARD else None
    with pytest.warns(Advice, match=f"no call reached {IDLE},"):
        report = compile(
            pipeline,
            source,
            Plan(Recipe("r", (rule, REST)), SamplingPlan(samples=2, steps=2), finetuning=training),
            tmp_path / "out",
        )
    layers = report.layers
    assert [name for name, layer in layers.items() if not layer.get("calibrated", True)] == [IDLE]
    assert layers[IDLE]["weight_rel_rmse"] < 0.5 and "rel_rmse" not in layers[IDLE]
    assert all("rel_rmse" in layer for name, layer in layers.items() if name != IDLE)
    layer = pipeline.transformer.get_submodule(IDLE)
    assert isinstance(layer, QuantLinear) and not layer.layer_spec.activation.buckets


def test_widths_are_chosen_around_a_layer_that_saw_nothing(routed, tmp_path: Path):
    pipeline, source = routed
    rules = (Rule("*.attn1.to_q*", "auto", activation_bits=8), REST)
    with pytest.warns(Advice, match="no call reached"):
        report = compile(
            pipeline,
            source,
            Plan(Recipe("r", rules), SamplingPlan(samples=2, steps=2), target=Target(size_budget=0.4)),
            tmp_path / "out",
        )
    assert report.allocation["layers"][IDLE]["chosen"] == "table4"
    assert report.allocation["bytes"] <= report.allocation["budget_bytes"]


def test_report_with_such_a_layer_can_be_inspected(cli, copied: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    report = files.read_json(copied / REPORT)
    name, layer = next(iter(report["layers"].items()))
    kept = {key: layer[key] for key in ("spec", "method", "weight_histogram", "bits_per_weight")}
    report["layers"][name] = kept | {"weight_rel_rmse": 0.1, "calibrated": False}
    (copied / REPORT).write_text(json.dumps(report))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ran = cli("inspect", copied, "--plot", tmp_path / "x.png")
    assert ran.code == 0 and name in ran.out


def test_idle_experts_of_a_model_in_memory():
    """HiDream's router sends a few tokens to two experts of eight."""
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=16,
        num_routed_experts=8,
        num_activated_experts=2,
        axes_dims_rope=(16, 8, 8),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    call = {
        "hidden_states": torch.randn(1, 4, 4, 4),
        "timesteps": torch.tensor([500]),
        "encoder_hidden_states_t5": torch.randn(1, 2, 32),
        "encoder_hidden_states_llama3": torch.randn(2, 1, 2, 16),
        "pooled_embeds": torch.randn(1, 16),
    }
    with torch.no_grad():
        expected = model.eval()(**call, return_dict=False)[0]
    with pytest.warns(Advice, match="no call reached"):
        quantdit.quantize(model, "w8a8", [call])
    experts = [name for name, _ in model.named_modules() if ".experts." in name and name.endswith((".w1", ".w2", ".w3"))]
    assert len(experts) > 8 and all(isinstance(model.get_submodule(name), QuantLinear) for name in experts)
    with torch.no_grad():
        got = model(**call, return_dict=False)[0]
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_plan_without_data_keeps_what_needs_none():
    layers = [Layer("x.attn1.to_q", "attention", 64, 64)]
    plan = layer_without_data(resolve(Recipe("r", (HARD,)), layers)["x.attn1.to_q"])
    assert (plan.rule.weight, plan.rule.activation_bits, plan.rule.activation_scale) == ("int8", 8, "dynamic")
    assert (plan.rule.smooth, plan.rule.low_rank, plan.rule.rotation, plan.rule.method) == ("auto", 0, "auto", "rtn")
