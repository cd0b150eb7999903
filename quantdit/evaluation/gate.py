"""The drift gate: is a quantized model worse than the one that was found good? Pass, fail, or not enough samples to say.

A baseline holds the measurements of a quantized model that somebody found good, and by how much worse another one may be. Errors
are gated in decibels, larger being worse: 1 dB more is 26 % more squared error, whatever the measure. The means of two models are
compared by an interval, never by a number alone:

    pass            the whole interval of the difference lies within the margin
    fail            the whole interval lies beyond it
    inconclusive    it holds the margin: so many more samples would decide

The whole fails if any measure does. It passes when the measures that decide pass, the errors of the transformer and of its
layers on the reference's own inputs: those are sharp with a dozen samples. PSNR and the other measures of finished pictures need
many more where seeds differ from the baseline's, so they guard: they can fail a model, and what they leave open is said. Without
a probe (a model too large to run beside its original) the paired measures decide.

Nothing is asked that full precision could not do: a limit below the noise floor, what full precision differs from itself by with
another batch size or in bfloat16, is raised to it. Distances of sets may reach what other seeds of full precision give.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantdit import files
from quantdit.evaluation.intervals import Interval, bootstrap_many, expansion

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
EXIT_CODES = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}
FORMAT = 1
REPORT = "report.json"
CEILING_DB = 100.0  # an error of 1e-5 of its reference is no error
MOST_TIMES = 100  # more samples than this many times those given are not worth saying
LAYERS = "layers"
FROM_FULL = "from full precision"


@dataclass(frozen=True)
class Metric:
    """What is gated, and how.

    Attributes:
        label: as people read it.
        margin: decibels by which the mean may be worse than the baseline's; of `equal`, how far from full precision it may be.
        harm: of the value of one sample, in decibels, or as it is.
        equal: neither more nor less is better: the difference from full precision itself is held against the margin.
        decides: it must pass; 2: always, 1: where nothing better is there, 0: never.
    """

    label: str
    margin: float
    harm: Callable[[float], float]
    equal: bool = False
    decides: int = 0


def decibels(relative: float) -> float:
    """Return a squared error relative to its power in dB, no less than -CEILING_DB."""
    return max(10 * math.log10(relative), -CEILING_DB) if relative > 0 else -CEILING_DB


# By the names of a report's samples. Margins of differences are in the measure's own unit.
METRICS = {
    "psnr": Metric("PSNR", 2.0, lambda v: -min(v, CEILING_DB), decides=1),
    "ssim": Metric("SSIM", 3.0, lambda v: decibels(1 - v), decides=1),
    "perceptual": Metric("perceptual distance (proxy)", 3.0, lambda v: decibels(v * v)),
    "latent_cosine": Metric("latent cosine", 3.0, lambda v: decibels(1 - v)),
    "output_error": Metric("model output error", 1.5, lambda v: v, decides=2),
    "temporal_flickering": Metric("temporal flickering", 0.01, lambda v: v, equal=True),
    "motion_smoothness_proxy": Metric("motion smoothness (proxy)", 0.01, lambda v: v, equal=True),
    "dynamic_degree_proxy": Metric("dynamic degree (proxy)", 0.15, lambda v: v, equal=True),
    "consistency_proxy": Metric("subject and background consistency (proxy)", 0.02, lambda v: v, equal=True),
    "text_alignment_proxy": Metric("text alignment (proxy)", 0.05, lambda v: v, equal=True),
    "clip_score": Metric("CLIP score", 1.0, lambda v: v, equal=True),
}
LAYER_GROWTH = "largest growth of a layer's error"
LAYER_MARGIN = 6.0
NOTE = (
    "Errors in dB, larger is worse; distances of sets in their own unit. Differences are from the baseline where the measure does"
    " not say otherwise, and limits are of them."
)
SHARE_MARGIN = 0.1  # of precision and recall; other distances may reach those of other seeds


@dataclass(frozen=True)
class Finding:
    """What the gate found of one measure.

    Attributes:
        name: of the measure.
        verdict: PASS, FAIL or INCONCLUSIVE.
        candidate: its mean, in the unit gated.
        baseline: the baseline's.
        difference: candidate less baseline, positive for worse, with its interval; of `equal`, candidate less full precision.
        limit: of the difference.
        floor: the worst of the noise floors, None where none was measured.
        more: samples that would decide, besides those there are; None if decided or hopeless.
        decides: as of Metric.
        note: what else is to be said.
        equal: as of Metric; candidate and baseline are differences from full precision, too.
    """

    name: str
    verdict: str
    candidate: float
    baseline: float
    difference: Interval
    limit: float
    floor: float | None
    more: int | None = None
    decides: int = 0
    note: str = ""
    equal: bool = False

    @property
    def label(self) -> str:
        """Return the name, with what its figures are differences from where that is not the baseline."""
        return f"{self.name}, {FROM_FULL}" if self.equal else self.name


@dataclass(frozen=True)
class Verdict:
    """The gate's answer.

    Attributes:
        verdict: PASS, FAIL or INCONCLUSIVE.
        findings: of each measure.
        open: those of them that decide and are inconclusive.
        notes: what else differs between report and baseline.
    """

    verdict: str
    findings: tuple[Finding, ...]
    open: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """Return 0 for pass, 1 for fail, 3 for inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def more(self) -> int | None:
        """Return how many more samples would decide all that is open; None if nothing is, or no number would."""
        needs = [f.more for f in self.open]
        return max(needs) if needs and None not in needs else None


