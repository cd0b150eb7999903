"""Linears of other packages for `quantdit bench kernels`, each built from a weight by the package's own public functions.

A package that is not installed is a row that says so. Every linear quantizes its inputs itself unless its bits say a16, so that
it is compared with a whole `QuantLinear`. Read and run with gemlite 0.6.0.post2, orbitquant 0.15.0 and sdnq 0.2.8.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]
GROUP = 64  # inputs that share a scale in the 4-bit weights whose codes are made here


@dataclass(frozen=True)
class Baseline:
    """A linear of another package.

    Attributes:
        package: what to install and import.
        error: largest relative error of its outputs against the product by the weight as it was given.
        few: whether it is for few tokens: its activations stay 16 bits.
        build: weight `[n, k]` float16 or bfloat16 -> what maps x `[m, k]` of that dtype to `[m, n]`.
    """

    package: str
    error: float
    few: bool
    build: Callable[[Tensor], Linear]

    def linear(self, weight: Tensor) -> Linear:
        """Build the linear.

        Raises:
            ValueError: the package is not installed.
        """
        if find_spec(self.package) is None:
            raise ValueError(f"{self.package} is not installed; quantdit's extra bench brings it")
        return self.build(weight)


def _gemlite_int8(weight: Tensor) -> Linear:
    from gemlite.helper import A8W8_int8_dynamic

    return A8W8_int8_dynamic(device=str(weight.device), dtype=weight.dtype).from_weights(weight.clone())


def _gemlite_fp8_w4(weight: Tensor) -> Linear:
    from gemlite.helper import A8W4_HQQ_INT_dynamic

    return A8W4_HQQ_INT_dynamic(device=str(weight.device), dtype=weight.dtype).from_weights(*affine4(weight))


def _gemlite_w4a16(weight: Tensor) -> Linear:
    from gemlite.helper import A16W4_HQQ_INT

    return A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype).from_weights(*affine4(weight))


def affine4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes `[n, k]` uint8 0..15, scale and zero point `[n k / 64, 1]`: `weight = (code - zero) scale`, as HQQ has it."""
    groups = weight.float().reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low).clamp_min(1e-8) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8)
    return codes.reshape(weight.shape), scale.to(weight.dtype), (-low / scale).to(weight.dtype)


def _orbitquant(weight: Tensor) -> Linear:
    os.environ.setdefault("ORBITQUANT_KERNELS_AUTOFETCH", "0")  # its fused linears are Triton's; nothing is to be downloaded
    from orbitquant import OrbitQuantConfig
    from orbitquant.fused import fuse_linears
    from orbitquant.layers import OrbitQuantLinear

    config = OrbitQuantConfig(weight_bits=4, activation_bits=8)
    model = nn.Sequential(OrbitQuantLinear.from_linear(_linear(weight.cpu()), config=config, module_name="0"))
    model.to(weight.device)
    if fuse_linears(model, activation_bits=8, config=config) != 1:
        raise ValueError("orbitquant did not fuse the linear")
    return model


def _sdnq(weight: Tensor, weights: str) -> Linear:
    from sdnq import SDNQConfig
    from sdnq.quantizer import sdnq_post_load_quant

    model = nn.Sequential(_linear(weight))
    options = {"quantized_matmul_dtype": "int8", "use_quantized_matmul": True}
    config = SDNQConfig(weights_dtype=weights, add_skip_keys=False, minimum_allowed_numel=0, **options)
    sdnq_post_load_quant(model, quantization_config=config)
    if not hasattr(model[0], "sdnq_dequantizer"):
        raise ValueError("sdnq left the linear as it was")
    return model


def _linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


BASELINES = {
    "gemlite w8a8 int8": Baseline("gemlite", 0.03, False, _gemlite_int8),
    "gemlite w4a8 e4m3": Baseline("gemlite", 0.15, False, _gemlite_fp8_w4),
    "orbitquant w4a8 fused": Baseline("orbitquant", 0.15, False, _orbitquant),
    "sdnq w8a8 int8": Baseline("sdnq", 0.03, False, lambda weight: _sdnq(weight, "int8")),
    "sdnq w4a8 int8": Baseline("sdnq", 0.15, False, lambda weight: _sdnq(weight, "uint4")),
    "gemlite w4a16": Baseline("gemlite", 0.15, True, _gemlite_w4a16),
}
