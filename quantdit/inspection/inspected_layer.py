"""The quantized layers of a model, described: what each is made of, and what calibration found."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quantdit.checkpoints import checkpoint
from quantdit.layers.quant_linear import QuantLinear, weight_bits
from quantdit.models import adapter as adapters

# The error of a layer that saw calibration data, and of one that did not, by its name in the report.
WITH_DATA = "rel_rmse"
WITHOUT_DATA = "weight_rel_rmse"
OUTSIDE = "outside"


@dataclass(frozen=True)
class InspectedLayer:
    """One quantized layer: what it is made of, and what calibration found.

    Attributes:
        name: its path in the transformer, after the name of the transformer if that is not the first.
        role: as rules of a recipe name it.
        block: the transformer block it lies in, "outside" for none.
        shape: outputs, inputs.
        format: of the weight, with its group size.
        bits: stored for each weight.
        transform: of the inputs.
        activations: their format.
        error: `rel_rmse` of the output, or of the weight where there was no calibration data; None if nothing is known.
        has_data: `error` is that of the output.
        rms: J, the root mean square of the layer's inputs; None without calibration data.
    """

    name: str
    role: str
    block: str
    shape: tuple[int, int]
    format: str
    bits: float
    transform: str
    activations: str
    error: float | None
    has_data: bool
    rms: float | None


def roles_of(transformer: nn.Module) -> dict[str, tuple[str, str]]:
    """Return role and block of each quantized layer, by its name."""
    adapter = adapters.adapter_for(transformer)
    roles = {layer.name: layer.role for layer in adapters.layers(transformer, adapter)}
    blocks = [path for path, _ in adapters.blocks(transformer, adapter)]

    def block(name: str) -> str:
        return next((path for path in blocks if name.startswith(f"{path}.")), OUTSIDE)

    return {name: (roles.get(name, OUTSIDE), block(name)) for name in checkpoint.quant_layers(transformer)}


def describe_layer(name: str, layer: QuantLinear, role: str, block: str, entry: dict) -> InspectedLayer:
    """Describe a layer by its module and what the report, or else its config, says of it: `entry`, {} if nothing."""
    s = layer.spec
    form = s.format if s.group_size == s.in_features else f"{s.format} g{s.group_size}"
    return InspectedLayer(
        name,
        role,
        block,
        (s.out_features, s.in_features),
        form,
        weight_bits(layer),
        _transform(layer),
        str(layer.layer_spec.activation),
        error_of(entry) if entry else None,
        WITH_DATA in entry,
        entry.get("rms"),
    )


def error_of(entry: dict) -> float:
    """Return the error that a report's entry of a layer has."""
    return entry[WITH_DATA] if WITH_DATA in entry else entry[WITHOUT_DATA]


def _transform(layer: QuantLinear) -> str:
    s = layer.layer_spec
    words = [f"{s.rotation}-{s.block}" if s.block > 1 else "", "smooth" if s.smoothed else "", f"rank {s.rank}" if s.rank else ""]
    return " ".join(w for w in words if w) or "none"
