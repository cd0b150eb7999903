"""The nouns of a number format: `Format`, the `QSpec` of one weight stored in it, the `Field`s it is stored as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """Dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QSpec:
    """What must be known, besides the stored bytes, to decode one weight `[out_features, in_features]`.

    `group_size` is the number of consecutive input weights that share a multiplier and an offset (affine formats;
    `in_features` means one group per output channel). `codebook_rows` is 1 (one table or codebook for the whole weight) or
    `out_features` (one level table per output channel).
    """

    format: str
    out_features: int
    in_features: int
    group_size: int
    codebook_rows: int = 1

    @property
    def groups(self) -> int:
        """Return the number of groups along the input."""
        return self.in_features // self.group_size


@dataclass(frozen=True)
class Format:
    """How stored codes become the 8-bit matrix `I` of the decode contract, `W[o, i] ~= scale[o] * I[o, i]`.

    Attributes:
        name: the word used in recipes and checkpoints.
        code_bits: width of one code.
        dim: weights per code (1 for scalar formats).
        sign_split: whether a code is a codeword of magnitudes and, above it, a bit for each weight that is negative.
        window: bits, of a weight's code and of those of the outputs before it, that say what the weight is (trellis.py); 0 where
            its own code does.
        fields: `spec -> {field name: Field}`, everything stored besides `scale` (float32 `[out]`).
        pack: codes `[out, in // dim]` uint8 (int32 above 8 bits) -> `data`.
        unpack: `data`, `in_features // dim` -> codes `[out, in // dim]` of the same dtype; `unpack(pack(codes)) == codes`.
        decode8: spec and stored tensors -> `I` `[out, in]`, int8 (float8_e4m3fn for `fp8_e4m3`).
        check: spec and stored tensors -> what is wrong with the values, or None; shapes and dtypes are already right.
    """

    name: str
    code_bits: int
    dim: int
    fields: Callable[[Format, QSpec], dict[str, Field]]
    pack: Callable[[Format, Tensor], Tensor]
    unpack: Callable[[Format, Tensor, int], Tensor]
    decode8: Callable[[Format, QSpec, Mapping[str, Tensor]], Tensor]
    check: Callable[[Format, QSpec, Mapping[str, Tensor]], str | None]
    sign_split: bool = False
    window: int = 0

    @property
    def levels(self) -> int:
        """Return the number of different codes."""
        return 2**self.code_bits

    @property
    def code_dtype(self) -> torch.dtype:
        """Return the dtype of codes: uint8, int32 above 8 bits."""
        return torch.uint8 if self.code_bits <= 8 else torch.int32

    @property
    def codewords(self) -> int:
        """Return the number of entries of a codebook: one for each code, but for the bits that are signs."""
        return self.levels >> self.dim if self.sign_split else self.levels
