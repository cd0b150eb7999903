"""Caches of diffusers and of cache-dit on quantized models of every class of the zoo: what works, raises, or hooks nothing.

    python reports/caches.py [--only FirstBlock]

Each tiny transformer (tests/models/tiny_models.py, seed 0) is quantized to w4a8 without data and called along a trajectory of
STEPS steps between two random latents, in a cache context, with and without the cache. A row says how many of the blocks' calls
were computed, how far the outputs are from those without the cache, and where a cache has a setting that skips nothing, whether
it then gives the same bits. The file is made anew. cache-dit (Apache-2.0) is measured where it is installed: pip install
cache-dit.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "caches.jsonl", HERE / "caches.md"
sys.path += [str(HERE.parent / "tests" / "models"), str(HERE / "study")]
import measure  # noqa: E402
import quantdit  # noqa: E402
import tiny_models  # noqa: E402
from quantdit.models import adapter as adapters  # noqa: E402
from quantdit.models.adapter import adapter_for  # noqa: E402
from quantdit.models.call_view import view  # noqa: E402
from quantdit.models.prediction import prediction_of  # noqa: E402
from quantdit.models.synthetic import latent_of, moved_inputs, synthetic_inputs  # noqa: E402
from quantdit.step_plans.following import cache_of, carry  # noqa: E402
from quantdit.step_plans.forecasts import placed, polynomial  # noqa: E402

STEPS = 20
TIMES = [1000.0 * (STEPS - i) / STEPS for i in range(STEPS)]
ATTENTION = r".*blocks\.\d+\.attn\d?"  # which TaylorSeer's own patterns miss where modules are called attn1


@dataclass(frozen=True)
class Cache:
    """How a cache is switched on, and with a setting that skips nothing."""

    name: str
    settings: str
    enable: Callable[[nn.Module], object]
    none: Callable[[nn.Module], object] | None = None


def of_diffusers(kind: str, **fields: Any) -> Callable[[nn.Module], object]:
    """Return what enables a cache of diffusers, by the model's own method or, where its class has none, by the function."""

    def enable(model: nn.Module) -> None:
        from diffusers import hooks

        config = getattr(hooks, f"{kind}Config")(**fields)
        if hasattr(model, "enable_cache"):
            model.enable_cache(config)
        else:
            getattr(hooks, APPLY[kind])(model, config)

    return enable


APPLY = {
    "FirstBlockCache": "apply_first_block_cache",
    "MagCache": "apply_mag_cache",
    "TaylorSeerCache": "apply_taylorseer_cache",
    "PyramidAttentionBroadcast": "apply_pyramid_attention_broadcast",
}


def cache_dit(threshold: float) -> Callable[[nn.Module], object]:
    """Return what enables cache-dit."""

    def enable(model: nn.Module) -> None:
        import cache_dit as theirs

        settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "num_inference_steps": STEPS}
        settings["residual_diff_threshold"] = threshold
        theirs.enable_cache(model, cache_config=theirs.DBCacheConfig(**settings))

    return enable


