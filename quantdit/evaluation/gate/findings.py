"""What the gate finds of each measure (judge.py says how it decides): by how much the candidate is worse, and the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantdit.evaluation.formatting import number
from quantdit.evaluation.gate.report_files import Sample
from quantdit.evaluation.metrics.intervals import Interval, bootstrap_many, clusters_of, expansion
from quantdit.evaluation.metrics.table import METRICS, Metric, is_share

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
NOT_DECISIVE = "not decisive"  # how an inconclusive finding reads
MOST_TIMES = 100  # more samples than this many times those given are not worth saying
SAME_NOISE = ("other batch", "other dtype")  # of the noise floor: full precision on the same seeds
LAYER_GROWTH = "largest growth of a layer's error"
COLUMNS = ("measure", "verdict", "candidate", "baseline", "worse by (dB: of error) [95 %]", "limit", "noise floor", "other seeds")


@dataclass(frozen=True)
class Finding:
    """What the gate found of one measure.

    Attributes:
        name: of the measure.
        verdict: PASS, FAIL or INCONCLUSIVE.
        candidate: its mean, in the measure's own unit.
        baseline: the baseline's.
        difference: by how much the candidate is worse, with its interval: in dB of error, or in the measure's own unit.
        limit: of the difference.
        lowest: its other limit, where a measure may neither rise nor fall; else None.
        floor: the worst mean of full precision against itself on the same seeds, None where none was measured.
        other_seeds: its mean against itself on other seeds, None where that was not measured.
        unit: of candidate, baseline, floor and other seeds.
        decibel: the difference is in dB of error.
        count: samples that it is made of.
        probed: these samples are the probe's.
        more: how many more samples would decide; None if decided, or if no reasonable number would.
        decides: rank, as in Metric.
        note: further remarks.
    """

    name: str
    verdict: str
    candidate: float
    baseline: float
    difference: Interval
    limit: float
    lowest: float | None = None
    floor: float | None = None
    other_seeds: float | None = None
    unit: str = ""
    decibel: bool = False
    count: int = 0
    probed: bool = False
    more: int | None = None
    decides: int = 0
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return what people read, one text for each of COLUMNS."""
        d, change = self.difference, "dB" if self.decibel else ""
        low, high = number(d.low), number(d.high)
        limit = number(self.limit, change) if self.lowest is None else f"{number(self.lowest)} to {number(self.limit)}"
        return (
            self.name,
            NOT_DECISIVE if self.verdict == INCONCLUSIVE else self.verdict,
            number(self.candidate, self.unit),
            number(self.baseline, self.unit),
            f"{number(d.estimate, change)} [{low}, {high}]",
            limit,
            *("" if value is None else number(value, self.unit) for value in (self.floor, self.other_seeds)),
        )


def of_samples(report: dict, stored: dict, name: str, margin: float) -> Finding | None:
    """Return the finding on a measure that samples have one by one; None if the report or the baseline has none of it.

    Raises:
        ValueError: the two have samples of other prompts.
    """
    metric = METRICS[name]
    mine, theirs = (_harms(content, name, metric) for content in (report, stored))
    if not mine or not theirs:
        return None
    _same_prompts(mine, theirs)
    (difference,) = bootstrap_many(*_paired(mine, theirs))
    base = float(np.mean(list(theirs.values())))
    worst, shown = _floor(stored, name, metric)
    if metric.equal:  # no further from full precision than the baseline and the margin, on either side
        margin = max(margin, worst or 0.0)
        lowest, limit = min(0.0, base) - base - margin, max(0.0, base) - base + margin
    else:
        lowest, limit = None, margin if worst is None else max(margin, worst - base)
    verdict = _within(difference, limit, lowest)
    distance = min(limit - difference.estimate, math.inf if lowest is None else difference.estimate - lowest)
    return Finding(
        metric.label,
        verdict,
        candidate=_mean(report, name, metric),
        baseline=_mean(stored, name, metric),
        difference=difference,
        limit=limit,
        lowest=lowest,
        floor=shown,
        other_seeds=stored["floor"].get("other seeds", {}).get(name, {}).get("mean"),
        unit=metric.unit,
        decibel=not metric.equal,
        count=len(mine),
        probed=any(name in row for row in report["probe"]["samples"]),
        more=_more(difference, distance, len(mine)) if verdict == INCONCLUSIVE else None,
        decides=metric.decides,
    )


