"""Grids: how weights become codes of a format. Error feedback (gptq.py) and rounding (rtn) see formats only through them.

A grid works on weights in units of `I`, that is divided by the channel scale it chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantdit.calibration.levels import histogram, lloyd_max, twin_log
from quantdit.formats import FORMATS

Params = tuple[Tensor, ...]

# CPUs without VNNI multiply a row fast and exactly only while two neighbouring weights of one sign add up to at most 128
# (kernels/cpu.py). Channel scales of formats below 8 bits keep that bound: entries of a table stay within 64, rows of affine
# weights get the scale their largest pair needs, with some room because error feedback moves weights outward.
PAIR_LIMIT = 128
PAIR_ROOM = 0.92
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
TABLE_SAMPLE = 1 << 20


@dataclass(frozen=True)
class Grid:
    """The codes one format can give a weight.

    Attributes:
        scale: float32 `[out]`, the channel scale chosen.
        fit: `(w [out, g], importance [g]) -> params`, each `[out]`: what the group's codes mean.
        encode: `(w [out, c], params) -> codes [out, c]` uint8, the nearest.
        value: `(codes [out, c], params) -> I [out, c]` float32.
        fields: `([params of each group]) -> stored tensors` besides data and scale.
        codebook_rows: as in QSpec.
    """

    scale: Tensor
    fit: Callable[[Tensor, Tensor], Params]
    encode: Callable[[Tensor, Params], Tensor]
    value: Callable[[Tensor, Params], Tensor]
    fields: Callable[[list[Params]], dict[str, Tensor]]
    codebook_rows: int = 1


def _channel_scale(weight: Tensor, top: float) -> Tensor:
    """`absmax / top` per row."""
    return _not_zero(weight.abs().amax(dim=1) / top)


def _pair_safe_scale(weight: Tensor) -> Tensor:
    even = torch.nn.functional.pad(weight, (0, weight.shape[1] % 2))
    pair = (even[:, ::2] + even[:, 1::2]).abs().amax(dim=1)
    return _not_zero(torch.maximum(weight.abs().amax(dim=1) / 127, pair / (PAIR_LIMIT * PAIR_ROOM)))


def _not_zero(scale: Tensor) -> Tensor:
    """Return 1 for rows of zeros, so that nothing divides by zero."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def affine_fit(w: Tensor, importance: Tensor, levels: int) -> Params:
    """Return the integer multiplier and offset `[out]` of least weighted squared error over a grid of clips.

    `offset >= -128` and `offset + (levels - 1) * multiplier <= 127` always hold.
    """
    top = levels - 1
    low, high = w.amin(dim=1), w.amax(dim=1)
    best: list[Tensor] | None = None
    for shrink in SHRINKS:
        for rounding in (torch.floor, torch.ceil):
            m = rounding((high - low) * shrink / top).clamp(1, 255 // top)
            offset = ((low + high - top * m) / 2).round()
            for _ in range(2):
                offset = torch.minimum(offset.clamp_min(-128), 127 - top * m)
                codes = ((w - offset[:, None]) / m[:, None]).round().clamp(0, top)
                residual = w - codes * m[:, None] - offset[:, None]
                error = (residual.square() * importance).sum(dim=1)
                if best is None:
                    best = [error, m, offset]
                else:
                    better = error < best[0]
                    best = [torch.where(better, new, old) for new, old in zip((error, m, offset), best, strict=True)]
                # The offset that centres the residual, tried once more.
                offset = (offset + (residual * importance).sum(dim=1) / importance.sum()).round()
    assert best is not None
    return best[1], best[2]


def affine_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str) -> Grid:
    """Two-level integers (formats/affine.py)."""
    top = FORMATS[format].levels - 1
    per_channel = group_size == weight.shape[1]
    # One group per channel needs no integer between the scale and the codes: multiplier 1 and a scale of its own.
    scale = _per_channel_scale(weight, importance, top) if per_channel else _pair_safe_scale(weight)
    return Grid(
        scale,
        fit=partial(_unit_fit, top=top) if per_channel else partial(affine_fit, levels=top + 1),
        encode=lambda w, p: ((w - p[1][:, None]) / p[0][:, None]).round().clamp(0, top).to(torch.uint8),
        value=lambda codes, p: codes * p[0][:, None] + p[1][:, None],
        fields=lambda groups: {
            "multiplier": torch.stack([p[0] for p in groups], dim=1).to(torch.uint8),
            "offset": torch.stack([p[1] for p in groups], dim=1).to(torch.int8),
        },
    )


