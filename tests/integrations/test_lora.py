"""LoRA through diffusers and PEFT on quantized transformers: what it does, fused or not, is what it does in full precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantdit
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.recipes.rules import Recipe, Rule

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "net.0.proj"]
RANK = 4
# The LoRA's effect passes through quantized layers: a tenth of it at w4a8 and worse on random weights; measured below.
DRIFT = 0.15


def adapter_of(model: nn.Module, seed: int = 7, rank: int = RANK) -> dict[str, Tensor]:
    """Return a LoRA for the model's attention and feed-forward, in the naming of files, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS)):
            down = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            up = torch.randn(module.out_features, rank, generator=generator) / rank**0.5 * 0.5
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down, up
    return state


def add(model: nn.Module, state: dict[str, Tensor], name: str = "style") -> None:
    """Load an adapter as diffusers does; for a class without its mixin, with PEFT itself."""
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(dict(state), prefix=None, adapter_name=name)
        return
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[f"{t}" for t in TARGETS])
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    found = peft.set_peft_model_state_dict(model, state, adapter_name=name)
    assert not found.unexpected_keys


def remove(model: nn.Module) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    model.unload_lora() if hasattr(model, "unload_lora") else recurse_remove_peft_layers(model)


def fuse(model: nn.Module, back: bool = False) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if hasattr(model, "fuse_lora"):
        model.unfuse_lora() if back else model.fuse_lora()
        return
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.unmerge() if back else module.merge()


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_its_effect_is_that_on_the_full_precision_model(made, run):
    full, quantized = (
        made.cls.from_pretrained(made.folder / "full"),
        made.cls.from_pretrained(made.folder / "full", quantization_config=quantdit.QuantDiTConfig(bits="w8a8")),
    )
    state = adapter_of(full)
    for inputs in made.inputs:
        before = [run(m, inputs) for m in (full, quantized)]
        for m in (full, quantized):
            add(m, state)
        effect, expected = run(quantized, inputs) - before[1], run(full, inputs) - before[0]
        assert float(expected.norm()) > 0.02 * float(before[0].norm()), "an adapter that does nothing proves nothing"
        print(made.name, rel(effect, expected))
        assert rel(effect, expected) < DRIFT
        for m in (full, quantized):
            remove(m)
        assert torch.equal(run(quantized, inputs), before[1])


def test_fused_is_what_unfused_is_and_unfusing_restores_every_bit(made, run):
    model = made.cls.from_pretrained(made.folder / "one")
    inputs = made.inputs[0]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    plain = run(model, inputs)
    add(model, adapter_of(model))
    loaded = run(model, inputs)
    fuse(model)
    fused = run(model, inputs)
    ranks = {layer.layer_spec.rank for layer in quant_layers(model).values()}
    assert RANK in ranks and RANK + 4 in ranks  # to_k has a branch of rank 4 already
    assert rel(loaded, plain) > 0.02
    print(made.name, rel(fused - plain, loaded - plain))
    # bfloat16 rounds rotated inputs' matrix to 2^-9; quantized activations downstream turn that into steps.
    assert rel(fused - plain, loaded - plain) < 0.1
    fuse(model, back=True)
    assert torch.equal(run(model, inputs), loaded)
    remove(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert torch.equal(run(model, inputs), plain)


def test_fused_into_one_layer_to_the_last_bits_of_bfloat16(made):
    """Without other layers behind it: the branch holds the product up to the rounding of its two factors."""
    model = made.cls.from_pretrained(made.folder / "one")
    generator = torch.Generator().manual_seed(1)
    for layer in quant_layers(model).values():
        up, down = torch.randn(layer.out_features, 3, generator=generator), torch.randn(3, layer.in_features, generator=generator)
        before = layer.weight
        layer.extend_branch(up, down)
        error = layer.weight - (before + up @ down)
        # Each factor is rounded to 2^-9 of its entries, which a smoothing factor of the layer may spread.
        assert float(error.norm()) < 2**-8 * float((up @ down).norm())


def test_a_fused_adapter_stays_when_its_layers_are_unloaded(made, run):
    model = made.cls.from_pretrained(made.folder / "one")
    add(model, adapter_of(model))
    fuse(model)
    fused = run(model, made.inputs[0])
    remove(model)
    assert torch.equal(run(model, made.inputs[0]), fused)


def test_two_adapters_with_weights_of_their_own(made, run):
    if not hasattr(made.model, "set_adapters"):
        pytest.skip("diffusers gives this class no adapters")
    models = [made.cls.from_pretrained(made.folder / "full")]
    models.append(made.cls.from_pretrained(made.folder / "full", quantization_config=quantdit.QuantDiTConfig(bits="w8a16")))
    changes = []
    for model in models:
        plain = run(model, made.inputs[0])
        add(model, adapter_of(model, 1), "one")
        add(model, adapter_of(model, 2), "two")
        model.set_adapters(["one", "two"], [0.5, 1.5])
        unfused = run(model, made.inputs[0])
        model.fuse_lora(adapter_names=["one", "two"])
        assert rel(run(model, made.inputs[0]) - plain, unfused - plain) < 0.02
        model.unfuse_lora()
        model.disable_lora()
        assert torch.equal(run(model, made.inputs[0]), plain) or model is models[0]  # full precision does not get its bits back
        changes.append(unfused - plain)
    assert rel(changes[1], changes[0]) < 0.05


def test_a_flux_pipeline_loads_fuses_and_unloads(tiny, run, tmp_path: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    transformer, calls = tiny("FluxTransformer2DModel")
    state = {f"transformer.{key}": t for key, t in adapter_of(transformer).items()}
    quantdit.quantize(transformer, "w4a8")
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing)
    plain = run(transformer, calls[0])
    pipeline.load_lora_weights(state, adapter_name="style")
    loaded = run(transformer, calls[0])
    assert pipeline.get_active_adapters() == ["style"] and rel(loaded, plain) > 0.02
    pipeline.fuse_lora(lora_scale=1.0)
    assert pipeline.num_fused_loras == 1
    assert rel(run(transformer, calls[0]) - plain, loaded - plain) < 0.1
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert torch.equal(run(transformer, calls[0]), plain)


@pytest.mark.parametrize("when", ["unfused", "fused"])
def test_dequantized_with_an_adapter_it_is_fused_as_ever(made, run, when: str):
    """The linear inside PEFT's layer is an ordinary one then, and so is fusing into it."""
    model = made.cls.from_pretrained(made.folder / "full", quantization_config=quantdit.QuantDiTConfig(bits="w8a16"))
    plain = run(model, made.inputs[0])
    add(model, adapter_of(model))
    if when == "fused":
        fuse(model)
    effect = run(model, made.inputs[0]) - plain
    model.dequantize()
    assert not quant_layers(model)
    if when == "unfused":
        fuse(model)
    assert rel(run(model, made.inputs[0]) - plain, effect) < 0.01
    fuse(model, back=True)
    assert rel(run(model, made.inputs[0]) - plain, effect) < 0.01 if when == "unfused" else True
    remove(model)
    assert float((run(model, made.inputs[0]) - plain).norm()) < 0.01 * float(effect.norm())


def test_saving_with_an_adapter_is_refused_and_without_it_is_not(made, tmp_path: Path):
    model = made.cls.from_pretrained(made.folder / "one")
    add(model, adapter_of(model))
    with pytest.raises(ValueError, match="unload_lora_weights"):
        model.save_pretrained(tmp_path / "out")
    fuse(model)
    remove(model)
    with pytest.raises(ValueError, match="unfuse_lora"):
        model.save_pretrained(tmp_path / "out")


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    from quantdit.calibration.data_free import quantize_without_data
    from quantdit.layers.quant_linear import QuantLinear
    from quantdit.recipes.presets import from_bits
    from quantdit.recipes.resolve import resolve
    from quantdit.recipes.rules import Layer

    plan = resolve(from_bits("w4a8"), [Layer("0", "attention", 64, 64)])["0"]
    made = quantize_without_data(model[0].weight, model[0].bias, plan, 0)
    return nn.Sequential(QuantLinear.from_tensors(made.spec, made.tensors, made.bias))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_are_more_than_a_product_run_but_are_not_fused(options: dict):
    """The dense layer before the quantized one is left alone, too."""
    base = nn.Sequential(nn.Linear(64, 64), *layer())
    dense = base[0].weight.clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False, **options))
    assert torch.isfinite(model(torch.randn(2, 64))).all()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="run it unfused"):
            merge()
    assert torch.equal(model.base_model.model[0].get_base_layer().weight, dense)


