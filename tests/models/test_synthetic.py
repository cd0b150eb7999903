"""Made-up inputs of every known transformer class: what its own pipeline would pass, and what a sampler needs around them."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from torch import Tensor, nn

from quantdit.calibration.observe import capture
from quantdit.models.adapter import ADAPTERS, Adapter, Input, adapter_for, layers
from quantdit.models.synthetic import latent_of, moved_inputs, prediction, synthetic_inputs
from quantdit.recipes.sampling_plan import Size
from tiny_models import TINY, UNKNOWN, tiny


def seeded_inputs(model: nn.Module, size: Size, seed: int = 0, **options: float) -> dict[str, object]:
    return synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(seed), **options)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def described(value: object) -> object:
    """Return shapes and dtypes in place of tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: described(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [described(entry) for entry in value]
    return value


def test_every_known_class_has_a_tiny_configuration() -> None:
    assert set(TINY) == set(ADAPTERS)
    assert not set(UNKNOWN) & set(ADAPTERS)


@pytest.mark.parametrize("name", [*TINY, *UNKNOWN])
def test_every_linear_has_a_role_and_is_called_by_made_up_inputs(name: str) -> None:
    model, size = tiny(name)
    adapter = adapter_for(model)
    linears = linears_of(model)
    found = {layer.name: layer.role for layer in layers(model, adapter)}
    assert set(found) == set(linears) and not adapter.skip
    assert "other" not in found.values()
    assert "attention" in found.values()

    inputs = seeded_inputs(model, size)
    called = set()
    for path, linear in linears.items():
        linear.register_forward_hook(lambda *_, path=path: called.add(path))
    with torch.no_grad():
        output = model(**inputs)
    assert called == set(linears)
    latent = latent_of(adapter, inputs)
    predicted = prediction(adapter, output, latent)
    assert predicted.shape == latent.shape and predicted.dtype == torch.float32
    assert bool(torch.isfinite(predicted).all()) and predicted.std() > 0


@pytest.mark.parametrize("name", [*TINY, *UNKNOWN])
def test_inputs_have_the_models_dtype_and_depend_on_nothing_but_the_seed(name: str) -> None:
    model, size = tiny(name)
    adapter = adapter_for(model)
    model = model.to(torch.bfloat16)
    first, again, other = (seeded_inputs(model, size, seed) for seed in (0, 0, 1))
    assert latent_of(adapter, first).dtype == torch.bfloat16
    assert torch.equal(latent_of(adapter, first), latent_of(adapter, again))
    assert not torch.equal(latent_of(adapter, first), latent_of(adapter, other))
    with torch.no_grad():
        output, same = (prediction(adapter, model(**i), latent_of(adapter, i)) for i in (first, again))
    assert torch.equal(output, same)

    meta = getattr(diffusers, name).from_config(model.config)
    meta = meta.to(device="meta", dtype=torch.bfloat16)
    assert torch.equal(latent_of(adapter, seeded_inputs(meta, size)), latent_of(adapter, first))


FLOW = ("FlowMatchEulerDiscreteScheduler", {})
UNIPC = ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True})
DPM_FLOW = ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True})
BOOL_MASK = torch.bool

# class: pipeline, its scheduler, pixels and frames to a latent cell, what its text encoder's mask is.
PIPELINES = {
    "AuraFlowTransformer2DModel": ("AuraFlowPipeline", FLOW, 8, 1, torch.int64),
    "ChromaTransformer2DModel": ("ChromaPipeline", FLOW, 8, 1, torch.bfloat16),
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline", ("CogVideoXDDIMScheduler", {}), 8, 4, torch.int64),
    "CogView4Transformer2DModel": ("CogView4Pipeline", FLOW, 8, 1, torch.int64),
    "DiTTransformer2DModel": ("DiTPipeline", ("DDIMScheduler", {}), 8, 1, torch.int64),
    "Flux2Transformer2DModel": ("Flux2Pipeline", FLOW, 8, 1, torch.int64),
    "FluxTransformer2DModel": ("FluxPipeline", FLOW, 8, 1, torch.int64),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideoPipeline", FLOW, 8, 4, torch.int64),
    "LTXVideoTransformer3DModel": ("LTXPipeline", FLOW, 32, 8, BOOL_MASK),
    "LatteTransformer3DModel": ("LattePipeline", ("DDIMScheduler", {}), 8, 1, torch.int64),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline", FLOW, 8, 1, torch.int64),
    "MochiTransformer3DModel": ("MochiPipeline", ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}), 8, 6, BOOL_MASK),
    "PixArtTransformer2DModel": ("PixArtAlphaPipeline", ("DPMSolverMultistepScheduler", {}), 8, 1, torch.int64),
    "QwenImageTransformer2DModel": ("QwenImagePipeline", FLOW, 8, 1, torch.int64),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", FLOW, 8, 1, torch.int64),
    "SanaTransformer2DModel": ("SanaPipeline", DPM_FLOW, 32, 1, torch.int64),
    "WanTransformer3DModel": ("WanPipeline", UNIPC, 8, 4, torch.int64),
    "ZImageTransformer2DModel": ("ZImagePipeline", FLOW, 8, 1, torch.int64),
}

