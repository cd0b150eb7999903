"""Timestep buckets: which part of the sampling trajectory a transformer call belongs to, for scales that are fixed per part.

Bucket 0 is the noisiest. Along a trajectory times fall in most classes and rise in some. Edges are stored from the noisiest
bucket to the cleanest, so falling edges mean falling times and rising edges mean rising times.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence


class PerThread(threading.local):
    """The bucket of this thread's latest call; None before its first. Copies and pickles start with None."""

    bucket: int | None = None

    def __reduce__(self) -> tuple:
        return PerThread, ()

    def __deepcopy__(self, memo: dict) -> PerThread:
        return PerThread()


def rising(times: Sequence[float]) -> bool:
    """Return whether times, in the order of the calls, rise along a trajectory: most of their changes are upwards.

    Several trajectories may follow one another; the jump between two is one change.
    """
    changes = [b - a for a, b in itertools.pairwise(times) if a != b]
    return sum(change > 0 for change in changes) > len(changes) / 2


def bucket_of(time: float | None, edges: Sequence[float]) -> int:
    """Return the first bucket whose edge the time reaches; the last bucket if it reaches none or is None.

    Falling edges are reached from above (`time >= edge`), rising ones from below.
    """
    last = len(edges) - 1
    if time is None:
        return last
    if edges[last] > edges[0]:
        return next((b for b, edge in enumerate(edges) if time <= edge), last)
    return next((b for b, edge in enumerate(edges) if time >= edge), last)


def edges_of(times: Sequence[tuple[float, int]], buckets: int) -> tuple[float, ...]:
    """Return the edge of each bucket: its time of least noise. Finite for finite times.

    Args:
        times: a time and its bucket for each call; bucket 0 is the noisiest. Without any, all edges are 0.
        buckets: number of buckets. An empty bucket takes the edge of the one before it, or of the first that has calls.
    """
    if not times:
        return (0.0,) * buckets
    first, last = min(b for _, b in times), max(b for _, b in times)
    means = [sum(found) / len(found) for found in ([t for t, b in times if b == of] for of in (first, last))]
    sign = -1.0 if means[1] > means[0] else 1.0  # of rising times the negative falls
    edges: list[float] = []
    for bucket in range(buckets):
        found = [sign * time for time, of in times if of == max(bucket, first)]
        edges.append(min([*edges[-1:], *found]))
    return tuple(sign * edge + 0.0 for edge in edges)  # no -0.0