def test_other_kinds_of_adapters_are_never_lost_without_a_word():
    """PEFT would merge LoKr and LoHa into a decoded copy of the weight."""
    for config in (peft.LoKrConfig, peft.LoHaConfig):
        model = peft.get_peft_model(layer(), config(r=4, target_modules=["0"]))
        with pytest.raises(ValueError, match="unfused"):
            model.merge_adapter()


def test_an_adapter_of_a_larger_rank_than_the_weight_is_fused_and_unfused():
    """It is multiplied out: a product of 64 x 64 needs no branch of 80 columns."""
    model = peft.get_peft_model(layer(), peft.LoraConfig(r=80, target_modules=["0"], init_lora_weights=False))
    base, x = model.base_model.model[0].get_base_layer(), torch.randn(2, 64)
    before, loaded = {key: t.clone() for key, t in base.state_dict().items()}, model(x)
    model.merge_adapter()
    assert base.layer_spec.rank == 64
    assert rel(model(x), loaded) < 0.02
    model.unmerge_adapter()
    assert base.state_dict().keys() == before.keys() and all(torch.equal(t, before[k]) for k, t in base.state_dict().items())
    assert torch.equal(model(x), loaded)


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything but adapters, by the names of the model without them."""
    return {k.replace(".base_layer", ""): t.clone() for k, t in model.state_dict().items() if ".lora_" not in k}


def test_unfused_after_an_adapter_was_deleted_the_bits_are_those_before(made):
    model = made.cls.from_pretrained(made.folder / "one")
    if not hasattr(model, "set_adapters"):
        pytest.skip("diffusers gives this class no adapters")
    before = bits_of(model)
    for name in ("a", "b"):
        add(model, adapter_of(model, len(name)), name)
    model.set_adapters(["a", "b"])
    model.fuse_lora(adapter_names=["a", "b"])
    model.delete_adapters("b")
    model.unfuse_lora()
    after = bits_of(model)
    assert after.keys() == before.keys() and all(torch.equal(t, after[key]) for key, t in before.items())


def test_fusing_that_fails_at_the_last_layer_changes_none(tiny):
    """A dense layer comes before, which PEFT would have written to."""
    model, _ = tiny("WanTransformer3DModel")
    quantdit.quantize(model, Recipe("some", (Rule("blocks.0.*", "dense"), Rule("*", "int8", activation_bits=8))))
    state = adapter_of(model)
    last = [key for key in state if key.startswith("blocks.1") and key.endswith("lora_B.weight")][-1]
    state[last][0, 0] = float("nan")
    add(model, state)
    before = bits_of(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.fuse_lora(lora_scale=0.5)
    after = bits_of(model)
    assert all(torch.equal(t, after[key]) for key, t in before.items())
