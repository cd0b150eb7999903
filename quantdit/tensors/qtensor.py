"""`QTensor`: one quantized weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantdit.formats import FORMATS, Field, QSpec

FIELDS = ("data", "scale", "multiplier", "offset", "codebook")


@dataclass(frozen=True)
class QTensor:
    """One quantized weight `[out, in]`, and the specification of every weight quantdit stores.

    Invariants:
        1. `W[o, i] = scale[o] * I[o, i]` with `I = decode8()` int8 `[out, in]` (float8_e4m3fn for `fp8_e4m3`), `scale`
           float32 `[out]`, finite and not negative. The scale multiplies. Nothing else is added.
        2. The stored tensors are exactly `spec_fields(spec)`: these names, dtypes and shapes; unused ones are None.
        3. Groups run along the input, `group_size` divides `in`; element 0 lies in the low bits (formats/packing.py).
        4. If the layer is rotated, this is the weight in the rotated space; the rotation is not part of the QTensor.
    """

    spec: QSpec
    data: Tensor
    scale: Tensor
    multiplier: Tensor | None = None
    offset: Tensor | None = None
    codebook: Tensor | None = None

    def __post_init__(self) -> None:
        """Check invariant 2.

        Raises:
            ValueError: a tensor is missing, superfluous, or of another dtype or shape than the spec says.
        """
        expected = spec_fields(self.spec)
        tensors = self.tensors()
        if tensors.keys() != expected.keys():
            raise ValueError(f"{self.spec.format} stores {sorted(expected)}, got {sorted(tensors)}")
        for name, field in expected.items():
            dtype, shape = tensors[name].dtype, tuple(tensors[name].shape)
            if (dtype, shape) != (field.dtype, field.shape):
                raise ValueError(f"{self.spec.format} {name}: expected {field.dtype} {field.shape}, got {dtype} {shape}")

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by field name."""
        return {name: t for name in FIELDS if (t := getattr(self, name)) is not None}

    def decode8(self) -> Tensor:
        """Return `I` `[out, in]`, int8 or float8_e4m3fn."""
        f = FORMATS[self.spec.format]
        return f.decode8(f, self.spec, self.tensors())

    def dequantize(self) -> Tensor:
        """Return `scale * I` `[out, in]` float32."""
        return self.scale[:, None] * self.decode8().float()

    @property
    def nbytes(self) -> int:
        """Return the stored bytes, scales and codebooks included."""
        return sum(t.nbytes for t in self.tensors().values())


def spec_fields(spec: QSpec) -> dict[str, Field]:
    """Return name, dtype and shape of every tensor that a weight of this spec stores.

    Raises:
        ValueError: unknown format, or a group size or vector length that does not divide the width.
    """
    if spec.format not in FORMATS:
        raise ValueError(f"unknown weight format {spec.format!r}; known: {', '.join(FORMATS)}")
    f = FORMATS[spec.format]
    if spec.out_features < 1 or spec.in_features < 1:
        raise ValueError(f"a weight needs positive sizes, got {spec.out_features} x {spec.in_features}")
    if spec.group_size < 1 or spec.in_features % spec.group_size:
        raise ValueError(f"group size {spec.group_size} does not divide the width {spec.in_features}")
    if spec.in_features % f.dim:
        raise ValueError(f"{f.name} takes {f.dim} inputs at once, which does not divide the width {spec.in_features}")
    if spec.codebook_rows not in (1, spec.out_features):
        raise ValueError(f"codebook_rows must be 1 or {spec.out_features}, got {spec.codebook_rows}")
    return {"scale": Field(torch.float32, (spec.out_features,)), **f.fields(f, spec)}


def check_values(spec: QSpec, tensors: dict[str, Tensor]) -> str | None:
    """Return what is wrong with the values of stored tensors whose names, dtypes and shapes are right, or None."""
    scale = tensors["scale"]
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        return "scale has entries that are negative or not finite"
    f = FORMATS[spec.format]
    return f.check(f, spec, tensors)
