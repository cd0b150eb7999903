"""Stats: sums over a stream of rows. Of small integers every float32 sum is exact, so comparisons are for equality."""

from __future__ import annotations

import math

import pytest
import torch

from quantdit.calibration import stats
from quantdit.calibration.stats import SAMPLED_ROWS, Stats

WIDTH, BUCKETS = 12, 3


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def collect(*parts: tuple[torch.Tensor, int]) -> Stats:
    result = stats.init(WIDTH, BUCKETS)
    for x, bucket in parts:
        result = stats.update(result, x, bucket)
    return result


def assert_same(a: Stats, b: Stats) -> None:
    assert a.count == b.count
    assert torch.equal(a.gram, b.gram)
    assert torch.equal(a.absmax, b.absmax)
    assert torch.equal(a.rows, b.rows)


def test_definitions():
    x, y = integers(40, WIDTH), integers(2, 5, WIDTH, seed=1)
    result = collect((x, 0), (y, 2))
    rows = torch.cat([x, y.reshape(-1, WIDTH)])
    assert result.count == 50
    assert torch.equal(result.gram, rows.T @ rows)
    assert torch.equal(result.absmax[0], x.abs().amax(dim=0))
    assert torch.equal(result.absmax[1], torch.zeros(WIDTH))
    assert torch.equal(result.absmax[2], y.abs().amax(dim=(0, 1)))
    assert all(t.dtype == torch.float32 for t in (result.gram, result.absmax, result.rows))


@pytest.mark.parametrize(("chunk", "block"), [(7, 5), (40, 12), (4096, 1)])
def test_chunks_and_blocks_only_save_time(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int):
    """Rows added a few at a time, half of the Gram matrix block by block and mirrored: the same sums."""
    parts = [(integers(30, WIDTH, seed=i), i) for i in range(BUCKETS)]
    whole = collect(*parts)
    monkeypatch.setattr(stats, "CHUNK", chunk)
    monkeypatch.setattr(stats, "BLOCK", block)
    assert_same(collect(*parts), whole)
    assert torch.equal(collect(*parts).total, whole.total)
    assert torch.equal(collect(*parts).gram, whole.gram.T)
    assert torch.equal(collect(*parts).centred_gram, whole.centred_gram)


def test_a_refused_update_adds_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "CHUNK", 4)
    old = collect((integers(30, WIDTH), 0))
    copies = [t.clone() for t in (old.gram, old.total, old.absmax)]
    x = integers(9, WIDTH, seed=1)
    x[8, 0] = math.inf
    with pytest.raises(ValueError, match="1 of 12"):
        stats.update(old, x, 1)
    assert all(torch.equal(a, b) for a, b in zip((old.gram, old.total, old.absmax), copies, strict=True))


def test_updates_of_one_bucket_add_up():
    x = integers(33, WIDTH)
    whole, halves = collect((x, 1)), collect((x[:20], 1), (x[20:], 1))
    assert whole.count == halves.count
    assert torch.equal(whole.gram, halves.gram)
    assert torch.equal(whole.absmax, halves.absmax)


def test_the_past_is_not_changed():
    """Apart from the Gram matrix, which `update` adds to in place."""
    old = collect((integers(30, WIDTH), 0))
    copies = [t.clone() for t in (old.total, old.absmax, old.rows)]
    x = integers(30, WIDTH, seed=1) * 5
    new = stats.update(old, x, 0)
    assert new.gram is old.gram
    assert all(torch.equal(a, b) for a, b in zip((old.total, old.absmax, old.rows), copies, strict=True))
    kept = collect((x, 0))
    rows = kept.rows.clone()
    x.zero_()  # what is kept of the rows is a copy
    assert torch.equal(kept.rows, rows)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 40, 100, 1000])
def test_sampled_rows_are_an_even_sample(count: int):
    """Rows of the input, none twice, at least half of what may be kept, spread over at least half of the input."""
    x = torch.arange(count, dtype=torch.float32)[:, None].repeat(1, WIDTH)
    rows = collect((x, 0)).rows[:, 0]
    assert torch.equal(collect((x, 0)).rows, rows[:, None].repeat(1, WIDTH))
    assert min(count, SAMPLED_ROWS // 2) <= len(rows) <= SAMPLED_ROWS
    steps = rows.diff()
    assert bool((steps > 0).all())
    assert count <= SAMPLED_ROWS or float(steps.max()) <= 2 * count / SAMPLED_ROWS + 1
    assert float(rows[-1]) >= (count - 1) / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype):
    x = integers(30, WIDTH)
    assert_same(collect((x.to(dtype), 0)), collect((x, 0)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float):
    x = integers(2, 9, WIDTH)
    x[1, 4, 3] = bad
    x[0, 2, 7] = bad
    with pytest.raises(ValueError, match="2 of 12 input channels are NaN or infinite"):
        collect((x, 0))


def test_rms():
    """sqrt(mean x^2): the squares are exact, the root is rounded in float64 only."""
    x, y = integers(30, WIDTH), integers(10, WIDTH, seed=1)
    expected = float(torch.cat([x, y]).double().square().mean().sqrt())
    assert collect((x, 0), (y, 1)).rms == pytest.approx(expected, rel=1e-14)
    assert collect((torch.full((5, WIDTH), -3.0), 0)).rms == 3.0


def test_rms_of_nothing_is_zero():
    assert stats.init(WIDTH, BUCKETS).rms == 0


def test_mean_and_centred_gram_are_those_of_all_rows():
    """Against float64; the rounding of float32 sums is relative to the whole Gram matrix, of which a large mean is most."""
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(1)) + torch.arange(24) / 4
    s = stats.init(24, 2)
    for i, part in enumerate(x.split(70)):
        s = stats.update(s, part, i % 2)
    wide = x.double()
    centred = wide - wide.mean(dim=0)
    torch.testing.assert_close(s.mean.double(), wide.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert float((s.centred_gram.double() - centred.T @ centred).abs().max()) <= 300 * 2.0**-24 * float(s.gram.diagonal().max())
    assert stats.init(24, 2).centred_gram.count_nonzero() == 0


def test_sampled_rows_know_their_bucket():
    s = stats.init(3, 4)
    for bucket in (2, 0, 3):
        s = stats.update(s, torch.full((5, 3), float(bucket)), bucket)
    assert s.row_buckets.tolist() == s.rows[:, 0].long().tolist() == [2] * 5 + [0] * 5 + [3] * 5


def test_sampled_rows_are_bounded_and_stay_an_even_sample_of_all_calls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stats, "MOST_ROWS", 500)
    s, most = stats.init(1, 4), 0
    for call in range(200):
        s = stats.update(s, torch.full((100, 1), float(call)), call % 4)
        most = max(most, len(s.rows))
    assert len(s.rows) >= 250 and most <= 500
    assert s.row_buckets.tolist() == (s.rows[:, 0] % 4).long().tolist()
    # As many of early calls as of late ones, and every second one of each bucket for fitting and measuring alike.
    counts = torch.bincount(s.rows[:, 0].long(), minlength=200)
    assert int(counts.min()) >= 1 and int(counts.max()) <= int(counts.min()) + 2
    assert s.rows[::2, 0].unique().tolist() == s.rows[1::2, 0].unique().tolist() == list(range(200))


@pytest.mark.parametrize("tokens", [49, 64, 256])
def test_sampled_rows_meet_every_part_of_an_image(tokens: int):
    """64 images of 49 tokens once gave the corner token of each, as the stride was 49."""
    positions = torch.arange(tokens, dtype=torch.float32).repeat(64)[:, None]
    seen = stats.init(1, 1)
    for _ in range(4):
        seen = stats.update(seen, positions, 0)
    assert len(seen.rows.unique()) >= tokens // 2
    assert abs(float(seen.rows.mean()) / (tokens - 1) - 0.5) < 0.1