def _rows(report: dict) -> list[dict]:
    return [*report["samples"], *report["probe"]["samples"]]


def _harms(report: dict, name: str, metric: Metric) -> dict[Sample, np.ndarray]:
    """Return the harm `[1]` of each sample, by prompt and seed."""
    return {(row["prompt"], row["seed"]): np.array([metric.harm(row[name])]) for row in _rows(report) if name in row}


def _same_prompts(mine: Mapping[Sample, object], theirs: Mapping[Sample, object]) -> None:
    if {prompt for prompt, _ in mine} != {prompt for prompt, _ in theirs}:
        raise ValueError(
            "report and baseline sample other prompts; evaluate with the prompts and the number of samples that the baseline has"
        )


def _mean(report: dict, name: str, metric: Metric) -> float:
    """Return the mean in the measure's own unit: where samples hold differences from full precision, the candidate's own."""
    key = f"{name}_candidate" if metric.equal else name
    return float(np.mean([row[key] for row in _rows(report) if key in row]))


def _floor(stored: dict, name: str, metric: Metric) -> tuple[float | None, float | None]:
    """Return the worst of full precision against itself with the same noise: its harm and its mean; None where not measured."""
    found = [stored["floor"].get(kind, {}).get(name) for kind in SAME_NOISE]
    pairs = [(abs(v["harm"]) if metric.equal else v["harm"], v["mean"]) for v in found if v is not None]
    return max(pairs, default=(None, None))


def _within(difference: Interval, limit: float, lowest: float | None = None) -> str:
    low = -math.inf if lowest is None else lowest
    if low <= difference.low and difference.high <= limit:
        return PASS
    return FAIL if difference.low > limit or difference.high < low else INCONCLUSIVE