PARTS = ("vae", *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")))
PARTS += ("image_encoder", "feature_extractor")


class Reached(Exception):
    pass


@pytest.mark.parametrize("name", PIPELINES)
def test_inputs_are_what_the_pipeline_passes(name: str) -> None:
    """Diffusers' own pipeline, without its encoders, calls the same transformer: same arguments, shapes, dtypes, times."""
    model, size = tiny(name)
    model = model.to(torch.bfloat16)
    made = seeded_inputs(model, size)
    pipeline_name, (scheduler, options), cell, frames, mask = PIPELINES[name]
    pipeline_class = getattr(diffusers, pipeline_name)
    parts = {part: None for part in inspect.signature(pipeline_class.__init__).parameters if part in PARTS}
    pipeline = pipeline_class(transformer=model, scheduler=getattr(diffusers, scheduler)(**options), **parts)
    text = made.get("encoder_hidden_states", made.get("cap_feats"))
    # Two prompts of unequal length: a mask of ones only is left out by some pipelines.
    masks = torch.ones(size.batch, size.tokens, dtype=mask)
    masks[1, -1] = 0
    offered = {
        "prompt": None,
        "class_labels": [3, 7],
        "negative_prompt": None,
        "prompt_embeds": text,
        "prompt_attention_mask": masks,
        "prompt_embeds_mask": masks,
        "pooled_prompt_embeds": made.get("pooled_projections"),
        "height": size.height * cell,
        "width": size.width * cell,
        "num_frames": (size.frames - 1) * frames + 1,
        "video_length": size.frames,
        "true_cfg_scale": 1.0,
        "num_inference_steps": 4,
        "max_sequence_length": size.tokens,
        "use_resolution_binning": False,
        "clean_caption": False,
        "mask_feature": False,
    }
    if "guidance" not in made:
        offered["guidance_scale"] = 0.0 if isinstance(text, list) else 1.0  # no second branch
    accepted = inspect.signature(pipeline_class.__call__).parameters
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    passed: dict[str, object] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        passed.update(zip(names, args, strict=False))
        passed.update(kwargs)
        raise Reached

    model.register_forward_pre_hook(record, with_kwargs=True)
    with pytest.raises(Reached):
        pipeline(**{key: value for key, value in offered.items() if key in accepted})
    passed = {k: v for k, v in passed.items() if v is not None and k != "return_dict" and not k.endswith("attention_kwargs")}
    assert described(passed) == described(made)

    # Whatever a class calls its time: at the same noise the made-up one is the pipeline's.
    argument = next(spec.name for spec in adapter_for(model).inputs if spec.kind.endswith("timestep"))
    first = passed[argument].flatten()[0].item()
    time = float(pipeline.scheduler.timesteps[0])
    time = 1000 - time if options.get("invert_sigmas") else time
    moved = moved_inputs(model, adapter_for(model), made, latent_of(adapter_for(model), made), time)
    assert moved[argument].flatten()[0].item() == pytest.approx(first, abs=1e-6)
    for key in ("img_ids", "txt_ids", "original_size", "target_size", "crop_coords", "image_rotary_emb", "guidance"):
        if key in made:
            for mine, theirs in zip(_tensors(made[key]), _tensors(passed[key]), strict=True):
                torch.testing.assert_close(mine, theirs)


def _tensors(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


# What the names of a forward's arguments do not tell: HunyuanVideo's text refiner lies deeper than its blocks.
DERIVED_BLOCKS = {"HunyuanVideoTransformer3DModel": {"transformer_blocks", "single_transformer_blocks"}}
NOT_DERIVED = {
    "CogVideoXTransformer3DModel",  # frames before channels
    "Flux2Transformer2DModel",  # ids of four columns
    "LTXVideoTransformer3DModel",  # cells, not patches, are tokens
    "LatteTransformer3DModel",  # a fixed number of frames
    "PixArtTransformer2DModel",  # a dictionary
    "ZImageTransformer2DModel",  # names of its own
}


@pytest.mark.parametrize("name", TINY)
def test_most_of_what_is_written_down_would_also_be_derived(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = tiny(name)
    written = ADAPTERS[name]
    monkeypatch.delitem(ADAPTERS, name)
    adapter = adapter_for(model)
    assert set(adapter.blocks) == DERIVED_BLOCKS.get(name, set(written.blocks))
    if name not in NOT_DERIVED:
        inputs = seeded_inputs(model, size)
        with torch.no_grad():
            predicted = prediction(adapter, model(**inputs), latent_of(adapter, inputs))
        assert predicted.shape == latent_of(written, inputs).shape
        assert bool(torch.isfinite(predicted).all())


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

    def forward(self, hidden_states: Tensor, weather: Tensor) -> Tensor:
        return self.blocks[0](hidden_states)


def test_an_unknown_argument_is_named_with_what_to_do() -> None:
    model = Toy()
    with pytest.raises(ValueError, match=r"Toy: .* hidden_states, weather, .* pipeline's folder.*ADAPTERS"):
        seeded_inputs(model, Size())


def test_prediction_leaves_out_variance_and_condition_channels_and_turns_reversed_models_around() -> None:
    shape = ("batch", "in_channels", "height", "width")
    plain = Adapter(("blocks",), inputs=(Input("x", "latent", shape), Input("t", "timestep", ("batch",))))
    reverse = Adapter(("blocks",), inputs=(Input("x", "latent", shape), Input("t", "reversed_timestep", ("batch",))))
    output = torch.arange(1.0, 5.0).view(1, 4, 1, 1)
    assert prediction(plain, (output,), torch.zeros(1, 2, 1, 1)).flatten().tolist() == [1, 2]
    assert prediction(plain, (output,), torch.zeros(1, 6, 1, 1)).flatten().tolist() == [1, 2, 3, 4, 0, 0]
    assert prediction(reverse, (output,), torch.zeros(1, 4, 1, 1)).flatten().tolist() == [-1, -2, -3, -4]


def test_text_states_have_heavy_tails_and_end_with_their_prompt() -> None:
    model, _ = tiny("WanTransformer3DModel")
    wide = type(model)(**{**model.config, "text_dim": 2048})
    text = seeded_inputs(wide, Size(16, 1, 8, 8, 64))["encoder_hidden_states"]
    ends = (text != 0).any(-1).sum(-1)
    assert ends.max() == 64 and ends.min() >= 32 and len(set(ends.tolist())) > 4
    scales = text[text.abs().sum(-1) > 0].std(0)
    assert (scales > 5 * scales.median()).sum() == 2048 // 512
    usual = text[:, :32][..., scales < 5 * scales.median()] / scales[scales < 5 * scales.median()]
    # Student's t of 4 degrees is beyond 4 standard deviations 75 times as often as a normal variable: 4.8e-3 of 1.
    assert 3e-3 < (usual.abs() > 4).float().mean() < 7e-3


SHARED = {
    "WanTransformer3DModel": {
        "blocks.0.attn1.to_q": ("blocks.0.attn1.to_k", "blocks.0.attn1.to_v"),
        "blocks.1.attn2.to_k": ("blocks.1.attn2.to_v",),
    },
    "FluxTransformer2DModel": {
        "transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"),
        "transformer_blocks.0.attn.add_q_proj": ("transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.add_v_proj"),
        "single_transformer_blocks.1.proj_mlp": tuple(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"),
    },
    "SD3Transformer2DModel": {
        "transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"),
        "transformer_blocks.0.attn2.to_q": ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_v"),
        "transformer_blocks.2.attn.add_q_proj": ("transformer_blocks.2.attn.add_k_proj", "transformer_blocks.2.attn.add_v_proj"),
    },
}


@pytest.mark.parametrize("name", SHARED)
def test_linears_with_a_common_input_share_their_statistics(name: str) -> None:
    model, size = tiny(name)
    stats: dict = {}
    with torch.no_grad(), capture.collecting(linears_of(model), 1, stats):
        model(**seeded_inputs(model, size))
    for first, others in SHARED[name].items():
        assert all(stats[other] is stats[first] for other in others), first
    attention = stats[next(iter(SHARED[name]))]
    assert not any(attention is s for path, s in stats.items() if path.endswith(("to_out.0", "net.2")))
