"""Grids: how weights become codes of a format. Error feedback (gptq.py) and rounding (rtn) see formats only through them.

A grid works on weights in units of `I`, that is divided by the channel scale it chose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdit.calibration import viterbi
from quantdit.calibration.hqq import hqq_zero_point
from quantdit.calibration.lloyd_max import cells, gaussian, histogram, lloyd_max, prefix_sums, table_error
from quantdit.calibration.twinlog import twin_log, twin_log_paper
from quantdit.formats import FORMATS, QSpec
from quantdit.formats.float8 import LARGEST
from quantdit.formats.trellis import TRELLIS, decode, unit

Params = tuple[Tensor, ...]

# CPUs without VNNI multiply a row fast and exactly only while two neighbouring weights of one sign add up to at most 128
# (kernels/cpu.py). Channel scales of formats below 8 bits keep that bound: entries of a table stay within 64, rows of affine
# weights get the scale their largest pair needs, with some room because error feedback moves weights outward.
PAIR_LIMIT = 128
PAIR_ROOM = 0.92
GROUP_SHRINKS = (1.05, 0.95, 0.86, 0.78, 0.7, 0.6)
GROUP_SHIFTS = (-0.5, -0.25, 0.0, 0.25, 0.5)
CHANNEL_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
TABLE_SAMPLE = 1 << 20
PLACES = 8
ROW_SCALES = (1.0, 0.95, 1.05, 0.9, 1.1, 0.85, 1.15, 0.8, 1.2, 0.75, 1.3, 0.7, 1.4, 0.6, 1.6, 0.5, 2.0)
ROWS = 32  # fitted at once where the weights themselves are searched: what fits a cache
SPREAD = {2: 1.02, 3: 1.04, 4: 1.06}  # of least error on Gaussian rows, by bits; within 1 % from 0.02 less to 0.04 more
CHUNK = 512  # rows fitted at once to histograms: some 300 MB for a width of 8960


@dataclass(frozen=True)
class Levels:
    """What the codes of a scalar grid mean, for compiled code: `code * step + offset`, or entries of ascending tables.

    Attributes:
        first: float32 `[groups, 1, out]` the steps, or `[groups, levels - 1, out]` the boundaries between entries.
        second: float32 `[groups, 1, out]` the offsets, or `[groups, levels, out]` the entries.
        low: the least code.
        high: the largest code.
        is_table: whether they are tables.
    """

    first: Tensor
    second: Tensor
    low: int
    high: int
    is_table: bool


@dataclass(frozen=True)
class Grid:
    """The codes one format can give a weight.

    Attributes:
        scale: float32 `[out]`, the channel scale chosen.
        fit: `(w [out, g], importance [g]) -> params`, each `[out]`: what the group's codes mean.
        encode: `(w [out, c], params) -> codes [out, c]` uint8, the nearest (of a trellis: of whole columns).
        value: `(codes [out, c], params) -> I [out, c]` float32.
        fields: `([params of each group]) -> stored tensors` besides data and scale.
        codebook_rows: as in QSpec.
        levels: `([params of each group]) -> Levels`, of the same codes and values; None where codes are no levels of one weight.
    """

    scale: Tensor
    fit: Callable[[Tensor, Tensor], Params]
    encode: Callable[[Tensor, Params], Tensor]
    value: Callable[[Tensor, Params], Tensor]
    fields: Callable[[list[Params]], dict[str, Tensor]]
    codebook_rows: int = 1
    levels: Callable[[list[Params]], Levels] | None = None


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
    """Return the integer multiplier and offset `[out]` of least weighted squared error.

    The best of a grid of steps and of places of the middle, then least squares for the codes it gives, rounded to integers.
    `offset >= -128` and `offset + (levels - 1) * multiplier <= 127` always hold.

    Args:
        w: `[out, g]` float32 in units of I.
        importance: `[g]`, not negative.
        levels: of the format.
    """
    top = levels - 1
    low, high = w.amin(dim=1), w.amax(dim=1)
    total = importance.sum()
    best = torch.full_like(low, torch.inf), torch.ones_like(low), torch.zeros_like(low)

    def tried(m: Tensor, offset: Tensor) -> Params:
        m = m.clamp(1, 255 // top)
        offset = torch.minimum(offset.round().clamp_min(-128), 127 - top * m)
        codes = ((w - offset[:, None]) / m[:, None]).round_().clamp_(0, top)
        residual = (w - offset[:, None]).addcmul_(codes, m[:, None], value=-1)
        found = residual.square_() @ importance, m, offset
        return tuple(torch.where(found[0] < best[0], new, old) for new, old in zip(found, best, strict=True))

    for shrink in GROUP_SHRINKS:
        m = ((high - low) * (shrink / top)).round().clamp(1, 255 // top)
        for shift in GROUP_SHIFTS:
            best = tried(m, (low + high - top * m) / 2 + shift * m)
    for _ in range(2):
        _, m, offset = best
        codes = ((w - offset[:, None]) / m[:, None]).round_().clamp_(0, top)
        mean_code, mean_w = codes @ importance / total, w @ importance / total
        codes -= mean_code[:, None]
        power = codes.square() @ importance
        slope = torch.where(power > 0, (codes * w) @ importance / power, m)
        for m in (slope.floor(), slope.ceil()):
            best = tried(m, mean_w - m.clamp(1, 255 // top) * mean_code)
    return best[1:]


def affine_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str, fit: str = "search") -> Grid:
    """Two-level integers (formats/affine.py), fitted by `search` for least squared error or by `hqq` (hqq.py)."""
    levels = FORMATS[format].code_count
    search, search_channel = AFFINE_FITS[fit]
    if group_size == weight.shape[1]:
        parts = [search_channel(part, importance, levels) for part in weight.split(ROWS)]
        scale, *params = (torch.cat(column) for column in zip(*parts, strict=True))
    else:
        scale, params = _pair_safe_scale(weight), None
    return Grid(
        scale,
        # A channel's own parameters were chosen together with its scale.
        fit=lambda w, h: tuple(params) if params else search(w, h, levels),
        encode=lambda w, p: ((w - p[1][:, None]) / p[0][:, None]).round().clamp(0, levels - 1).to(torch.uint8),
        value=lambda codes, p: codes * p[0][:, None] + p[1][:, None],
        fields=lambda groups: {
            "multiplier": torch.stack([p[0] for p in groups], dim=1).to(torch.uint8),
            "offset": torch.stack([p[1] for p in groups], dim=1).to(torch.int8),
        },
        levels=lambda groups: Levels(_by_group(groups, 0), _by_group(groups, 1), 0, levels - 1, False),
    )


def _by_group(groups: list[Params], place: int) -> Tensor:
    """Return one of the parameters of all groups, `[groups, 1, out]`."""
    return torch.stack([params[place] for params in groups])[:, None]


def channel_fit(weight: Tensor, importance: Tensor, levels: int) -> Params:
    """Return channel scale, multiplier and offset, `[out]` each, of least weighted squared error for one group a row.

    Args:
        weight: `[out, in]` float32.
        importance: `[in]`, not negative.
        levels: of the format.
    """
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    best = torch.full_like(low, torch.inf), torch.ones_like(low), torch.ones_like(low), torch.zeros_like(low)
    for shrink, centre in itertools.product(CHANNEL_SHRINKS, (1.0, 0.5, 0.0)):
        scale, m, lowest, highest = _channel_units(low, high, shrink, levels)
        w = weight / scale[:, None]
        offset = centre * (low + high) / 2 / scale - (levels - 1) * m / 2
        for _ in range(2):
            offset = torch.minimum(torch.maximum(offset.round(), lowest), highest)
            codes = ((w - offset[:, None]) / m[:, None]).round_().clamp_(0, levels - 1)
            residual = (w - offset[:, None]).addcmul_(codes, m[:, None], value=-1)
            found = residual.square() @ importance * scale.square(), scale, m, offset
            best = tuple(torch.where(found[0] < best[0], new, old) for new, old in zip(found, best, strict=True))
            offset = offset + residual @ importance / importance.sum()
    return best[1:]


def _channel_units(low: Tensor, high: Tensor, shrink: float, levels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scale and multiplier for a step of `shrink` of the range, and the bounds of the offset, `[out]` each.

    The multiplier is a step in units of I. The larger it is the finer the offset can be, within pair-safe entries: levels of
    a symmetric row lie at half steps. Rows far from zero take a larger scale, so that their offset is an int8.
    """
    top = levels - 1
    step = (high - low) * shrink / top
    edge = (low + high).abs() / 2 + top * step / 2
    step = _not_zero(torch.maximum(step, edge / 126))
    m = (PAIR_LIMIT / 2 * step / _not_zero(edge)).floor().clamp(1, PAIR_LIMIT // top)
    fine = m > 1
    lowest = torch.where(fine, -PAIR_LIMIT // 2, -128)
    return step / m, m, lowest, torch.where(fine, PAIR_LIMIT // 2, 127) - top * m


def hqq_fit(w: Tensor, importance: Tensor, levels: int) -> Params:
    """Return HQQ's multiplier and offset `[out]`, rounded to integers; arguments as for `affine_fit`, importance unused."""
    top = levels - 1
    step = (w.amax(dim=1) - w.amin(dim=1)) / top
    best = torch.full_like(step, torch.inf), step, step
    for m in (step.floor().clamp(1, 255 // top), step.ceil().clamp(1, 255 // top)):
        offset = torch.minimum((-hqq_zero_point(w, m, levels) * m).round().clamp_min(-128), 127 - top * m)
        codes = ((w - offset[:, None]) / m[:, None]).round().clamp(0, top)
        found = (w - codes * m[:, None] - offset[:, None]).square().sum(dim=1), m, offset
        best = tuple(torch.where(found[0] < best[0], new, old) for new, old in zip(found, best, strict=True))
    return best[1:]


def hqq_channel_fit(weight: Tensor, importance: Tensor, levels: int) -> Params:
    """Return HQQ's scale, multiplier and offset `[out]`; arguments as for `channel_fit`, importance unused."""
    scale, m, lowest, highest = _channel_units(weight.amin(dim=1), weight.amax(dim=1), 1.0, levels)
    zero = hqq_zero_point(weight, scale * m, levels)
    return scale, m, torch.minimum(torch.maximum((-zero * m).round(), lowest), highest)


def int8_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str) -> Grid:
    """Plain symmetric int8 per channel, -127..127."""
    one = torch.ones(1, 1, len(weight), dtype=torch.float32)
    return Grid(
        _channel_scale(weight, 127),
        fit=lambda w, h: (),
        encode=lambda w, p: w.round().clamp(-127, 127).to(torch.int8).view(torch.uint8),
        value=lambda codes, p: codes.view(torch.int8).float(),
        fields=lambda groups: {},
        levels=lambda groups: Levels(one, torch.zeros_like(one), -127, 127, False),
    )


def fp8_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str) -> Grid:
    """OCP e4m3 per channel; the cast rounds to nearest even."""
    return Grid(
        _channel_scale(weight, LARGEST),
        fit=lambda w, h: (),
        encode=lambda w, p: w.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8),
        value=lambda codes, p: codes.view(torch.float8_e4m3fn).float(),
        fields=lambda groups: {},
    )


def table_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str, rows: str = "layer") -> Grid:
    """Level tables, fitted to rows divided by their RMS, one for the whole weight (`rows="layer"`) or one a row (`channel`)."""
    f = FORMATS[format]
    element = f.fields(f, QSpec(format, len(weight), weight.shape[1], weight.shape[1]))["codebook"].dtype
    rms = _not_zero(weight.double().square().mean(dim=1).sqrt().float())  # float32 does not hold the squares of 1e20
    normal = weight / rms[:, None]
    if rows == "layer":
        stride = max(1, normal.numel() // TABLE_SAMPLE) | 1
        sample, mass = (t.flatten()[::stride][None] for t in (normal, importance.expand_as(normal)))
        entries, unit = _fit_table(*histogram(sample, mass), f.code_count, table, element)
        unit = torch.cat([unit * _row_scale(*histogram(part, importance), entries * unit) for part in normal.split(CHUNK)])
    else:
        fitted = [_fit_table(*histogram(part, importance), f.code_count, table, element) for part in normal.split(CHUNK)]
        entries, unit = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    boundaries = ((entries[:, 1:] + entries[:, :-1]) / 2).expand(len(weight), -1).contiguous()
    by_row = entries.expand(len(weight), -1)
    levels = Levels(boundaries.T[None].contiguous(), by_row.T[None].contiguous(), 0, f.code_count - 1, True)
    return Grid(
        rms * unit,
        fit=lambda w, h: (),
        encode=lambda w, p: torch.searchsorted(boundaries, w.contiguous()).to(torch.uint8),
        value=lambda codes, p: by_row.gather(1, codes.long()),
        fields=lambda groups: {"codebook": entries.to(element)},
        codebook_rows=len(entries),
        levels=lambda groups: levels,
    )


def _fit_table(points: Tensor, mass: Tensor, levels: int, table: str, element: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ascending entries `[rows, levels]`, numbers that `element` has, and the unit `[rows]` that multiplies them; float32.

    The unit is the best of several, as what rounding the levels to 8 bits costs depends on where they come to lie.
    """
    fitted = TABLES[table](points, mass, levels)
    peak = _not_zero(fitted.abs().amax(dim=1, keepdim=True))
    prefix = prefix_sums(points, mass)
    best_error = torch.full((len(fitted),), torch.inf, dtype=torch.float64)
    best_entries, best_unit = fitted, peak[:, 0]
    for i in range(PLACES):
        unit = peak / (PAIR_LIMIT // 2 - i if element == torch.int8 else LARGEST * 2 ** (-i / PLACES))
        entries = (fitted / unit).round() if element == torch.int8 else (fitted / unit).to(element).double()
        error = table_error(points, prefix, entries * unit)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_entries = torch.where(better[:, None], entries, best_entries)
        best_unit = torch.where(better, unit[:, 0], best_unit)
    return best_entries.float(), best_unit.float()


def _row_scale(points: Tensor, mass: Tensor, table: Tensor) -> Tensor:
    """Return what to multiply one table `[1, levels]` by in each row, `[rows]` float32, for the least weighted squared error.

    Half of the RMS to twice as much, then the best for the assignment that gives.
    """
    table = table.double().expand(len(points), -1)
    prefix = prefix_sums(points, mass)
    errors = torch.stack([table_error(points, prefix, table * scale) for scale in ROW_SCALES])
    scale = torch.tensor(ROW_SCALES, dtype=torch.float64)[errors.argmin(dim=0)]
    for _ in range(2):
        cell_mass, cell_sum = cells(points, prefix, table * scale[:, None])
        power, projected = (cell_mass * table.square()).sum(dim=1), (cell_sum * table).sum(dim=1)
        scale = torch.where((power > 0) & (projected > 0), projected / power, scale)
    return scale.float()


def trellis_grid(weight: Tensor, importance: Tensor, group_size: int, format: str, table: str) -> Grid:
    """Trellis-coded columns of rows that are divided by their RMS; the Gaussian table is wider than they are by SPREAD."""
    f = FORMATS[format]
    rms = _not_zero(weight.double().square().mean(dim=1).sqrt().float())
    return Grid(
        rms * (SPREAD[f.code_bits] * unit(f.state_bits)),
        fit=lambda w, h: (),
        encode=lambda w, p: viterbi.encode(w, f),
        value=lambda codes, p: decode(codes, f).float(),
        fields=lambda groups: {},
    )


AFFINE_FITS = {"search": (affine_fit, channel_fit), "hqq": (hqq_fit, hqq_channel_fit)}

TABLES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "lloyd-max": lloyd_max,
    "twin-log": twin_log,
    "twin-log-paper": twin_log_paper,
    "gaussian": gaussian,
}

GRIDS: dict[str, Callable[..., Grid]] = {
    "int2": affine_grid,
    "int3": affine_grid,
    "int4": affine_grid,
    "int6": affine_grid,
    "int8": int8_grid,
    "table2": table_grid,
    "table3": table_grid,
    "table4": table_grid,
    "table6": table_grid,
    "table2_e4m3": table_grid,
    "table3_e4m3": table_grid,
    "table4_e4m3": table_grid,
    "table6_e4m3": table_grid,
    "fp8_e4m3": fp8_grid,
    **dict.fromkeys(TRELLIS, trellis_grid),
}