def gate(report: dict, baseline: dict) -> Verdict:
    """Hold a report (`report.json` of `quantdit evaluate`) against a baseline.

    Raises:
        ValueError: the two cannot be compared; says in what they differ.
    """
    stored = _checked(report, baseline)
    margins = baseline["margins"]
    findings = []
    for name, metric in METRICS.items():
        mine, theirs = _values(report, name, metric), _values(stored, name, metric)
        if mine and theirs and name in margins:
            _same_prompts(mine, theirs)
            findings.append(_of_samples(metric, mine, theirs, float(margins[name]), _floor(stored, name, metric)))
    findings += _of_sets(report, stored, margins)
    if report["probe"]["layers"] and LAYERS in margins:
        findings.append(_of_layers(report["probe"], stored["probe"], float(margins[LAYERS])))
    if not findings:
        raise ValueError("report and baseline have no measure in common; make the baseline anew with --update-baseline")
    best = max(f.decides for f in findings)
    undecided = tuple(f for f in findings if f.verdict == INCONCLUSIVE and f.decides == best)
    failed = any(f.verdict == FAIL for f in findings)
    overall = FAIL if failed else INCONCLUSIVE if undecided else PASS
    return Verdict(overall, tuple(findings), undecided, _notes(report, stored))


def make_baseline(report: dict, margins: dict | None = None) -> dict:
    """Return a baseline of a report whose candidate was found good.

    Args:
        report: with its noise floor.
        margins: of an earlier baseline, which somebody may have edited; the defaults if None.

    Raises:
        ValueError: the report has no noise floor.
    """
    _check_report(report)
    if "other batch" not in report["floor"] or "bfloat16" not in report["floor"]:
        raise ValueError("this report has no noise floor, which a baseline needs; run quantdit evaluate with --noise-floor")
    names = {n for n in METRICS if any(n in row for row in (*report["samples"], *report["probe"]["samples"]))}
    known = {name: METRICS[name].margin for name in METRICS if name in names}
    known |= {name: SHARE_MARGIN if name.startswith("1 -") else 0.0 for name in report["sets"]}
    known |= {LAYERS: LAYER_MARGIN} if report["probe"]["layers"] else {}
    kept = {key: report[key] for key in ("identity", "versions", "reference", "candidate", "sampling")}
    kept |= {key: report[key] for key in ("samples", "sets", "probe", "floor")}
    edited = {k: v for k, v in (margins or {}).items() if k in known}
    return {"format": FORMAT, "margins": known | edited, "report": copy.deepcopy(kept)}


def report_in(path: Path) -> Path:
    """Return a report's file: the path itself, or what `quantdit evaluate` wrote into that folder.

    Raises:
        ValueError: a folder without a report.
    """
    if not path.is_dir():
        return path
    if not (path / REPORT).exists():
        raise ValueError(f"{path}: a folder without {REPORT}; give the --output of quantdit evaluate, or the file")
    return path / REPORT