def _per_channel_scale(weight: Tensor, importance: Tensor, top: int) -> Tensor:
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    step = _not_zero((high - low) / top)
    best_error, best = torch.full_like(step, float("inf")), step
    # The last one is for rows far from zero, whose offset must stay an int8.
    for s in (*(step * shrink for shrink in (*SHRINKS, 0.6, 0.5, 0.4)), _not_zero(weight.abs().amax(dim=1) / 126)):
        w = weight / s[:, None]
        _, offset = _unit_fit(w, importance, top)
        codes = (w - offset[:, None]).round().clamp(0, top)
        error = (((w - codes - offset[:, None]) * s[:, None]).square() * importance).sum(dim=1)
        best = torch.where(error < best_error, s, best)
        best_error = torch.minimum(error, best_error)
    return best


def _unit_fit(w: Tensor, importance: Tensor, top: int) -> Params:
    middle = ((w.amin(dim=1) + w.amax(dim=1) - top) / 2).round()
    return torch.ones_like(middle), middle.clamp(-128, 127 - top)


def int8_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str) -> Grid:
    """Plain symmetric int8 per channel, -127..127."""
    return Grid(
        _channel_scale(weight, 127),
        fit=lambda w, h: (),
        encode=lambda w, p: w.round().clamp(-127, 127).to(torch.int8).view(torch.uint8),
        value=lambda codes, p: codes.view(torch.int8).float(),
        fields=lambda groups: {},
    )


def fp8_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str) -> Grid:
    """OCP e4m3 per channel; the cast rounds to nearest even."""
    return Grid(
        _channel_scale(weight, 448),
        fit=lambda w, h: (),
        encode=lambda w, p: w.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8),
        value=lambda codes, p: codes.view(torch.float8_e4m3fn).float(),
        fields=lambda groups: {},
    )


def table_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str) -> Grid:
    """One level table for the whole weight, fitted to its rows divided by their RMS, entries on the int8 grid."""
    levels = FORMATS[format].levels
    rms = weight.square().mean(dim=1).sqrt()
    rms = torch.where(rms > 0, rms, torch.ones_like(rms))
    normal = weight / rms[:, None]
    stride = max(1, normal.numel() // TABLE_SAMPLE) | 1
    sample = normal.flatten()[::stride]
    mass = importance.expand_as(normal).flatten()[::stride]
    fitted = TABLES[table](*histogram(sample, mass), levels)
    unit = fitted.abs().max().clamp_min(1e-30) / (PAIR_LIMIT // 2)
    entries = (fitted / unit).round().clamp(-128, 127).float()
    boundaries = (entries[1:] + entries[:-1]) / 2
    return Grid(
        rms * unit.float(),
        fit=lambda w, h: (),
        encode=lambda w, p: torch.bucketize(w.contiguous(), boundaries).to(torch.uint8),
        value=lambda codes, p: entries[codes.int()],
        fields=lambda groups: {"codebook": entries.to(torch.int8)[None]},
    )


TABLES = {"lloyd-max": lloyd_max, "twin-log": twin_log}

GRIDS: dict[str, Callable[[Tensor, Tensor, int, str, str], Grid]] = {
    "int2": affine_grid,
    "int3": affine_grid,
    "int4": affine_grid,
    "int6": affine_grid,
    "int8": int8_grid,
    "table2": table_grid,
    "table3": table_grid,
    "table4": table_grid,
    "fp8_e4m3": fp8_grid,
}
