"""From a weight and the Gram matrix of its inputs to a `QTensor`: the one entry point to every method and format."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantdit.calibration import gptvq
from quantdit.calibration.gptq import descend, gptq, rtn
from quantdit.calibration.grids import GRIDS
from quantdit.calibration.kmeans import assign, kmeans
from quantdit.formats import FORMATS, QSpec
from quantdit.recipes.rules import LayerPlan
from quantdit.tensors.qtensor import QTensor

CODEBOOK_ROUNDS = 2  # of error feedback and a codebook fitted to its codes


@dataclass(frozen=True)
class WeightOptions:
    """What the methods of `quantize_weight` leave open.

    Attributes:
        table: how level tables are chosen, a name of grids.TABLES.
        table_rows: `layer` (one table) or `channel` (one per output channel).
        act_order: of gptq, see there.
        cd_passes: passes of coordinate descent after gptq.
        seed: of the k-means start.
    """

    table: str = "lloyd-max"
    table_rows: str = "layer"
    act_order: bool = False
    cd_passes: int = 0
    seed: int = 0


def quantize_as_planned(weight: Tensor, gram: Tensor, plan: LayerPlan, seed: int) -> QTensor:
    """Return weight `[out, in]` as its plan says; see `quantize_weight`."""
    rule = plan.rule
    options = WeightOptions(rule.table, rule.table_rows, rule.act_order, rule.cd_passes, seed)
    return quantize_weight(weight, gram, rule.weight, plan.group_size, rule.method, options)


def quantize_weight(
    weight: Tensor,
    gram: Tensor,
    format: str,
    group_size: int,
    method: str = "gptq",
    options: WeightOptions = WeightOptions(),
) -> QTensor:
    """Return weight `[out, in]` as a QTensor.

    Args:
        weight: float, already in the space the inputs are in (smoothed, rotated).
        gram: `[in, in]`, `sum x x^T` of those inputs, up to a positive factor; the identity if nothing is known.
        format: a name of FORMATS.
        group_size: for grouped formats; divides `in`.
        method: `gptq` (error feedback), `rtn` (round to nearest, or to the nearest codeword) or `hqq` (the same with HQQ's zero
            points).
        options: of the method.

    Raises:
        ValueError: the weight has NaN or infinite entries.
    """
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{int((~torch.isfinite(weight)).sum())} weights are NaN or infinite")
    f = FORMATS[format]
    importance = gram.diagonal().float()
    importance = (importance / importance.mean().clamp_min(1e-30)).clamp_min(1e-6)
    if f.dim > 1:
        return _quantize_vectors(weight, importance, gram, format, method, options)
    extra = {"fit": "hqq"} if method == "hqq" else {"rows": options.table_rows} if f.kind == "codebook" else {}
    grid = GRIDS[format](weight, importance, group_size, format, options.table, **extra)
    W = weight / grid.scale[:, None]
    if method == "gptq":
        codes, groups = gptq(W, gram, grid, group_size, act_order=options.act_order)
        codes = descend(codes, W, gram, grid, groups, group_size, options.cd_passes) if options.cd_passes else codes
    else:
        codes, groups = rtn(W, importance, grid, group_size)
    spec = QSpec(format, len(weight), weight.shape[1], group_size, grid.codebook_rows)
    q = QTensor(spec, f.pack(f, codes), _zero_rows(grid.scale, weight), **grid.fields(groups))
    q = _refine_scale(q, weight, gram) if method == "gptq" else q
    return replace(q, scale=gptvq.in_16_bits(q.scale)) if f.state_bits else q


def _quantize_vectors(
    weight: Tensor, importance: Tensor, gram: Tensor, format: str, method: str, options: WeightOptions
) -> QTensor:
    f, act_order = FORMATS[format], options.act_order
    out, width = weight.shape
    rms = weight.square().mean(dim=1).sqrt()
    rms = torch.where(rms > 0, rms, torch.ones_like(rms))
    W = weight / rms[:, None]
    weights = importance.reshape(-1, f.dim).repeat(out, 1)
    groups, split = W.reshape(-1, f.dim), f.sign_split
    codebook = kmeans(groups.abs() if split else groups, weights, f.codewords, options.seed)
    if method == "gptq":
        for _ in range(CODEBOOK_ROUNDS):
            codes = gptvq.feedback(W, gram, codebook, act_order=act_order, sign_split=split)
            codebook = gptvq.fit_codebook(codebook, codes, W, gram, rms.square(), sign_split=split)
    entries, unit = gptvq.on_int8_grid(codebook.clamp_min(0) if split else codebook)
    W = W / unit
    if method == "gptq":
        codes = gptvq.feedback(W, gram, entries, act_order=act_order, sign_split=split)
        codes = gptvq.descend(codes, W, gram, entries, options.cd_passes, split) if options.cd_passes else codes
    else:
        groups = W.reshape(-1, f.dim)
        codes = assign(groups.abs() if split else groups, weights, entries)
        codes = (codes + gptvq.sign_codes(groups) * f.codewords if split else codes).reshape(out, width // f.dim)
    spec = QSpec(format, out, width, width)
    scale = gptvq.in_16_bits(_zero_rows(rms * unit, weight))
    q = QTensor(spec, f.pack(f, codes.to(f.code_dtype)), scale, codebook=entries.to(torch.int8))
    if method == "gptq":
        q = _refine_scale(q, weight, gram)
        q = replace(q, scale=gptvq.in_16_bits(q.scale))
    return q


def _zero_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """Give rows of zeros the scale 0: a table need not have a level at 0."""
    return torch.where(weight.abs().amax(dim=1) > 0, scale, torch.zeros_like(scale))


def _refine_scale(q: QTensor, weight: Tensor, gram: Tensor) -> QTensor:
    """Replace each channel's scale by the one of least output error for the codes chosen: `s = w H I^T / I H I^T`."""
    integers = q.decode8().float()
    projected = integers @ gram.float()
    power = (projected * integers).sum(dim=1)
    best = (projected * weight).sum(dim=1) / power.clamp_min(1e-30)
    scale = torch.where((power > 0) & (best > 0), best, q.scale)
    return replace(q, scale=scale)