def read(path: Path, what: str) -> dict:
    """Return a report or a baseline.

    Raises:
        ValueError: it is not there or not whole.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder; a {what} is a JSON file in it")
    if not path.exists():
        advice = "; --update-baseline makes it" if what == "baseline" else "; quantdit evaluate writes it"
        raise ValueError(f"{path}: no such {what}{advice}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty; make it again")
    content = files.read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a {what} of format {content.get('format')!r}, expected {FORMAT}, which this version of quantdit writes;"
            " make it again"
        )
    if what == "baseline":
        margins = content.get("margins")
        numbers = isinstance(margins, dict) and all(
            isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in margins.values()
        )
        if not numbers or not isinstance(content.get("report"), dict):
            raise ValueError(f"{path}: no baseline: it must hold `margins`, numbers of at least 0 by measure, and a `report`")
        _check_report(content["report"], str(path))
        known = (*METRICS, *content["report"]["sets"], LAYERS)
        if unknown := [name for name in margins if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{path}: a margin for {unknown[0]!r}, which nothing measures; {hint}")
    else:
        _check_report(content, str(path))
    return content


def _check_report(report: dict, where: str = "report") -> None:
    tables = ("identity", "versions", "reference", "candidate", "sampling", "sets", "probe", "floor")
    good = all(isinstance(report.get(key), dict) for key in tables) and isinstance(report.get("samples"), list)
    good = good and all(isinstance(report["probe"].get(k), t) for k, t in (("layers", dict), ("samples", list)))
    if not good or not report["samples"] or not all(isinstance(row, dict) and "prompt" in row for row in report["samples"]):
        raise ValueError(f"{where}: no whole report of quantdit evaluate; make it again")
    probed = len(report["probe"]["samples"])
    if any(len(v) != probed for v in report["probe"]["layers"].values()):
        raise ValueError(f"{where}: its layers have other numbers of samples than its probe; make it again")


def _checked(report: dict, baseline: dict) -> dict:
    """Return the baseline's report, once it is certain that it can be compared.

    Raises:
        ValueError: another backbone, version, reference, sampler or size; says which.
    """
    stored = baseline["report"]
    differing = [
        f"{key}: the baseline's is {stored['identity'].get(key)!r}, the report's {report['identity'].get(key)!r}"
        for key in dict.fromkeys((*stored["identity"], *report["identity"]))
        if stored["identity"].get(key) != report["identity"].get(key)
    ]
    if differing:
        raise ValueError(f"this baseline was made otherwise ({'; '.join(differing)}); evaluate as it was, or --update-baseline")
    return stored


def _notes(report: dict, stored: dict) -> tuple[str, ...]:
    return tuple(
        f"{name} {report['versions'].get(name)} here, {version} in the baseline"
        for name, version in stored["versions"].items()
        if report["versions"].get(name) != version
    )


Sample = tuple[str, int]


def _values(report: dict, name: str, metric: Metric) -> dict[Sample, float]:
    """Return the harm of each sample, by prompt and seed."""
    rows = (*report["samples"], *report["probe"]["samples"])
    return {(row["prompt"], row["seed"]): metric.harm(row[name]) for row in rows if name in row}


def _same_prompts(mine: dict, theirs: dict) -> None:
    if {prompt for prompt, _ in mine} != {prompt for prompt, _ in theirs}:
        raise ValueError(
            "report and baseline sample other prompts; evaluate with the prompts and the number of samples that the baseline has"
        )


def _floor(stored: dict, name: str, metric: Metric) -> float | None:
    """Return the worst mean harm of full precision against itself with the same noise."""
    found = [stored["floor"].get(kind, {}).get(name) for kind in ("other batch", "bfloat16")]
    return max((abs(v) if metric.equal else v for v in found if v is not None), default=None)


def _of_samples(
    metric: Metric, mine: dict[Sample, float], theirs: dict[Sample, float], margin: float, floor: float | None
) -> Finding:
    candidate, base = (float(np.mean(list(v.values()))) for v in (mine, theirs))
    if metric.equal:
        difference = _interval(mine, {})
        limit = max(margin, floor or 0.0)
        verdict = PASS if max(abs(difference.low), abs(difference.high)) <= limit else INCONCLUSIVE
        if difference.low > limit or difference.high < -limit:
            verdict = FAIL
        distance = limit - abs(difference.estimate)
    else:
        difference = _interval(mine, theirs)
        limit = margin if floor is None else max(margin, floor - base)
        verdict = PASS if difference.high <= limit else FAIL if difference.low > limit else INCONCLUSIVE
        distance = limit - difference.estimate
    more = _more(difference, distance, len(mine)) if verdict == INCONCLUSIVE else None
    return Finding(metric.label, verdict, candidate, base, difference, limit, floor, more, metric.decides, equal=metric.equal)


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
    """Return the findings on distances between the sets of images."""
    findings = []
    prompts = len({row["prompt"] for row in report["samples"]})
    for name in (n for n in report["sets"] if n in stored["sets"] and n in margins):
        mine, theirs = report["sets"][name], stored["sets"][name]
        error = math.hypot(mine["standard_error"], theirs["standard_error"])
        reach = 1.96 * error * expansion(max(2, prompts))
        change = mine["drift"] - theirs["drift"]
        difference = Interval(change, change - reach, change + reach, error)
        floor = theirs["noise_floor"] + 1.96 * theirs["noise_floor_error"]
        limit = max(float(margins[name]), floor - theirs["drift"])
        verdict = PASS if difference.high <= limit else FAIL if difference.low > limit else INCONCLUSIVE
        more = _more(difference, limit - change, len(report["samples"])) if verdict == INCONCLUSIVE else None
        findings.append(Finding(name, verdict, mine["drift"], theirs["drift"], difference, limit, floor, more))
    return findings


def _of_layers(mine: dict, theirs: dict, margin: float) -> Finding:
    """Return the finding on the layer whose own error grew most: no layer's may grow beyond the margin.

    Damage to one layer of many is lost among the errors of all, but not in its own. The intervals hold for all layers at once.
    """
    names = [name for name in mine["layers"] if name in theirs["layers"]]
    new = [name for name in mine["layers"] if name not in theirs["layers"]]
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
    means = [float(np.mean(probe["layers"][names[place]])) for probe in (mine, theirs)]
    return Finding(LAYER_GROWTH, verdict, *means, intervals[place], margin, None, more, 2, note)


def _more(difference: Interval, distance: float, count: int) -> int | None:
    """Return how many samples besides `count` would bring the interval's half width down to `distance`."""
    half = (difference.high - difference.low) / 2
    if abs(distance) * MOST_TIMES**0.5 <= half:
        return None
    return max(1, math.ceil(count * ((half / abs(distance)) ** 2 - 1)))


