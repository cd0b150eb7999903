"""The drift gate: is a quantized model worse than the one that was found good? Pass, fail, or not enough samples to say.

A baseline holds the measurements of a quantized model that somebody found good, and by how much worse another one may be. Errors
are gated in decibels, larger being worse: 1 dB more is 26 % more squared error, whatever the measure. The means of two models are
compared by an interval, never by a number alone:

    pass            the whole interval of the difference lies within the margin
    fail            the whole interval lies beyond it
    inconclusive    the margin lies inside the interval; the gate estimates how many more samples would decide

The gate fails if any measure fails. It passes if the deciding measures pass: the errors of the transformer and of its layers on
the reference's own inputs, which a dozen samples measure sharply. PSNR and the other measures of finished pictures need many more
samples where seeds differ from the baseline's. They can fail a model, but cannot keep it from passing; the verdict names those
that are open. Without a probe (a model too large to run beside its original) the paired measures decide.

No limit is below the noise floor, which is how far full precision is from itself with another batch size or in another dtype. A
distance between sets of images may be a factor larger than the upper end of the baseline's interval. Where the samples are too
few to tell, the finding is "not decisive".

Values are in each measure's own unit (PSNR is PSNR). Only "worse by" is in decibels of error.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quantdit.evaluation.gate.gate_files import Sample, check, read, report_in
from quantdit.evaluation.metrics.intervals import Interval, bootstrap_many, expansion
from quantdit.evaluation.metrics.table import (
    DISTANCE_MARGIN,
    FORMAT,
    LAYER_MARGIN,
    LAYERS,
    METRICS,
    READING,
    SHARE_MARGIN,
    Metric,
    is_share,
)
from quantdit.system import files

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
EXIT_CODES = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}
NOT_DECISIVE = "not decisive"  # how an inconclusive finding reads
MOST_TIMES = 100  # more samples than this many times those given are not worth saying
SAME_NOISE = ("other batch", "other dtype")  # of the noise floor: full precision on the same seeds
LAYER_GROWTH = "largest growth of a layer's error"
NOTE = (
    "Candidate, baseline, noise floor and other seeds are means in the measure's own unit. The last two compare full precision"
    " with itself: the noise floor on the same seeds, in another dtype or batch size; other seeds on others. Worse by x dB means"
    " that the squared error is 10^(x/10) times the baseline's (3 dB: twice). Without dB, it is the change in the measure's own"
    " unit. A limit with two ends allows no change beyond either."
)


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
        probed: these are the probe's.
        more: samples that would decide, besides those there are; None if decided or hopeless.
        decides: as of Metric.
        note: what else is to be said.
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


COLUMNS = ("measure", "verdict", "candidate", "baseline", "worse by (dB: of error) [95 %]", "limit", "noise floor", "other seeds")


@dataclass(frozen=True)
class Verdict:
    """The gate's answer.

    Attributes:
        verdict: PASS, FAIL or INCONCLUSIVE.
        findings: of each measure.
        open: those of them that decide and are inconclusive.
        notes: what else differs between report and baseline.
        samples: of the report.
    """

    verdict: str
    findings: tuple[Finding, ...]
    open: tuple[Finding, ...]
    notes: tuple[str, ...]
    samples: int = 0

    @property
    def exit_code(self) -> int:
        """Return 0 for pass, 1 for fail, 3 for inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def more(self) -> int | None:
        """Return how many more samples would decide all that is open; None if nothing is, or no number would."""
        needs = [f.more for f in self.open]
        return max(needs) if needs and None not in needs else None


def gate(report: dict | str | Path, baseline: dict | str | Path) -> Verdict:
    """Hold a report of `evaluate` against a baseline: their contents, or files (of the report also its folder).

    Raises:
        ValueError: one of them is damaged, or the two cannot be compared; says in what they differ.
    """
    report = _content(report, "report")
    baseline = _content(baseline, "baseline")
    stored = _checked(report, baseline)
    margins = baseline["margins"]
    findings = []
    for name, metric in METRICS.items():
        mine, theirs = _values(report, name, metric), _values(stored, name, metric)
        if mine and theirs and name in margins:
            _same_prompts(mine, theirs)
            means = _mean(report, name, metric), _mean(stored, name, metric)
            probed = any(name in row for row in report["probe"]["samples"])
            found = _of_samples(metric, mine, theirs, means, float(margins[name]), _floor(stored, name, metric))
            findings.append(replace(found, other_seeds=_other_seeds(stored, name), count=len(mine), probed=probed))
    findings += _of_sets(report, stored, margins)
    if report["probe"]["layers"] and LAYERS in margins:
        findings.append(_of_layers(report["probe"], stored["probe"], float(margins[LAYERS])))
    if not any(f.decides for f in findings):
        names = ", ".join([*(metric.label for metric in METRICS.values() if metric.decides), LAYER_GROWTH])
        raise ValueError(
            f"report and baseline have none of the measures in common that decide ({names}); make the baseline anew with"
            " --update-baseline"
        )
    best = max(f.decides for f in findings)
    undecided = tuple(f for f in findings if f.verdict == INCONCLUSIVE and f.decides == best)
    failed = any(f.verdict == FAIL for f in findings)
    overall = FAIL if failed else INCONCLUSIVE if undecided else PASS
    return Verdict(overall, tuple(findings), undecided, _notes(report, stored, margins), len(report["samples"]))


