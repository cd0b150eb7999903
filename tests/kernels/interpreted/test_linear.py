"""QuantLinear by every way of the dispatch, on CPU tensors that pretend to be on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantdit.formats import FORMATS
from quantdit.kernels import ops
from quantdit.kernels.triton_ops import dispatch
from quantdit.layers.quant_linear import QuantLinear
from quantdit.tensors import transform
from quantdit.tensors.hadamard import random_sign
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec

K, N = 320, 48


@pytest.fixture
def layer(weight: Callable) -> Callable[..., QuantLinear]:
    def make(name: str, activation: ActivationSpec, rotation: str = "hadamard", rank: int = 0) -> QuantLinear:
        q = weight(name, N, K, 64 if "int" in name else K)
        block = {"hadamard": 64, "outlier": 64, "none": 1}[rotation]
        spec = LayerSpec(q.spec, activation, rotation, block, False, rank)
        g = torch.Generator().manual_seed(5)
        tensors = q.tensors()
        if rotation == "hadamard":
            tensors["premultiplier"] = random_sign(K, 0)
        if rotation == "outlier":
            orthogonal = torch.linalg.qr(torch.randn(2, K // 64, 64, 64, generator=g)).Q
            tensors |= {"rotation1": orthogonal[0].contiguous(), "rotation2": orthogonal[1].contiguous()}
            tensors["permutation"] = torch.randperm(K, generator=g).int()
        if activation.buckets:
            tensors["static_scale"] = torch.tensor([0.02, 0.03])
        if rank:
            tensors |= {"up": torch.randn(N, rank, generator=g).bfloat16(), "down": torch.randn(rank, K, generator=g).bfloat16()}
        return QuantLinear.from_tensors(spec, tensors, torch.randn(N, generator=g))

    return make


def expected(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer as its tensors define it, in float64 but for what is quantized."""
    tokens = transform.apply(layer.transform, x)
    a = layer.layer_spec.activation
    if a.format == "fp8" and a.bits == 8:
        codes, scale = ops.quantize_tokens_fp8_reference(tokens)
    elif a.bits < 16:
        codes, scale = ops.quantize_tokens_reference(tokens, a.bits, a.group_size, a.format == "affine", layer._static_scale())
    else:
        codes, scale = tokens, torch.ones(len(x))
    y = (codes.double() * scale.double()[:, None]) @ layer.qtensor.dequantize().double().T + layer.bias.double()
    if layer.layer_spec.rank:
        y = y + tokens.double() @ layer.down.double().T @ layer.up.double().T
    return y


def error(layer: QuantLinear, x: torch.Tensor) -> float:
    y = expected(layer, x)
    return float((layer(x).double() - y).norm() / y.norm())


A8, A16 = ActivationSpec(8), ActivationSpec(16)
LAYERS = {
    "w4a8": ("int4", A8),
    "table": ("table4", A8),
    "w8a8": ("int8", A8),
    "fp8": ("fp8_e4m3", ActivationSpec(8, "fp8")),
    "e4m3 table, fp8": ("table4_e4m3", ActivationSpec(8, "fp8")),
    "e4m3 table, int8 codes": ("table4_e4m3", A8),
    "w4a4": ("table4", ActivationSpec(4, "affine", 32)),
    "a6 groups": ("table3", ActivationSpec(6, "int", 64)),
    "static": ("int4", ActivationSpec(8, "int", 0, 2)),
    "affine": ("int6", ActivationSpec(8, "affine")),
    "no rotation": ("table2", A8, "none"),
    "outlier rotation": ("vq256x4", A8, "outlier"),
    "low rank": ("int4", A8, "hadamard", 8),
    "low rank, fp8": ("fp8_e4m3", ActivationSpec(8, "fp8"), "hadamard", 40),
    "w4a16": ("table4", A16),
    "w2a16 codebook": ("vq64x2", A16),
    "trellis": ("trellis3_l12", A8, "hadamard"),
    "w2a16 trellis": ("trellis2_l10", A16),
    "w4a16 low rank": ("int4", A16, "none", 8),
}


def ways(name: str) -> tuple[str, ...]:
    """Return the modes that differ for a layer; where packed and decode do, auto is one of the two."""
    weight, activation, *_ = LAYERS[name]
    definition = ("reference",) if name in ("w4a8", "w4a16") else ()
    if activation.bits == 16:
        return "auto", *definition
    if FORMATS[weight].kind == "whole" or activation.format == "fp8" or "trellis" in weight:
        return "auto", "torch"
    return "packed", "decode", "torch", *definition


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in LAYERS for mode in ways(name)])
def test_every_layer_by_every_way(name: str, mode: str, layer: Callable, gpu: Callable):
    """A code may turn where a rotation lands on a tie, and e4m3's sums round; 1e-3 is a code in hundreds of thousands."""
    gpu(90)
    made = layer(*LAYERS[name])
    x = torch.randn(70, K, generator=torch.Generator().manual_seed(0))
    with dispatch.using(mode):
        assert error(made, x) < 1e-3
        assert error(made, x[:2].bfloat16()) < 1e-2
    assert made(x[None, None, :3]).shape == (1, 1, 3, N)
    assert made(x[:0]).shape == (0, N)


@pytest.mark.parametrize("mode", ["packed", "decode"])
@pytest.mark.parametrize("name", ["w8a8", "w4a4", "low rank", "outlier rotation", "w4a16", "w2a16 trellis", "w4a16 low rank"])
def test_float16_is_finite_where_the_dense_layer_is(name: str, mode: str, layer: Callable, gpu: Callable):
    """Tokens that the rotation adds up in one place, beyond float16; small ones beside them keep their accuracy."""
    gpu(90)
    made = layer(*LAYERS[name])
    signs = made.premultiplier if "premultiplier" in made._buffers else torch.ones(K)
    x = torch.stack([signs * 20000.0, torch.randn(K, generator=torch.Generator().manual_seed(0))]).half()
    made.scale = made.scale / made.weight.abs().sum(dim=1) * 2  # so that outputs are in the range of float16
    if made.layer_spec.rank:
        made.up = made.up / 4000
    with dispatch.using(mode):
        assert float(expected(made, x).abs().max()) < 65504
        assert bool(torch.isfinite(made(x)).all())
        assert error(made, x[:1]) < 5e-3 and error(made, x[1:]) < 5e-3


def test_every_way_is_taken(layer: Callable, gpu: Callable, monkeypatch: pytest.MonkeyPatch):
    """The table of dispatch.py, way by way: which of its functions run, one within another."""
    called: list[str] = []
    for kernel in dispatch.KERNELS:

        def spy(*args: object, kernel: Callable = kernel) -> object:
            called.append(kernel.__name__)
            return kernel(*args)

        spy.__name__ = kernel.__name__
        monkeypatch.setattr(dispatch, kernel.__name__, spy)
    monkeypatch.setattr(dispatch, "KERNELS", [getattr(dispatch, kernel.__name__) for kernel in dispatch.KERNELS])
    gpu(90)
    e4m3 = layer("table4_e4m3", ActivationSpec(8, "fp8"))

    def ways(made: QuantLinear, m: int, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        called.clear()
        made(torch.randn(m, K).to(dtype))
        return list(called)

    monkeypatch.setitem(dispatch.CROSSOVER["decode_from_m"], "90", 100)
    w4a8 = layer("int4", A8)
    assert ways(w4a8, 99) == ["rotate_quantize", "gemm_packed_a8"]
    assert ways(w4a8, 100) == ["rotate_quantize", "gemm_packed_a8", "decode8", "gemm_w8a8"]
    assert ways(layer("int8", A8), 2) == ["rotate_quantize", "gemm_packed_a8", "gemm_w8a8"]
    assert ways(layer("int4", A8, "hadamard", 4), 2) == ["rotate_quantize", "gemm_packed_a8"]
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "LARGEST_RANK", 3)
        apart = ["rotate_quantize", "rotate", "quantize_tokens", "gemm_packed_a8"]
        assert ways(layer("int4", A8, "hadamard", 4), 2) == apart
    whole = layer("fp8_e4m3", ActivationSpec(8, "fp8"), "none")
    assert ways(whole, 2) == ["quantize_tokens_fp8", "gemm_packed_a8", "gemm_w8a8"]
    assert ways(e4m3, 2) == ["rotate_quantize", "gemm_packed_a8", "decode8", "gemm_w8a8"]
    w4a16 = layer("table4", A16)
    assert ways(w4a16, 64) == ["rotate", "gemm_packed_a16"]
    assert ways(w4a16, 65) == ["rotate", "gemm_packed_a16", "decode8"]
    assert ways(w4a16, 2, torch.float32) == ["rotate", "gemm_packed_a16", "decode8"]


@pytest.mark.parametrize("capability", [75, 80, 86])
def test_older_gpus(capability: int, layer: Callable, gpu: Callable):
    """No e4m3 before 8.9 and no kernels before 8.0: the definitions run, with the same result."""
    gpu(capability)
    x = torch.randn(9, K)
    assert error(layer("fp8_e4m3", ActivationSpec(8, "fp8")), x) < 1e-3
    assert error(layer("table4", A8), x) < 1e-3


def test_what_the_kernels_do_not_take(gpu: Callable):
    """Groups of 16 and wide tokens go to the definition; the results of both are to the bit."""
    gpu(90)
    x = torch.randn(3, 48)
    for arguments in ((x, 4, 16), (torch.randn(2, dispatch.LARGEST_WIDTH + 2), 8), (torch.randn(2, 8224), 4, 32)):
        codes, scale = torch.ops.quantdit.quantize_tokens(*arguments)
        reference, reference_scale = ops.quantize_tokens_reference(*arguments)
        assert torch.equal(codes, reference) and torch.equal(scale, reference_scale)
