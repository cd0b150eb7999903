"""`QuantLinear`: the one module of a quantized model. rotate -> quantize tokens -> integer product -> scale + bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import quantdit.kernels.ops  # noqa: F401 - defines torch.ops.quantdit
from quantdit import hadamard
from quantdit.formats import QSpec
from quantdit.kernels.cpu import version_of
from quantdit.qtensor import FIELDS, QTensor, spec_fields


class QuantLinear(nn.Linear):
    """A linear layer whose weight is a `QTensor`, in the rotated space if `hadamard_block` > 1.

    Buffers: the QTensor's tensors under their own names, and `sign` int8 `[in]` of a rotated layer. `bias` is a parameter as in
    `nn.Linear`. `weight` is a property that decodes to `[out, in]` in the unrotated space, which is what PEFT's LoRA needs.

    On CPU the decoded int8 matrix is kept after the first call (`cache_decoded`): one byte a weight, a quarter of float32.
    """

    def __init__(
        self, spec: QSpec, activation_bits: int, hadamard_block: int, bias: bool, device: torch.device | str = "cpu"
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.spec = spec
        self.activation_bits = activation_bits
        self.hadamard_block = hadamard_block
        self.cache_decoded = True
        self._decoded: tuple[tuple, Tensor] | None = None  # what was decoded, and I
        for name, field in spec_fields(spec).items():
            self.register_buffer(name, torch.empty(field.shape, dtype=field.dtype, device=device))
        if hadamard_block > 1:
            self.register_buffer("sign", torch.empty(spec.in_features, dtype=torch.int8, device=device))
        self.bias = nn.Parameter(torch.empty(spec.out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    def from_qtensor(
        cls, q: QTensor, activation_bits: int, hadamard_block: int, sign: Tensor | None, bias: Tensor | None
    ) -> QuantLinear:
        """Build the layer around a quantized weight; `sign` int8 `[in]` if hadamard_block > 1; `bias` `[out]` float or None."""
        layer = cls(q.spec, activation_bits, hadamard_block, bias is not None, device="meta")
        for name, tensor in q.tensors().items():
            setattr(layer, name, tensor)
        if hadamard_block > 1:
            layer.sign = sign
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def qtensor(self) -> QTensor:
        """Return the stored weight."""
        return QTensor(self.spec, **{name: getattr(self, name) for name in FIELDS if name in self._buffers})

    @property
    def weight(self) -> Tensor:
        """Return the decoded weight `[out, in]` in the unrotated space, in the bias's dtype (float32 without one)."""
        dense = self.qtensor.dequantize()
        if self.hadamard_block > 1:
            dense = hadamard.rotate_back(dense, self.sign, self.hadamard_block)
        return dense if self.bias is None else dense.to(self.bias.dtype)

    def decoded(self) -> Tensor:
        """Return `I` `[out, in]`, kept between calls on CPU."""
        stored = tuple((id(t), version_of(t)) for t in self._buffers.values())
        if self._decoded is not None and self._decoded[0] == stored:
            return self._decoded[1]
        integers = torch.ops.quantdit.decode8(
            self.data,
            getattr(self, "multiplier", None),
            getattr(self, "offset", None),
            getattr(self, "codebook", None),
            self.spec.format,
            self.in_features,
            self.spec.group_size,
        )
        if self.cache_decoded and self.data.device.type == "cpu" and not torch.compiler.is_compiling():
            self._decoded = (stored, integers)
        return integers

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[..., in]` to `[..., out]` in x's dtype."""
        tokens = x.reshape(-1, self.in_features)
        if self.hadamard_block > 1:
            tokens = torch.ops.quantdit.rotate(tokens, self.sign, self.hadamard_block)
        integers = self.decoded()
        if self.activation_bits == 16:
            y = torch.ops.quantdit.gemm_w8a16(tokens, integers, self.scale, self.bias)
        else:
            codes, token_scale = torch.ops.quantdit.quantize_tokens(tokens, self.activation_bits)
            y = torch.ops.quantdit.gemm_w8a8(codes, token_scale, integers, self.scale, self.bias, x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` would."""
        s = self.spec
        group = "" if s.group_size == s.in_features else f", group_size={s.group_size}"
        rotation = f", hadamard={self.hadamard_block}" if self.hadamard_block > 1 else ""
        sizes = f"{s.in_features}, {s.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {s.format}{group}, a{self.activation_bits}{rotation}"

    def _apply(self, fn, recurse: bool = True):
        """Move as any module, but let a cast of the model touch the bias alone: scales stay float32, fp8 codes fp8."""
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in stored.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        self._decoded = None
        return self


def weight_bits(layer: QuantLinear) -> float:
    """Return stored bits per weight of a layer, scales, codebooks and rotation signs included, the bias not."""
    stored = sum(b.nbytes for b in layer.buffers(recurse=False))
    return 8 * stored / math.prod((layer.out_features, layer.in_features))