def _content(given: dict | str | Path, what: str) -> dict:
    if isinstance(given, dict):
        check(given, what)
        return given
    path = Path(files.check_path(what, given, f"the path of a {what}, or what it holds"))
    return read(report_in(path) if what == "report" else path, what)


def make_baseline(report: dict, margins: dict | None = None) -> dict:
    """Return a baseline of a report whose candidate was found good.

    Args:
        report: with its noise floor.
        margins: of an earlier baseline, which somebody may have edited; the defaults if None.

    Raises:
        ValueError: the report has no noise floor or none that can be noise, or is damaged.
    """
    check(report, "report")
    if not report["floor"].keys() >= {*SAME_NOISE, "other seeds"}:
        raise ValueError("this report has no noise floor, which a baseline needs; run quantdit evaluate with --noise-floor")
    for kind in SAME_NOISE:
        same, seeds = (report["floor"][k].get("psnr") for k in (kind, "other seeds"))
        if same and seeds and same["harm"] >= seeds["harm"]:
            raise ValueError(
                f"full precision with another {kind.removeprefix('other ')} has a PSNR of {number(same['mean'], 'dB')} against"
                f" itself, less than with other seeds ({number(seeds['mean'], 'dB')}): that is no noise; on a CPU with AMX, try"
                " ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
            )
    names = {n for n in METRICS if any(n in row for row in (*report["samples"], *report["probe"]["samples"]))}
    known = {name: METRICS[name].margin for name in METRICS if name in names}
    known |= {name: SHARE_MARGIN if is_share(name) else DISTANCE_MARGIN for name in report["sets"]}
    known |= {LAYERS: LAYER_MARGIN} if report["probe"]["layers"] else {}
    kept = {key: report[key] for key in ("identity", "versions", "reference", "candidate", "sampling")}
    kept |= {key: report[key] for key in ("samples", "sets", "probe", "floor")}
    edited = {k: v for k, v in (margins or {}).items() if k in known}
    return {"format": FORMAT, "margins": known | edited, "report": copy.deepcopy(kept)}


def _checked(report: dict, baseline: dict) -> dict:
    """Return the baseline's report, once it is certain that it can be compared.

    Raises:
        ValueError: another backbone, version, reference, sampler or size; says which.
    """
    stored = baseline["report"]
    differing = [
        f"{' '.join(key.split())}: the baseline's is {stored['identity'].get(key)!r},"
        f" the report's {report['identity'].get(key)!r}"
        for key in dict.fromkeys((*stored["identity"], *report["identity"]))
        if stored["identity"].get(key) != report["identity"].get(key)
    ]
    if differing:
        raise ValueError(f"the baseline has other settings ({'; '.join(differing)}); evaluate with those, or --update-baseline")
    return stored


def _notes(report: dict, stored: dict, margins: dict) -> tuple[str, ...]:
    versions = tuple(
        f"{name} {report['versions'].get(name)} here, {version} in the baseline"
        for name, version in stored["versions"].items()
        if report["versions"].get(name) != version
    )
    here = {*report["samples"][0], *report["sets"], *(name for row in report["probe"]["samples"][:1] for name in row)}
    here |= {LAYERS} if report["probe"]["layers"] else set()
    lacking = [METRICS[name].label if name in METRICS else name for name in margins if name not in here]
    return (*versions, *(f"{name}: in the baseline, not measured here" for name in lacking))


def _values(report: dict, name: str, metric: Metric) -> dict[Sample, float]:
    """Return the harm of each sample, by prompt and seed."""
    rows = (*report["samples"], *report["probe"]["samples"])
    return {(row["prompt"], row["seed"]): metric.harm(row[name]) for row in rows if name in row}