def _paired(mine: Mapping[Sample, np.ndarray], theirs: Mapping[Sample, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the differences `[n, k]` of values `[k]` by sample, and the cluster of each.

    Samples are compared with the same samples of the baseline if it has all of them. Otherwise the samples of each prompt are
    averaged into as many parts as the side with fewer seeds has, and these are compared.
    """
    if all(key in theirs for key in mine):
        differences = np.stack([mine[key] - theirs[key] for key in mine])
        prompts = [prompt for prompt, _ in mine]
    else:
        rows, prompts = [], []
        for prompt in dict.fromkeys(prompt for prompt, _ in mine):
            a, b = (np.stack([v for key, v in side.items() if key[0] == prompt]) for side in (mine, theirs))
            count = min(len(a), len(b))
            rows.append(_folded(a, count) - _folded(b, count))
            prompts += [prompt] * count
        differences = np.concatenate(rows)
    return differences, clusters_of(prompts)


def _folded(values: np.ndarray, count: int) -> np.ndarray:
    """Return `[count, k]` means of equal or nearly equal parts of values `[n, k]`."""
    return np.stack([part.mean(0) for part in np.array_split(values, count)])


def of_sets(report: dict, stored: dict, margins: dict) -> list[Finding]:
    """Return the findings on distances between the sets of images.

    The limit of a squared distance is the upper end of the baseline's interval times the margin, but no more than the distance
    between full precision and its other seeds. The limit of a share is the baseline's plus the margin. No limit is below the
    distance of full precision to itself in another dtype or batch size.
    """
    findings = []
    prompts = len({row["prompt"] for row in report["samples"]})
    wide = 1.96 * expansion(prompts if prompts > 2 else max(2, len(report["samples"])))
    for name in (n for n in report["sets"] if n in stored["sets"] and n in margins):
        mine, theirs, margin = report["sets"][name], stored["sets"][name], float(margins[name])
        floors = [entry["mean"] for kind in SAME_NOISE if (entry := stored["floor"].get(kind, {}).get(name))]
        same = max(floors, default=0.0)
        base, own = theirs["drift"], max(0.0, theirs["drift"]) + wide * theirs["standard_error"]
        seeds = theirs["noise_floor"] + 1.96 * theirs["noise_floor_error"]
        largest = max(same, base + margin if is_share(name) else max(own, min(margin * own, seeds)))
        change, reach = mine["drift"] - base, wide * mine["standard_error"]
        difference = Interval(change, change - reach, change + reach, mine["standard_error"])
        verdict = _within(difference, largest - base)
        more = _more(difference, largest - mine["drift"], len(report["samples"])) if verdict == INCONCLUSIVE else None
        findings.append(
            Finding(
                name,
                verdict,
                mine["drift"],
                base,
                difference,
                largest - base,
                floor=max(floors, default=None),
                other_seeds=theirs["noise_floor"],
                count=len(report["samples"]),
                more=more,
            )
        )
    return findings


def of_layers(mine: dict, theirs: dict, margin: float) -> Finding:
    """Return the finding on the layer whose own error grew most: no layer's may grow beyond the margin.

    Damage to one layer of many is lost among the errors of all, but not in its own. The intervals hold for all layers at once.
    """
    names = [name for name in mine["layers"] if name in theirs["layers"]]
    new = [name for name in mine["layers"] if name not in theirs["layers"]]
    gone = [name for name in theirs["layers"] if name not in mine["layers"]]
    if not names:
        raise ValueError("the report's layers have other names than the baseline's; make it anew with --update-baseline")

    def table(probe: dict) -> dict[Sample, np.ndarray]:
        rows = np.array([probe["layers"][name] for name in names]).T
        return {(row["prompt"], row["seed"]): values for row, values in zip(probe["samples"], rows, strict=True)}

    ours, stored = table(mine), table(theirs)
    _same_prompts(ours, stored)
    values, clusters = _paired(ours, stored)
    intervals = bootstrap_many(values, clusters, simultaneous=True)
    worst = max(range(len(names)), key=lambda i: intervals[i].estimate)
    failed = [i for i in range(len(names)) if intervals[i].low > margin]
    open_ones = [i for i in range(len(names)) if intervals[i].high > margin and i not in failed]
    place = max(failed or open_ones or [worst], key=lambda i: intervals[i].low)
    verdict = FAIL if failed else INCONCLUSIVE if open_ones else PASS
    needs = [_more(intervals[i], margin - intervals[i].estimate, len(mine["samples"])) for i in open_ones]
    note = f"grew most: {names[place]}" if intervals[place].estimate > 0 else "no layer's error grew"
    note += f"; {len(failed)} layers beyond the margin" if len(failed) > 1 else ""
    note += f"; {len(new)} layers that the baseline has not" if new else ""
    note += f"; {len(gone)} layers of the baseline are not in the report" if gone else ""
    return Finding(
        LAYER_GROWTH,
        verdict,
        candidate=float(np.mean(mine["layers"][names[place]])),
        baseline=float(np.mean(theirs["layers"][names[place]])),
        difference=intervals[place],
        limit=margin,
        unit="dB",
        decibel=True,
        count=len(mine["samples"]),
        probed=True,
        more=most(needs) if verdict == INCONCLUSIVE else None,
        decides=2,
        note=note,
    )


def most(needs: Sequence[int | None]) -> int | None:
    """Return the largest number of samples; None if there is none, or one that no number would decide."""
    known = [need for need in needs if need is not None]
    return max(known) if known and len(known) == len(needs) else None


def _more(difference: Interval, distance: float, count: int) -> int | None:
    """Return how many samples besides `count` would bring the interval's half width down to `distance`."""
    half = (difference.high - difference.low) / 2
    if abs(distance) * MOST_TIMES**0.5 <= half:
        return None
    return max(1, math.ceil(count * ((half / abs(distance)) ** 2 - 1)))
