"""Vector codebooks with error feedback: GPTVQ (van Baalen et al. 2024, arXiv 2402.15319) by the factor of gptq.py.

d consecutive inputs, a group, are decided at once. Given the groups before it, group g adds `|(t - q) R_gg|^2` to `|D R|^2` with

    t = w_g + (sum_{j < g} D_j R_jg) R_gg^-1,

so its codeword is the one nearest to t in the metric of `R_gg`, its upper triangular diagonal block (GPTVQ takes the diagonal of
that metric alone). Between passes the codebook is fitted to the output error of the codes it got, all of its entries at once.

Where signs are split off (formats/codebook.py), they are part of a code, and a group takes the signs of its target.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantdit.calibration.gptq import LEAF, descent, each, factor, one_by_one, sweep
from quantdit.calibration.grids import PAIR_LIMIT
from quantdit.formats.codebook import entries_of

CODEBOOK_STEPS = 6  # of conjugate gradients; the error falls by another 0.1 % with 20


def feedback(
    W: Tensor, H: Tensor, codebook: Tensor, damp: float = 0.01, act_order: bool = False, sign_split: bool = False
) -> Tensor:
    """Return the codes `[out, in / d]` int64 of error feedback.

    Args:
        W: `[out, in]` float32 in units of the codebook.
        H: `[in, in]`, the Gram matrix of the inputs, any positive multiple of it.
        codebook: `[k, d]` float32.
        damp: part of the mean diagonal added to the diagonal.
        act_order: groups in order of falling power.
        sign_split: whether signs are free, and the codebook one of magnitudes.
    """
    d, width = codebook.shape[1], W.shape[1]
    power = H.diagonal().reshape(-1, d).sum(dim=1)
    groups = power.argsort(descending=True, stable=True) if act_order else torch.arange(width // d)
    order = (groups[:, None] * d + torch.arange(d)).flatten()
    R = factor(H.index_select(0, order).index_select(1, order), damp)
    W = W.T[order]
    D, effect = torch.empty_like(W), torch.zeros_like(W)
    codes = torch.empty(width // d, W.shape[1], dtype=torch.int64)
    places = groups.tolist()

    def visit(i: int) -> None:
        if i % d == 0:
            part = slice(i, i + d)
            metric = R[part, part]
            moved = torch.linalg.solve_triangular(metric.T, effect[part], upper=False)
            chosen = nearest((W[part] + moved).T, codebook, metric, sign_split)
            D[part] = W[part] - entries_of(codebook, chosen, sign_split).T
            codes[places[i // d]] = chosen

    sweep(one_by_one(visit, R.T, D, effect), R.T, D, effect, max(d, LEAF // d * d))
    return codes.T.contiguous()


def descend(codes: Tensor, W: Tensor, H: Tensor, codebook: Tensor, passes: int, sign_split: bool = False) -> Tensor:
    """Return codes `[out, in / d]` of no larger output error `tr((V - W) H (V - W)^T)`: each group in turn, all others held.

    A group takes the codeword nearest to `v_g - (H (V - W))_g H_gg^-1` in the metric of H_gg, which no other can beat. Where
    signs are split off, another could, with other signs than the target's: a group keeps the code it has if that is nearer.
    """
    d, H = codebook.shape[1], H.float()
    roots = group_roots(H, d)
    codes, V = codes.T.contiguous(), entries_of(codebook, codes, sign_split).flatten(1).T.contiguous()

    def visit(i: int, slope: Tensor, moved: Tensor) -> None:
        if i % d == 0:
            here, group = slice(i, i + d), i // d
            target = V[here] - torch.cholesky_solve(slope[:d], roots[group])
            chosen = nearest(target.T, codebook, roots[group], sign_split)
            new = entries_of(codebook, chosen, sign_split).T
            if sign_split:
                has = V[here]
                worse = (roots[group].T @ (new - target)).norm(dim=0) > (roots[group].T @ (has - target)).norm(dim=0)
                chosen, new = torch.where(worse, codes[group], chosen), torch.where(worse, has, new)
            moved[:d] = new - V[here]
            V[here], codes[group] = new, chosen

    descent(each(visit), H, V - W.T, passes, max(d, LEAF // d * d))
    return codes.T.contiguous()


def group_roots(H: Tensor, d: int) -> Tensor:
    """Return the Cholesky factors `[in / d, d, d]` of the diagonal blocks of H `[in, in]` float32."""
    blocks = H.unflatten(0, (-1, d)).unflatten(2, (-1, d)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    # A dead input has no error; a little of the mean keeps its block positive definite.
    blocks = blocks + 1e-6 * H.diagonal().mean().clamp_min(1e-30) * torch.eye(d, dtype=H.dtype)
    roots, failed = torch.linalg.cholesky_ex(blocks)
    if bool(failed.any()):  # few tokens leave blocks that are singular, which rounding makes worse
        traces = blocks.diagonal(dim1=1, dim2=2).sum(dim=1)
        firm = torch.linalg.cholesky(blocks + 1e-4 * torch.diag_embed(traces[:, None].expand(-1, d)))
        roots = torch.where(failed[:, None, None] > 0, firm, roots)
    return roots


def on_int8_grid(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return entries that are whole numbers up to PAIR_LIMIT / 2, float32, and the unit that they are in."""
    unit = codebook.abs().max().clamp_min(1e-30) / (PAIR_LIMIT // 2)
    return (codebook / unit).round(), unit


def in_16_bits(scale: Tensor) -> Tensor:
    """Return scales float32 rounded to float16, or to bfloat16 where one is out of the range of float16's normal numbers.

    A file then stores them in half the bytes (files.narrowest), which counts beside codes of 2 bits.
    """
    normal = torch.finfo(torch.float16)
    fits = bool(((scale == 0) | ((scale >= normal.tiny) & (scale <= normal.max))).all())
    return scale.to(torch.float16 if fits else torch.bfloat16).float()


def nearest(targets: Tensor, codebook: Tensor, metric: Tensor, sign_split: bool = False) -> Tensor:
    """Return the code `[n]` int64 of the least `|(t - c) M|^2` for targets `[n, d]`, codebook `[k, d]`, M `[d, d]`.

    With `sign_split` the signs are the targets' own, and the codeword the best one for them.
    """
    if sign_split:
        errors, flips = signed_errors(targets, codebook, metric)
        return errors.argmin(dim=1) + flips
    seen, known = targets @ metric, codebook @ metric
    return torch.addmm(known.square().sum(dim=1), seen, known.T, alpha=-2).argmin(dim=1)


def signed_errors(targets: Tensor, codebook: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return `|(t - s c) M|^2 - |t M|^2` `[n, k]` of every codeword c with the signs s of the target, and their code `[n]`.

    With `G = M M^T` that is `sum_ij s_i s_j G_ij c_i c_j - 2 sum_i s_i (t G)_i c_i`: one product of what depends on the target
    with what depends on the codeword.
    """
    k, d = codebook.shape
    G, signs = metric @ metric.T, 1 - 2 * (targets < 0).to(targets.dtype)
    i, j = torch.triu_indices(d, d, 1)
    of_target = torch.cat([signs[:, i] * signs[:, j], (targets @ G) * signs], dim=1)
    of_codeword = torch.cat([2 * G[i, j] * codebook[:, i] * codebook[:, j], -2 * codebook], dim=1)
    errors = torch.addmm(codebook.square() @ G.diagonal(), of_target, of_codeword.T)
    return errors, sign_codes(targets) * k


def sign_codes(vectors: Tensor) -> Tensor:
    """Return for vectors `[..., d]` the number `[...]` int64 whose bit j says that entry j is negative."""
    return ((vectors < 0) << torch.arange(vectors.shape[-1])).sum(dim=-1)


def fit_codebook(
    codebook: Tensor,
    codes: Tensor,
    W: Tensor,
    H: Tensor,
    row_weight: Tensor,
    steps: int = CODEBOOK_STEPS,
    sign_split: bool = False,
) -> Tensor:
    """Return the codebook `[k, d]` after steps of conjugate gradients on the output error of the codes, never a worse one.

    The error is `sum_o row_weight_o (V_o - W_o) H (V_o - W_o)^T`, quadratic in the entries. Codewords that no group has stay.

    Args:
        codebook: `[k, d]` float32.
        codes: `[out, in / d]`.
        W: `[out, in]`, in units of the codebook.
        H: `[in, in]`.
        row_weight: `[out]`, the square of each channel's scale.
        steps: of conjugate gradients, each a product `[out, in] [in, in]`.
        sign_split: whether codes hold signs.
    """
    (k, d), H = codebook.shape, H.float()
    index = codes.flatten() % k
    signs = entries_of(torch.ones_like(codebook), codes, True).flatten(1) if sign_split else 1

    def collected(y: Tensor) -> Tensor:
        return torch.zeros_like(codebook).index_add_(0, index, (row_weight[:, None] * y).reshape(-1, d))

    def product(c: Tensor) -> Tensor:
        return collected(signs * (signs * c[index].reshape(W.shape) @ H))

    mass = collected(H.diagonal().clamp_min(0).expand_as(W))
    usable = mass > 0
    residual = collected(signs * ((W - signs * codebook[index].reshape(W.shape)) @ H))
    return codebook + _conjugate_gradients(product, residual, torch.where(usable, 1 / mass.clamp_min(1e-30), 0.0), steps)


def _conjugate_gradients(product: Callable[[Tensor], Tensor], residual: Tensor, scale: Tensor, steps: int) -> Tensor:
    """Return x with `product(x)` near `residual`, from 0, preconditioned by the diagonal `scale`."""
    x = torch.zeros_like(residual)
    z = scale * residual
    direction, power = z, float((residual * z).sum(dtype=torch.float64))
    for _ in range(steps):
        image = product(direction)
        curvature = float((direction * image).sum(dtype=torch.float64))
        if power <= 0 or curvature <= 0:
            break
        x = x + power / curvature * direction
        residual = residual - power / curvature * image
        z = scale * residual
        before, power = power, float((residual * z).sum(dtype=torch.float64))
        direction = z + power / before * direction
    return x
