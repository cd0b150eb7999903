"""The models known by name: their shapes are the published ones, and each can be run at the sizes it is calibrated at."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor, nn

from quantdit.models.adapter import ADAPTERS, adapter_for, layers
from quantdit.models.known_models import CONFIGS, EMBEDDED, KNOWN_MODELS, transformer_config
from quantdit.models.synthetic import latent_of, prediction, synthetic_inputs

# Parameters of one transformer as diffusers' class has them, pinned: a changed config shows here. The public figure beside it
# is that of the model's card or paper, or the size of its published weight files by the bytes of their type.
PARAMETERS: dict[str, tuple[int, float]] = {
    "wan-1.3b": (1_418_996_800, 1.42e9),
    "wan-14b": (14_288_491_584, 14.3e9),
    "wan2.2-5b": (4_999_787_712, 5.0e9),
    "wan2.2-a14b": (14_288_491_584, 14.3e9),
    "flux-dev": (11_901_408_320, 11.9e9),
    "flux-schnell": (11_891_178_560, 11.9e9),
    "sd3.5-medium": (2_243_171_520, 2.24e9),  # without its table of positions, a buffer of 0.23 B
    "pixart-alpha": (611_349_152, 0.611e9),
    "pixart-sigma": (610_856_096, 0.611e9),
    # The paper's 675 M, and 27 more copies of the embedders of timestep and class.
    "dit-xl-2-256": (749_826_464, 675e6 + 27 * 1152 * (256 + 1152 + 1001)),
    "dit-xl-2-512": (749_826_464, 675e6 + 27 * 1152 * (256 + 1152 + 1001)),
    "hunyuanvideo": (12_821_012_544, 12.8e9),
    "cogvideox-2b": (1_693_783_872, 1.69e9),
    "cogvideox-5b": (5_570_283_072, 5.57e9),
    "ltx-video": (1_923_385_472, 1.92e9),
    "latte": (1_057_246_880, 1.06e9),
    "sana": (1_604_462_752, 1.6e9),
    "qwen-image": (20_430_401_088, 20.43e9),
    "z-image": (6_154_908_736, 6.15e9),
    "z-image-turbo": (6_154_908_736, 6.15e9),
}

# How much of the linears' weights lies in the blocks, at least.
IN_BLOCKS = 0.94

DEPTHS = ("num_layers", "num_single_layers", "num_refiner_layers", "n_layers", "n_refiner_layers")


def on_meta(config: dict) -> nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config).eval()


def test_every_alias_but_the_embedded_ones_has_its_shapes_in_the_package() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {name for name, alias in KNOWN_MODELS.items() if alias.hub}
    assert set(PARAMETERS) == {path.stem for path in CONFIGS.glob("*.json")}
    for name, alias in KNOWN_MODELS.items():
        assert transformer_config(name)["_class_name"] == alias.transformer
        assert alias.transformer in ADAPTERS
        assert alias.hub or (EMBEDDED / name).is_dir()
    with pytest.raises(ValueError, match=r"unknown model 'nothing'; known names: .*wan-1\.3b"):
        transformer_config("nothing")


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_the_published_ones(name: str) -> None:
    config = transformer_config(name)
    model = on_meta(config)
    assert set(config) <= {*model.config, "_class_name"}, "a field that the class does not know would be ignored"
    count = sum(parameter.numel() for parameter in model.parameters())
    pinned, public = PARAMETERS[name]
    assert count == pinned
    assert count == pytest.approx(public, rel=0.005)
    amount, unit = KNOWN_MODELS[name].parameters.split()
    shown = float(amount) * {"M": 1e6, "B": 1e9}[unit]
    assert shown == pytest.approx(count * len(KNOWN_MODELS[name].transformers), rel=0.03)

    found = layers(model, adapter_for(model))
    weights = {layer.name: layer.out_features * layer.in_features for layer in found}
    assert not any(layer.role == "other" for layer in found)
    inside = sum(weights[layer.name] for layer in found if layer.role != "outside")
    assert inside > IN_BLOCKS * sum(weights.values())


def to_meta(value: object) -> object:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: to_meta(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return type(value)(to_meta(entry) for entry in value)
    return value


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_made_up_inputs_fit_the_real_widths_at_the_calibrated_sizes(name: str) -> None:
    """Shapes only, on the meta device, with few blocks of each kind."""
    config = transformer_config(name)
    model = on_meta(config | {depth: min(config[depth], 2) for depth in DEPTHS if depth in config}).to(torch.bfloat16)
    adapter = adapter_for(model)
    for capture in (KNOWN_MODELS[name].cpu, KNOWN_MODELS[name].gpu):
        inputs = synthetic_inputs(model, adapter, capture.latent, torch.Generator().manual_seed(0))
        latent = latent_of(adapter, inputs)
        with torch.no_grad(), torch.device("meta"):
            output = model(**to_meta(inputs))
        assert prediction(adapter, output, latent).shape == latent.shape


# Pixels and frames to a latent cell, by transformer class or alias: what the model's autoencoder makes of them.
CELLS = {"wan2.2-5b": (16, 4), "ltx-video": (32, 8), "sana": (32, 1), "latte": (8, 1)}


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_latent_sizes_are_those_of_the_samples(name: str) -> None:
    alias = KNOWN_MODELS[name]
    cell, step = (1, 1) if not alias.hub else CELLS.get(name, (8, 4))
    for capture in (alias.cpu, alias.gpu):
        size = capture.latent
        assert (size.height * cell, size.width * cell) == (capture.height, capture.width)
        assert (size.frames - 1) * step + 1 == capture.frames
        assert capture.steps > 0 and capture.samples > 0
    assert alias.cpu.latent.height * alias.cpu.latent.width <= alias.gpu.latent.height * alias.gpu.latent.width
