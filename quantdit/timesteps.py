"""Timestep buckets: which part of the sampling trajectory a transformer call belongs to, for scales that are fixed per part."""

from __future__ import annotations

from torch import Tensor


def timestep_of(args: tuple, kwargs: dict) -> float | None:
    """Return the timestep of a transformer call, the largest if it has one per sample; None if it has none."""
    t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if isinstance(t, Tensor) and t.numel():
        return float(t.max())
    return float(t) if isinstance(t, int | float) else None


def bucket_of(timestep: float | None, edges: tuple[float, ...]) -> int:
    """Return the first bucket whose edge the timestep reaches, else the last."""
    if timestep is None:
        return len(edges) - 1
    return next((b for b, edge in enumerate(edges) if timestep >= edge), len(edges) - 1)


def edges_of(timesteps: list[tuple[float, int]], buckets: int) -> tuple[float, ...]:
    """Return the smallest timestep of each bucket, from pairs of timestep and bucket; an empty bucket takes the one before's."""
    edges = [float("inf")] * buckets
    for timestep, bucket in timesteps:
        edges[bucket] = min(edges[bucket], timestep)
    for b in range(1, buckets):
        edges[b] = min(edges[b], edges[b - 1])
    return tuple(edges)