def _same_prompts(mine: dict, theirs: dict) -> None:
    if {prompt for prompt, _ in mine} != {prompt for prompt, _ in theirs}:
        raise ValueError(
            "report and baseline sample other prompts; evaluate with the prompts and the number of samples that the baseline has"
        )


def _mean(report: dict, name: str, metric: Metric) -> float:
    """Return the mean in the measure's own unit: where samples hold differences from full precision, the candidate's own."""
    key = f"{name}_candidate" if metric.equal else name
    return float(np.mean([row[key] for row in (*report["samples"], *report["probe"]["samples"]) if key in row]))


def _floor(stored: dict, name: str, metric: Metric) -> tuple[float, float] | None:
    """Return the worst of full precision against itself with the same noise: its harm, and its mean."""
    found = [stored["floor"].get(kind, {}).get(name) for kind in SAME_NOISE]
    pairs = [(abs(v["harm"]) if metric.equal else v["harm"], v["mean"]) for v in found if v is not None]
    return max(pairs, default=None)


def _other_seeds(stored: dict, name: str) -> float | None:
    """Return the mean of full precision against itself on other seeds."""
    return stored["floor"].get("other seeds", {}).get(name, {}).get("mean")


def _of_samples(
    metric: Metric,
    mine: dict[Sample, float],
    theirs: dict[Sample, float],
    means: tuple[float, float],
    margin: float,
    floor: tuple[float, float] | None,
) -> Finding:
    base = float(np.mean(list(theirs.values())))
    difference = _interval(mine, theirs)
    worst = None if floor is None else floor[0]
    if metric.equal:  # no further from full precision than the baseline and the margin, on either side
        margin = max(margin, worst or 0.0)
        lowest, limit = min(0.0, base) - base - margin, max(0.0, base) - base + margin
    else:
        lowest, limit = None, margin if worst is None else max(margin, worst - base)
    verdict = _within(difference, limit, lowest)
    distance = min(limit - difference.estimate, math.inf if lowest is None else difference.estimate - lowest)
    more = _more(difference, distance, len(mine)) if verdict == INCONCLUSIVE else None
    shown = None if floor is None else floor[1]
    return Finding(
        metric.label,
        verdict,
        *means,
        difference,
        limit,
        lowest,
        shown,
        unit=metric.unit,
        decibel=not metric.equal,
        more=more,
        decides=metric.decides,
    )


def _within(difference: Interval, limit: float, lowest: float | None = None) -> str:
    low = -math.inf if lowest is None else lowest
    if low <= difference.low and difference.high <= limit:
        return PASS
    return FAIL if difference.low > limit or difference.high < low else INCONCLUSIVE


def _interval(mine: dict[Sample, float], theirs: dict[Sample, float]) -> Interval:
    """Return the mean difference: of the same samples where there are, else of the same prompts, else of all."""
    values, clusters = _paired({k: np.array([v]) for k, v in mine.items()}, {k: np.array([v]) for k, v in theirs.items()} or None)
    return bootstrap_many(values, clusters)[0]


def _paired(mine: dict[Sample, np.ndarray], theirs: dict[Sample, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return differences `[n, k]` and the cluster of each: values `[k]` by sample, less those they are best compared with.

    The same sample of the baseline if it has all of them; else the baseline's samples of the same prompt, as many pairs as the
    side with fewer seeds has.
    """
    keys = list(mine)
    own = np.stack([mine[key] for key in keys])
    if theirs is None or all(key in theirs for key in keys):
        differences = own if theirs is None else own - np.stack([theirs[key] for key in keys])
        prompts = [prompt for prompt, _ in keys]
    else:
        rows, prompts = [], []
        for prompt in dict.fromkeys(prompt for prompt, _ in keys):
            a = np.stack([v for k, v in mine.items() if k[0] == prompt])
            b = np.stack([v for k, v in theirs.items() if k[0] == prompt])
            count = min(len(a), len(b))
            rows.append(_folded(a, count) - _folded(b, count))
            prompts += [prompt] * count
        differences = np.concatenate(rows)
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    if len(order) == 1:  # the seeds of one prompt are all there is to resample
        return differences, np.arange(len(differences))
    return differences, np.array([order[prompt] for prompt in prompts])


def _folded(values: np.ndarray, count: int) -> np.ndarray:
    """Return `[count, k]` means of equal or nearly equal parts of values `[n, k]`."""
    return np.stack([part.mean(0) for part in np.array_split(values, count)])


def _of_sets(report: dict, stored: dict, margins: dict) -> list[Finding]:
    """Return the findings on distances between the sets of images.

    A squared distance may be the margin's times as large as the upper end of what the baseline's own may be, but no larger than
    that of other seeds of full precision; a share, larger by the margin. Either may be what full precision has in another dtype.
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


def _of_layers(mine: dict, theirs: dict, margin: float) -> Finding:
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
    more = max(needs) if verdict == INCONCLUSIVE and None not in needs else None
    note = f"grew most: {names[place]}" if intervals[place].estimate > 0 else "no layer's error grew"
    note += f"; {len(failed)} layers beyond the margin" if len(failed) > 1 else ""
    note += f"; {len(new)} layers that the baseline has not" if new else ""
    note += f"; {len(gone)} layers of the baseline are not in the report" if gone else ""
    means = [float(np.mean(probe["layers"][names[place]])) for probe in (mine, theirs)]
    found = Finding(LAYER_GROWTH, verdict, *means, intervals[place], margin, unit="dB", decibel=True, more=more, decides=2)
    return replace(found, count=len(mine["samples"]), probed=True, note=note)


def _more(difference: Interval, distance: float, count: int) -> int | None:
    """Return how many samples besides `count` would bring the interval's half width down to `distance`."""
    half = (difference.high - difference.low) / 2
    if abs(distance) * MOST_TIMES**0.5 <= half:
        return None
    return max(1, math.ceil(count * ((half / abs(distance)) ** 2 - 1)))


def headline(verdict: Verdict) -> str:
    """Return the verdict in one sentence."""
    if verdict.verdict == PASS:
        return "no measure is worse than its margin allows" + _left_open(verdict)
    if verdict.verdict == FAIL:
        return f"beyond the margin: {', '.join(f.name for f in verdict.findings if f.verdict == FAIL)}"
    advice = f"about {verdict.more} more samples would decide" if verdict.more else "the difference lies at the limit itself"
    return f"undecided: {', '.join(f.name for f in verdict.open)}; {advice}{_remedy(verdict, verdict.open)}"


def _left_open(verdict: Verdict) -> str:
    """Return what a pass leaves open, for want of samples."""
    undecided = [f for f in verdict.findings if f.verdict == INCONCLUSIVE]
    found = [f.name + (f" (about {f.more} more)" if f.more else "") for f in undecided]
    return f"; too few samples to say so of {', '.join(found)}{_remedy(verdict, undecided)}" if found else ""


def _remedy(verdict: Verdict, undecided: Sequence[Finding]) -> str:
    """Return with which options `quantdit evaluate` makes as many samples as these findings ask for; nothing if none does."""
    samples, probes = (max((f.count + f.more for f in undecided if f.more and f.probed is p), default=0) for p in (False, True))
    if probes > verdict.samples:  # each probe has a sample's prompt
        samples = max(samples, probes)
    options = [f"--{name} {count}" for name, count in (("samples", samples), ("probes", probes)) if count]
    return f"; run quantdit evaluate again with {' '.join(options)}, for the baseline too" if options else ""


def summary(verdict: Verdict) -> str:
    """Return a Markdown table fit for a pull-request comment, and readable as plain text."""
    rows = [COLUMNS, *(f.cells() for f in worst_first(verdict))]
    lines = [f"**{verdict.verdict.upper()}**: {escaped(headline(verdict))}", "", *markdown(rows), ""]
    lines += [f"- {escaped(f'{f.name}: {f.note}')}" for f in verdict.findings if f.note]
    lines += [f"- note: {escaped(note)}" for note in verdict.notes]
    lines += [""] if lines[-1] else []  # else the last item of the list would take the next line in
    lines.append(f"{NOTE} {READING}")
    return "\n".join(lines)


def worst_first(verdict: Verdict) -> list[Finding]:
    """Return the findings: those that failed, then those that are open, then those that passed."""
    return sorted(verdict.findings, key=lambda f: (FAIL, INCONCLUSIVE, PASS).index(f.verdict))


def number(value: float, unit: str = "") -> str:
    """Return a number as people read it: four digits of small ones, two places of others; just below 1, what it lacks of it."""
    value = 0.0 if abs(value) < 1e-9 else value  # rounding; nor "-0"
    lack = 1 - value
    if 0 < lack < 0.001:
        text = f"{value:.{min(9, 1 - math.floor(math.log10(lack)))}f}"
    else:
        text = f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{text} {unit}".rstrip()


def escaped(text: str) -> str:
    """Return text that is not ours as a line of Markdown: no table cell, code, link, emphasis or HTML begins or ends in it."""
    line = " ".join(text.split())
    line = line.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`*]|(?<=\])\()", r"\\\1", line)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, cells escaped and columns padded; the first row is its head."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines
