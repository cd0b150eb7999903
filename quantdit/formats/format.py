"""The nouns of a number format: `Format`, the `QSpec` of one weight stored in it, the `Field`s it is stored as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdit.formats.packing import pack_codes, unpack_codes

KINDS = (
    "whole",  # stored as it is
    "affine",  # code * multiplier + offset of its group
    "codebook",  # the code's entry of a codebook of single weights
    "vectors",  # the same of a codebook of `dim` weights
    "trellis",  # the entry of a state, made of several outputs' codes, of a codebook that is not stored
)


@dataclass(frozen=True)
class Field:
    """Dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QSpec:
    """What must be known, besides the stored bytes, to decode one weight `[out_features, in_features]`.

    `group_size` is the number of consecutive input weights that share a multiplier and an offset (affine formats;
    `in_features` means one group per output channel). `codebook_rows` is 1 (one codebook for the whole weight) or
    `out_features` (one codebook of single weights per output channel).
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


def _pack(f: Format, codes: Tensor) -> Tensor:
    return pack_codes(codes, f.code_bits)


def _unpack(f: Format, data: Tensor, n: int) -> Tensor:
    return unpack_codes(data, f.code_bits, n)


@dataclass(frozen=True)
class Format:
    """How stored codes become the 8-bit matrix `I` of the decode contract, `W[o, i] ~= scale[o] * I[o, i]`.

    Attributes:
        name: the word used in recipes and checkpoints.
        kind: how a code becomes an entry of `I`, a name of KINDS.
        code_bits: width of one code.
        dim: weights per code (1 for scalar formats).
        fields: `spec -> {field name: Field}`, everything stored besides `scale` (float32 `[out]`).
        decode8: spec and stored tensors -> `I` `[out, in]` of `decoded_dtype`.
        check: spec and stored tensors -> what is wrong with the values, or None; shapes and dtypes are already right.
        pack: codes `[out, in // dim]` uint8 (int32 above 8 bits) -> `data`.
        unpack: `data`, `in_features // dim` -> codes `[out, in // dim]` of the same dtype; `unpack(pack(codes)) == codes`.
        sign_split: whether a code is a codeword of magnitudes and, above it, a bit for each weight that is negative.
        state_bits: of a trellis, L of QTIP: bits, of a weight's code and of those of the outputs before it, that say what the
            weight is; 0 where its own code does.
        decoded_dtype: of `I`, int8 or float8_e4m3fn.
    """

    name: str
    kind: str
    code_bits: int
    dim: int
    fields: Callable[[Format, QSpec], dict[str, Field]]
    decode8: Callable[[Format, QSpec, Mapping[str, Tensor]], Tensor]
    check: Callable[[Format, QSpec, Mapping[str, Tensor]], str | None]
    pack: Callable[[Format, Tensor], Tensor] = _pack
    unpack: Callable[[Format, Tensor, int], Tensor] = _unpack
    sign_split: bool = False
    state_bits: int = 0
    decoded_dtype: torch.dtype = torch.int8

    @property
    def code_count(self) -> int:
        """Return the number of different codes."""
        return 2**self.code_bits

    @property
    def code_dtype(self) -> torch.dtype:
        """Return the dtype of codes: uint8, int32 above 8 bits."""
        return torch.uint8 if self.code_bits <= 8 else torch.int32

    @property
    def codewords(self) -> int:
        """Return the number of entries of a codebook: one for each code, but for the bits that are signs."""
        return self.code_count >> self.dim if self.sign_split else self.code_count

    @property
    def by_row(self) -> bool:
        """Return whether each row of a weight is stored, and found, without the others, as a table of words has to be."""
        return self.kind in ("whole", "affine")