def meanings(row: dict) -> dict[str, str]:
    """Return what the figures of a report's row are, by their names in it."""
    return {name: f"{metric.label}{f', {FROM_FULL}' if metric.equal else ''}" for name, metric in METRICS.items() if name in row}


def headline(verdict: Verdict) -> str:
    """Return the verdict in one sentence."""
    if verdict.verdict == PASS:
        return "no measure is worse than its margin allows" + _left_open(verdict)
    if verdict.verdict == FAIL:
        return f"beyond the margin: {', '.join(f.name for f in verdict.findings if f.verdict == FAIL)}"
    advice = f"about {verdict.more} more samples would decide" if verdict.more else "the difference lies at the limit itself"
    return f"undecided: {', '.join(f.name for f in verdict.open)}; {advice}"


def _left_open(verdict: Verdict) -> str:
    """Return what a pass leaves open, for want of samples."""
    names = [f.name for f in verdict.findings if f.verdict == INCONCLUSIVE]
    return f"; too few samples to say so of {', '.join(names)}" if names else ""


def summary(verdict: Verdict) -> str:
    """Return a Markdown table fit for a pull-request comment, and readable as plain text."""
    rows = [("measure", "verdict", "candidate", "baseline", "difference [95 %]", "limit", "noise floor")]
    for f in sorted(verdict.findings, key=lambda f: (FAIL, INCONCLUSIVE, PASS).index(f.verdict)):
        d = f.difference
        floor = "" if f.floor is None else number(f.floor)
        change = f"{number(d.estimate)} [{number(d.low)}, {number(d.high)}]"
        limit = f"{'±' if f.equal else ''}{number(f.limit)}"
        rows.append((f.label, f.verdict, number(f.candidate), number(f.baseline), change, limit, floor))
    lines = [f"**{verdict.verdict.upper()}**: {headline(verdict)}", "", *markdown(rows), ""]
    lines += [f"- {f.name}: {f.note}" for f in verdict.findings if f.note]
    lines += [f"- note: {note}" for note in verdict.notes]
    lines += [""] if lines[-1] else []  # else the last item of the list would take the next line in
    lines.append(NOTE)
    return "\n".join(lines)


def number(value: float) -> str:
    """Return a number as people read it: four digits of small ones, two places of others."""
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, columns padded; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines
