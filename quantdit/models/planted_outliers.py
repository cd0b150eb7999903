"""Planted models: a transformer of diffusers gets activation outliers as large models have them, and keeps its function.

Models that are small enough for tests and studies have tame activations. `plant` gives one the outliers that LRQ-DiT (Fig. 3),
SmoothQuant (Fig. 4) and "Massive Activations in Large Language Models" (Sun et al. 2024) find in large ones. SHAPES says which.

What a channel gains its readers lose, so quantization has a right answer: the planted model in full precision. `channels`,
`one_block` and gated feed-forwards keep the function up to rounding. The other shapes move it; the output of fashion-dit changes
by (relative, size 245): .0022 `feed_forward`, .008 `timesteps`, .010 `changing`; .0013 `massive_tokens` at size 1000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from quantdit.models import adapter as adapters
from quantdit.models.call_view import times_rise, view
from quantdit.models.synthetic import synthetic_inputs
from quantdit.recipes.sampling_plan import Size
from quantdit.system.threads import one_thread

# Made-up inputs: calls, and their size. A model that fixes a size takes its own.
CALLS, MADE_UP = 24, Size(4, 4, 16, 16, 16)
# Rows of the inputs of a layer that are kept of each call.
ROWS = 256
# How much of the way from noise to data it takes channels to fall from SIZE to 1.
SOFTNESS = 0.04
RIDGE = 1e-9  # of the features' mean square
RARE = 0.99  # of all tokens leave a planted neuron of `massive_tokens` at zero

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn1.to_q", "attn1.to_k", "attn1.to_v", "proj_mlp")
SECOND_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FEED_FORWARD, TEXT_FEED_FORWARD = ("ff.net.0.proj", "ffn.net.0.proj"), ("ff_context.net.0.proj",)
SIX = ((0, 1, ATTENTION), (3, 4, FEED_FORWARD))
# Path in the block and class of a norm of diffusers: chunk of the shift, chunk of the scale, linears that read the result.
MODULATIONS = {
    ("norm1", "AdaLayerNormZero"): SIX,
    ("norm1", "SD35AdaLayerNormZeroX"): (*SIX, (6, 7, SECOND_ATTENTION)),
    ("norm1_context", "AdaLayerNormZero"): ((0, 1, TEXT_ATTENTION), (3, 4, TEXT_FEED_FORWARD)),
    ("norm1_context", "AdaLayerNormContinuous"): ((1, 0, TEXT_ATTENTION),),
    ("norm", "AdaLayerNormZeroSingle"): ((0, 1, ATTENTION),),
}


@dataclass(frozen=True)
class Site:
    """Channels that something makes and linears read: what makes them may grow while what reads them shrinks.

    Attributes:
        block: path of the block; empty for one that spans blocks.
        rows: `[width, ...]` each; their rows c, added up, make channel c.
        ones: `[width]` each; those of the rows that the model adds 1 to before it multiplies.
        columns: `[out, width]` each; column c reads channel c.
        modulation: the block's own AdaLN linear, if that makes the channels.
        chunks: of the shift and of the scale among the rows of the modulation.
        reader: one of the linears that read.
    """

    block: str
    rows: tuple[Tensor, ...]
    ones: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    modulation: nn.Linear | None = None
    chunks: tuple[int, int] = (0, 0)
    reader: nn.Linear | None = None

    @property
    def width(self) -> int:
        """Return the number of channels."""
        return self.columns[0].shape[1]

    def grow(self, chosen: Tensor, factor: Tensor | float) -> None:
        """Make channels `chosen` `factor` times as large, and what reads them as much smaller."""
        for rows in self.rows:
            rows[chosen] *= factor if rows.ndim == 1 or not isinstance(factor, Tensor) else factor.unsqueeze(1)
        for ones in self.ones:
            ones[chosen] += factor - 1
        for columns in self.columns:
            columns[:, chosen] /= factor


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward of two linears.

    Attributes:
        first: from its input to the hidden channels, as a module.
        up: the first linear, inside of `first`; its last rows are the gates where it is gated.
        up_name: its path in `first`.
        down: the second linear.
        columns: `[out, hidden]`; those of the second linear that read the hidden channels.
    """

    first: nn.Module
    up: nn.Linear
    up_name: str
    down: nn.Linear
    columns: Tensor

    @property
    def hidden(self) -> int:
        """Return the number of hidden channels."""
        return self.columns.shape[1]

    @property
    def gated(self) -> bool:
        """Return whether hidden channels are a linear half times a function of the other half."""
        return self.up.out_features == 2 * self.hidden

    def changed(self, x: Tensor, factor: Tensor, threshold: Tensor) -> Tensor:
        """Return `[n, hidden]` for inputs `[n, in]` if the argument u of each nonlinearity were factor (u - threshold)."""
        changed = {name: parameter.clone() for name, parameter in self.first.named_parameters()}
        changed[f"{self.up_name}.weight"][-self.hidden :] *= factor.unsqueeze(1)
        if self.up.bias is not None:  # without one no shape has thresholds
            bias = changed[f"{self.up_name}.bias"][-self.hidden :]
            bias.copy_((bias - threshold) * factor)
        return functional_call(self.first, changed, (x,))

    def take(self, chosen: Tensor, factor: Tensor, threshold: Tensor) -> None:
        """Do so for good to the hidden channels `chosen`."""
        rows = chosen + self.up.out_features - self.hidden
        self.up.weight[rows] *= factor.unsqueeze(1)
        if self.up.bias is not None:
            self.up.bias[rows] = (self.up.bias[rows] - threshold) * factor

    def arguments(self, x: Tensor) -> Tensor:
        """Return the arguments of the nonlinearities, `[n, hidden]`."""
        return self.up(x)[:, -self.hidden :]


@dataclass(frozen=True)
class Planting:
    """What a shape is planted with: how large, how many, chosen how, and what runs the transformer on data."""

    transformer: nn.Module
    size: float
    count: int
    generator: torch.Generator
    run: Callable[[], object]


def channels(sites: Sequence[Site], planting: Planting) -> None:
    """Channels that AdaLN and the values make are SIZE times as large, in every block and at every step."""
    for site in sites:
        site.grow(torch.randperm(site.width, generator=planting.generator)[: planting.count], planting.size)


def feed_forward(targets: Sequence[FeedForward], planting: Planting) -> None:
    """Hidden channels of the feed-forwards reach SIZE times the median; those that ReLU may replace GELU in, or gated ones."""
    inputs, _ = _recorded(planting, [target.up for target in targets])
    for target in targets:
        x = inputs[target.up]
        now = target.first(x)
        sizes = _rms(now)
        aim = planting.size * sizes.median()
        if target.gated:
            large = (sizes >= sizes.median()).nonzero().flatten()
            order = torch.randperm(len(large), generator=planting.generator).to(large.device)
            chosen = large[order[: planting.count]]
            bias = () if target.up.bias is None else (target.up.bias[: target.hidden],)
            halves = Site("", (target.up.weight[: target.hidden], *bias), (), (target.columns,))
            halves.grow(chosen, aim / sizes[chosen])
        else:
            factor = aim / _rms(target.arguments(x).relu()).clamp_min(1e-12)
            _take_over(target, x, now, factor, torch.zeros_like(factor), sizes >= sizes.median(), planting.count)


def massive_tokens(targets: Sequence[FeedForward], planting: Planting) -> None:
    """About one token in a hundred has hidden channels of SIZE times the median, which are near zero at all others."""
    inputs, _ = _recorded(planting, [target.up for target in targets])
    for target in targets:
        x = inputs[target.up]
        now = target.first(x)
        arguments = target.arguments(x)
        threshold = arguments.kthvalue(round(RARE * len(x)), dim=0).values
        # What is left of the nonlinearity where its argument is large.
        steep = torch.full_like(threshold, 1e4)
        fires = target.changed(x, steep, threshold) / steep
        rare = (arguments > threshold).sum(0).clamp_min(1)
        factor = planting.size * _rms(now).median() / (fires.square().sum(0) / rare).sqrt().clamp_min(1e-12)
        _take_over(target, x, now, factor, threshold, factor.isfinite(), planting.count)


def timesteps(sites: Sequence[Site], planting: Planting) -> None:
    """Channels that AdaLN makes are SIZE times as large in the noisy half of the steps alone."""
    _plant_by_time(sites, planting, (1,))


def changing(sites: Sequence[Site], planting: Planting) -> None:
    """One set of channels that AdaLN makes is SIZE times as large in the noisy half, another one in the clean half."""
    _plant_by_time(sites, planting, (1, -1))


# Made by `plant`; a shape's function says what it is.
SHAPES: dict[str, Callable[[Sequence, Planting], None]] = {
    "channels": channels,
    "one_block": channels,
    "feed_forward": feed_forward,
    "timesteps": timesteps,
    "changing": changing,
    "massive_tokens": massive_tokens,
}


@torch.no_grad()
@one_thread()
def plant(
    transformer: nn.Module, shape: str, size: float, count: int = 2, seed: int = 7, run: Callable[[], object] | None = None
) -> None:
    """Plant outliers of a shape in a transformer's weights, in place.

    Args:
        transformer: of a class of diffusers, in float32, on one device.
        shape: one of SHAPES.
        size: how many times as large as before (AdaLN, values), or as the median hidden channel (feed-forwards), above 1.
        count: channels at every place.
        seed: which channels are planted, and of the inputs made up.
        run: runs the transformer on typical inputs, for shapes that look at activations; if not given, inputs are made up.

    Raises:
        ValueError: an unknown shape, one that this class cannot have, a size or count out of range, or weights in another dtype.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r} of outliers; use one of {', '.join(SHAPES)}")
    if not size > 1 or count < 1:
        raise ValueError(f"size is {size} and count {count}; expected a size above 1 and a count of at least 1")
    dtypes = {p.dtype for p in transformer.parameters()} - {torch.float32}
    if dtypes:
        raise ValueError(f"weights are in {', '.join(sorted(map(str, dtypes)))}; load the transformer in torch.float32")
    targets = {name: found for name, found in _targets(transformer).items() if found}
    if shape not in targets:
        able = f"it can have {', '.join(targets)}" if targets else "it can have none"
        raise ValueError(f"{type(transformer).__name__} cannot have outliers of shape {shape}; {able}")
    generator = torch.Generator().manual_seed(seed)
    made_up = partial(_run_made_up, transformer, torch.Generator().manual_seed(seed))
    SHAPES[shape](targets[shape], Planting(transformer, size, count, generator, run or made_up))


def _targets(transformer: nn.Module) -> dict[str, list]:
    """Return where each of SHAPES could be planted."""
    blocks = adapters.blocks(transformer, adapters.adapter_for(transformer))
    sites = [site for path, block in blocks for site in _sites(path, block)] + _shared_sites(transformer, blocks)
    modulated = [site for site in sites if site.modulation is not None]
    hidden = [found for _, block in blocks for found in _feed_forwards(block)]
    middle = blocks[len(blocks) // 2][0]
    return {
        "channels": sites,
        "one_block": [site for site in sites if site.block == middle],
        "feed_forward": hidden,
        "timesteps": modulated,
        "changing": modulated,
        "massive_tokens": [found for found in hidden if found.up.bias is not None],
    }


def _readers(block: nn.Module, paths: Sequence[str]) -> list[nn.Linear]:
    inside = dict(block.named_modules())
    return [linear for path in paths if isinstance(linear := inside.get(path), nn.Linear)]


def _sites(path: str, block: nn.Module) -> list[Site]:
    """Return the sites inside one block."""
    found = []
    for (name, kind), parts in MODULATIONS.items():
        norm = getattr(block, name, None)
        if norm is None or type(norm).__name__ != kind or norm.linear.bias is None:
            continue
        for shift, scale, paths in parts:
            readers = _readers(block, paths)
            if readers:
                found.append(_modulated(path, norm.linear, (shift, scale), readers))
    for name in ("attn", "attn1", "attn2"):
        found += _values(path, block, getattr(block, name, None))
    norm, query = getattr(block, "norm2", None), _readers(block, ("attn2.to_q",))
    if query and isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        found.append(Site(path, (norm.weight, norm.bias), (), (query[0].weight,)))
    return found


def _modulated(path: str, linear: nn.Linear, chunks: tuple[int, int], readers: list[nn.Linear]) -> Site:
    width = readers[0].in_features
    weight, bias = linear.weight.view(-1, width, linear.in_features), linear.bias.view(-1, width)
    rows = tuple(rows[chunk] for chunk in chunks for rows in (weight, bias))
    return Site(path, rows, (bias[chunks[1]],), tuple(r.weight for r in readers), linear, chunks, readers[0])


def _values(path: str, block: nn.Module, attention: nn.Module | None) -> list[Site]:
    """Return the channels between the values and the projection that reads what attention mixes them to."""
    makers = [m for name in ("to_v", "add_v_proj") if isinstance(m := getattr(attention, name, None), nn.Linear)]
    if not makers:
        return []
    width = makers[0].out_features
    out, text_out = getattr(attention, "to_out", None), getattr(attention, "to_add_out", None)
    if isinstance(out, nn.ModuleList):
        columns = [m.weight for m in (out[0], text_out) if isinstance(m, nn.Linear)]
    elif isinstance(joint := getattr(block, "proj_out", None), nn.Linear):
        columns = [joint.weight[:, :width]]  # attention first, then the feed-forward
    else:
        return []
    if any(c.shape[1] != width for c in columns):
        return []  # several heads share one
    rows = [t for m in makers for t in (m.weight, m.bias) if t is not None]
    return [Site(path, tuple(rows), (), tuple(columns))]


def _shared_sites(transformer: nn.Module, blocks: list[tuple[str, nn.Module]]) -> list[Site]:
    """Return those whose shift and scale are a table of each block plus what one linear makes for all blocks."""
    tables = [(block, table) for _, block in blocks if (table := getattr(block, "scale_shift_table", None)) is not None]
    inside = {id(m) for _, block in blocks for m in block.modules()}
    shared = [
        m
        for m in transformer.modules()
        if isinstance(m, nn.Linear) and id(m) not in inside and tables and m.out_features == tables[0][1].numel()
    ]
    if len(shared) != 1 or len(tables) != len(blocks) or tables[0][1].shape[-2] != 6:
        return []
    found, width = [], tables[0][1].shape[-1]
    weight, bias = shared[0].weight.view(6, width, -1), shared[0].bias.view(6, width)
    for shift, scale, paths in SIX:
        readers = [linear for block, _ in tables for linear in _readers(block, paths)]
        views = [table.view(6, width) for _, table in tables]
        if readers:
            rows = [t for chunk in (shift, scale) for t in (weight[chunk], bias[chunk], *(v[chunk] for v in views))]
            found.append(Site("", tuple(rows), tuple(v[scale] for v in views), tuple(r.weight for r in readers)))
    return found


def _feed_forwards(block: nn.Module) -> list[FeedForward]:
    found = []
    for name in ("ff", "ffn", "ff_context"):
        net = getattr(getattr(block, name, None), "net", None)
        if net is not None and isinstance(up := getattr(net[0], "proj", None), nn.Linear):
            found.append(FeedForward(net[0], up, "proj", net[2], net[2].weight))
    if isinstance(up := getattr(block, "proj_mlp", None), nn.Linear) and hasattr(block, "act_mlp"):
        out, act = block.get_submodule("proj_out"), block.get_submodule("act_mlp")
        assert isinstance(out, nn.Linear)  # as in every single-stream block of diffusers
        columns = out.weight[:, -up.out_features :]  # after those of attention
        found.append(FeedForward(nn.Sequential(up, act), up, "0", out, columns))
    return found


def _run_made_up(transformer: nn.Module, generator: torch.Generator) -> None:
    """Call the transformer with made-up inputs at times from noise to data."""
    adapter = adapters.adapter_for(transformer)
    device = next(transformer.parameters()).device
    for time in torch.linspace(999, 1, CALLS).tolist():
        inputs = synthetic_inputs(transformer, adapter, MADE_UP, generator, time)
        transformer(**tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs))


def _recorded(planting: Planting, modules: list[nn.Module]) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """Return rows `[n, in]` of each module's inputs while the transformer runs, and their noise `[n]`: 1 at first, 0 at last."""
    rows: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    times: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    now = [0.0]

    def clock(transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        now[0] = view(transformer, args, kwargs).time or 0.0

    def collect(module: nn.Module, args: tuple) -> None:
        x = args[0].flatten(0, -2)
        kept = torch.randperm(len(x), generator=planting.generator)[:ROWS]
        rows[module].append(x[kept.to(x.device)].float())
        times[module].append(torch.full((len(kept),), now[0], dtype=torch.float64, device=x.device))

    handles = [module.register_forward_pre_hook(collect) for module in modules]
    handles.append(planting.transformer.register_forward_pre_hook(clock, with_kwargs=True))
    try:
        planting.run()
    finally:
        for handle in handles:
            handle.remove()
    noise = {module: _noise(torch.cat(found), bool(times_rise(planting.transformer))) for module, found in times.items()}
    return {module: torch.cat(found) for module, found in rows.items()}, noise


def _noise(times: Tensor, rises: bool) -> Tensor:
    part = (times - times.min()) / (times.max() - times.min()).clamp_min(1e-12)
    return 1 - part if rises else part


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(0).sqrt()


def _take_over(
    target: FeedForward, x: Tensor, now: Tensor, factor: Tensor, threshold: Tensor, allowed: Tensor, count: int
) -> None:
    """Change `count` hidden channels, those whose best affine fit by what they become moves the output least."""
    then = target.changed(x, factor, threshold)
    centred = then - then.mean(0)
    slope = (centred * (now - now.mean(0))).sum(0) / centred.square().sum(0).clamp_min(1e-20)
    offset = now.mean(0) - slope * then.mean(0)
    lost = (now - slope * then - offset).square().mean(0) * target.columns.float().square().sum(0)
    chosen = lost.masked_fill(~allowed, torch.inf).argsort()[:count]
    target.take(chosen, factor[chosen], threshold[chosen])
    if target.down.bias is not None:
        target.down.bias.add_(target.columns[:, chosen] @ offset[chosen].to(target.columns.dtype))
    target.columns[:, chosen] *= slope[chosen]


def _plant_by_time(sites: Sequence[Site], planting: Planting, signs: tuple[int, ...]) -> None:
    """Grow channels where the noise is large (sign 1) or small (-1); each set is another one."""
    timed = [(s, s.modulation, s.reader) for s in sites if s.modulation is not None and s.reader is not None]
    modules: list[nn.Module] = [module for _, *both in timed for module in both]
    inputs, noise = _recorded(planting, list(dict.fromkeys(modules)))
    for site, modulation, reader in timed:
        taken = torch.zeros(site.width, dtype=torch.bool, device=site.columns[0].device)
        for sign in signs:
            chosen = _least_missed(site, inputs[reader], _factor(noise[reader], sign, planting.size), planting, taken)
            taken[chosen] = True
            _fit_modulation(site, modulation, chosen, inputs[modulation], _factor(noise[modulation], sign, planting.size))
            for columns in site.columns:
                columns[:, chosen] /= planting.size


def _factor(noise: Tensor, sign: int, size: float) -> Tensor:
    """Return how many times as large channels are to be: SIZE at noise (sign 1) or at data (-1), 1 at the other end."""
    return 1 + (size - 1) * torch.sigmoid(sign * (noise - 0.5) / SOFTNESS)


def _least_missed(site: Site, x: Tensor, factor: Tensor, planting: Planting, taken: Tensor) -> Tensor:
    """Return the channels whose readers lose least where they stay small, of those that are large where they grow."""
    share = (factor / planting.size).float().unsqueeze(1)
    read = sum(columns.float().square().sum(0) for columns in site.columns)
    lost = ((1 - share) * x).square().mean(0) * read
    grown = _rms(share * x)
    return lost.masked_fill((grown < grown.median()) | taken, torch.inf).argsort()[: planting.count]


def _fit_modulation(site: Site, linear: nn.Linear, chosen: Tensor, features: Tensor, factor: Tensor) -> None:
    """Fit the rows of shift and scale to `factor` times what they make, by ridge regression on the linear's inputs."""
    shift, scale = site.chunks
    rows = torch.cat([chosen + shift * site.width, chosen + scale * site.width])
    one = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    one[len(chosen) :] = 1
    features = features.double()
    wanted = factor.unsqueeze(1) * (features @ linear.weight[rows].double().T + linear.bias[rows].double() + one) - one
    mean, centre = features.mean(0), wanted.mean(0)
    spread = features - mean
    gram = spread.T @ spread
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    fitted = torch.linalg.solve(gram, spread.T @ (wanted - centre)).T
    linear.weight[rows] = fitted.to(linear.weight.dtype)
    linear.bias[rows] = (centre - fitted @ mean).to(linear.bias.dtype)
