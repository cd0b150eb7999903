"""Timestep buckets: which part of the sampling trajectory a transformer call belongs to, for what differs between parts.

Static activation scales have one for each bucket. Where activations are wider on the first and the last steps (`edge_steps` of a
recipe), these steps are the first and the last bucket, and the steps between share the others.

Bucket 0 is the noisiest. Along a trajectory times fall in most classes and rise in some. Edges are stored from the noisiest
bucket to the cleanest, so falling edges mean falling times and rising edges mean rising times.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

LEAST_BUCKETS = 3  # where the first and the last are edges


class PerThread(threading.local):
    """The bucket of this thread's latest call, and whether it is an edge; None before its first. Copies start with None."""

    bucket: int | None = None
    at_edge: bool | None = None

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


def check_edge_steps(steps: int, edge_steps: int) -> None:
    """Refuse a trajectory of so few steps that none lies between its first and its last `edge_steps`.

    Raises:
        ValueError: it has fewer than `2 * edge_steps + 1`.
    """
    least = 2 * edge_steps + 1
    if edge_steps and steps < least:
        raise ValueError(
            f"edge_steps = {edge_steps} needs at least {least} sampling steps, so that one lies between the edges, got {steps};"
            " sample more steps or choose fewer edge_steps"
        )


def buckets_of(
    order: Sequence[float | None], steps: int, buckets: int, edge_steps: int = 0
) -> tuple[dict[float | None, int], tuple[tuple[float, int], ...]]:
    """Return the bucket of each time of a trajectory, and the levels that its edges end at.

    Args:
        order: the different times, the noisiest first; None, of calls without a time, last.
        steps: sampling steps of the whole trajectory; as many as there are times where these are more.
        buckets: number of buckets. Of equal length without `edge_steps`; with them the first and the last bucket hold as many
            steps each, and those between are of equal length.
        edge_steps: steps at each end that are an edge; 0 for none.

    Returns:
        The buckets by time. For `edges_of`, beside the times, a time and its bucket for each of the two levels: half-way from the
        last step of the one edge to the next step, half-way from the step before the other edge to that edge; () without edges.

    Raises:
        ValueError: too few times or buckets for such edges.
    """
    if not edge_steps:
        length = max(steps, len(order))
        return {time: min(i * buckets // length, buckets - 1) for i, time in enumerate(order)}, ()
    check_edge_steps(len(order), edge_steps)
    if buckets < LEAST_BUCKETS:
        raise ValueError(f"edge_steps = {edge_steps} needs at least {LEAST_BUCKETS} timestep buckets, got {buckets}")
    between = len(order) - 2 * edge_steps
    found = {}
    for i, time in enumerate(order):
        inner = 1 + (i - edge_steps) * (buckets - 2) // between
        found[time] = 0 if i < edge_steps else buckets - 1 if i >= len(order) - edge_steps else inner
    times = [time for time in order if time is not None]
    noisy, clean = edge_steps, len(times) - edge_steps
    levels = ((times[noisy - 1] + times[noisy]) / 2, 0), ((times[clean - 1] + times[clean]) / 2, buckets - 2)
    return found, levels


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