def step_plan(model: nn.Module) -> None:
    """Enable a plan of half the steps, as ours."""
    carry(model, polynomial("taylor1", model.trajectory_times, placed(STEPS, STEPS // 2)))
    model.enable_cache(quantdit.step_plan(model))


ONES = [1.0] * STEPS
CACHES = (
    Cache("step plan (quantdit)", "half the steps, taylor1", step_plan),
    Cache(
        "FirstBlockCache",
        "threshold=0.2",
        of_diffusers("FirstBlockCache", threshold=0.2),
        of_diffusers("FirstBlockCache", threshold=0.0),
    ),
    Cache(
        "MagCache",
        "threshold=0.06, mag_ratios of ones",
        of_diffusers("MagCache", threshold=0.06, num_inference_steps=STEPS, mag_ratios=ONES),
        of_diffusers("MagCache", retention_ratio=1.0, num_inference_steps=STEPS, mag_ratios=ONES),
    ),
    Cache("TaylorSeer", "its defaults", of_diffusers("TaylorSeerCache")),
    Cache(
        "TaylorSeer, modules named",
        f"cache_identifiers=[{ATTENTION!r}]",
        of_diffusers("TaylorSeerCache", cache_identifiers=[ATTENTION]),
        of_diffusers("TaylorSeerCache", cache_identifiers=[ATTENTION], disable_cache_before_step=STEPS),
    ),
    Cache(
        "TaylorSeer lite",
        "use_lite_mode=True, cache_interval=2, disable_cache_after_step=steps - 1",
        of_diffusers("TaylorSeerCache", use_lite_mode=True, cache_interval=2, disable_cache_after_step=STEPS - 1),
        of_diffusers("TaylorSeerCache", use_lite_mode=True, disable_cache_before_step=STEPS),
    ),
    Cache(
        "PyramidAttentionBroadcast",
        "spatial_attention_block_skip_range=2",
        of_diffusers("PyramidAttentionBroadcast", spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    ),
    Cache("cache-dit DBCache", "residual_diff_threshold=0.2", cache_dit(0.2), cache_dit(0.0)),
)


def quantized(name: str) -> tuple[nn.Module, list[dict]]:
    """Return a tiny model of a class at w4a8, and the calls of a trajectory."""
    model, size = tiny_models.tiny(name)
    adapter = adapter_for(model)
    generator = torch.Generator().manual_seed(1)
    inputs = synthetic_inputs(model, adapter, size, generator)
    ends = [latent_of(adapter, inputs), latent_of(adapter, synthetic_inputs(model, adapter, size, generator))]
    calls = []
    for time in TIMES:
        moved = torch.lerp(ends[1], ends[0], time / 1000)
        calls.append(moved_inputs(model, adapter, inputs, moved, time))
    made = quantdit.quantize(model, "w4a8")
    made.trajectory_times = [view(made, (), call).time for call in calls]
    return made, calls


def run(model: nn.Module, calls: list[dict]) -> tuple[Tensor, int]:
    """Return the outputs of a trajectory, and how many linears of blocks were called."""
    counted = [0]
    paths = tuple(f"{path}." for path, _ in adapters.blocks(model, adapter_for(model)))

    def count(*_: object) -> None:
        counted[0] += 1

    layers = [m for n, m in model.named_modules() if n.startswith(paths) and hasattr(m, "layer_spec")]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    outputs = []
    try:
        with torch.no_grad():
            for i, call in enumerate(calls):
                context = model.cache_context("cond", step_index=i) if hasattr(model, "cache_context") else nullcontext()
                with context:
                    outputs.append(prediction_of(model(**call)))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(outputs), counted[0]


def row_of(name: str, cache: Cache) -> dict:
    """Return the row of a class and a cache."""
    row = {"class": name, "cache": cache.name, "settings": cache.settings}
    if "cache-dit" in cache.name and find_spec("cache_dit") is None:
        return row | {"state": "not installed"}
    model, calls = quantized(name)
    whole, every = run(model, calls)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache.enable(model)
            if "cache-dit" not in cache.name and cache_of(model) is None:
                return row | {"state": "hooks nothing"}
            made, computed = run(model, calls)
    except Exception as error:  # what another package raises is what the row says
        said = (str(error).strip().splitlines() or [""])[0]
        return row | {"state": "raises", "error": f"{type(error).__name__}: {said}"[:160]}
    row |= {"state": "works", "computed": round(computed / every, 3)}
    row |= {"error": round(float((made - whole).norm() / whole.norm()), 5)}
    if cache.none is not None:
        model, calls = quantized(name)
        cache.none(model)
        row["same_without_skips"] = bool(torch.equal(run(model, calls)[0], whole))
    return row


def write_page(rows: list[dict]) -> None:
    """Write the table: a line for each class, a column for each cache."""
    classes = list(dict.fromkeys(row["class"] for row in rows))
    names = list(dict.fromkeys(row["cache"] for row in rows))
    found = {(row["class"], row["cache"]): row for row in rows}
    dit = f"cache-dit {version('cache-dit')}" if find_spec("cache_dit") else "cache-dit not installed"
    lines = [
        "# Caches on quantized models",
        "",
        f"Tiny random transformers of each class at w4a8, {STEPS} steps; diffusers {version('diffusers')}, {dit}. A cell: the"
        " share of block computations that were made, then the relative error of all outputs against those without the cache."
        " Random weights say whether a cache runs and skips, not what it costs in quality. **nothing**: it hooks no module, and"
        " diffusers does not say so; quantdit warns. `=`: with a setting that skips nothing the outputs are the same bits, `≠`:"
        " they are not. Made by `python reports/caches.py`.",
        "",
        f"| class | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    lines += [f"| {name} | {' | '.join(cell(found[name, cache]) for cache in names)} |" for name in classes]
    lines += ["", "Settings:", ""]
    lines += [f"* {cache.name}: `{cache.settings}`" for cache in CACHES]
    raised = sorted({(row["cache"], row["error"]) for row in rows if row["state"] == "raises"})
    lines += ["", "What is raised:", ""] + [f"* {name}: {error}" for name, error in raised] if raised else []
    PAGE.write_text("\n".join([*lines, ""]))


def cell(row: dict) -> str:
    """Return the cell of a row."""
    if row["state"] != "works":
        return {"hooks nothing": "**nothing**"}.get(row["state"], row["state"])
    same = {True: " =", False: " ≠", None: ""}[row.get("same_without_skips")]
    return f"{row['computed']:.2f}, {row['error']:.3f}{same}"


def main() -> None:
    """Make all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="caches with this in their names; nothing is written")
    only = parser.parse_args().only
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in sorted(tiny_models.TINY):
        for cache in CACHES:
            if only in cache.name:
                rows.append(row_of(name, cache))
                print(json.dumps(rows[-1]), flush=True)
    if not only:
        measure.write_rows(rows, ROWS)
        write_page(rows)


if __name__ == "__main__":
    main()
