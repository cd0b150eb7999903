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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantdit.evaluation.formatting import escaped, markdown_table, number
from quantdit.evaluation.gate.findings import (
    COLUMNS,
    FAIL,
    INCONCLUSIVE,
    LAYER_GROWTH,
    PASS,
    SAME_NOISE,
    Finding,
    most,
    of_layers,
    of_samples,
    of_sets,
)
from quantdit.evaluation.gate.report_files import check, read, report_in
from quantdit.evaluation.metrics.table import (
    DISTANCE_MARGIN,
    FORMAT,
    LAYER_MARGIN,
    LAYERS,
    METRICS,
    READING,
    SHARE_MARGIN,
    is_share,
)
from quantdit.system import files

EXIT_CODES = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}
NOTE = (
    "Candidate, baseline, noise floor and other seeds are means in the measure's own unit. The last two compare full precision"
    " with itself: the noise floor on the same seeds, in another dtype or batch size; other seeds on others. Worse by x dB means"
    " that the squared error is 10^(x/10) times the baseline's (3 dB: twice). Without dB, it is the change in the measure's own"
    " unit. A limit with two ends allows no change beyond either."
)


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
        return most([f.more for f in self.open])


def gate(report: dict | str | Path, baseline: dict | str | Path) -> Verdict:
    """Hold a report of `evaluate` against a baseline: their contents, or files (of the report also its folder).

    Raises:
        ValueError: one of them is damaged, or the two cannot be compared; says in what they differ.
    """
    report = _content(report, "report")
    baseline = _content(baseline, "baseline")
    stored = _checked(report, baseline)
    margins = baseline["margins"]
    found = [of_samples(report, stored, name, float(margins[name])) for name in METRICS if name in margins]
    findings = [f for f in found if f is not None] + of_sets(report, stored, margins)
    if report["probe"]["layers"] and LAYERS in margins:
        findings.append(of_layers(report["probe"], stored["probe"], float(margins[LAYERS])))
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
    lines = [f"**{verdict.verdict.upper()}**: {escaped(headline(verdict))}", "", *markdown_table(rows), ""]
    lines += [f"- {escaped(f'{f.name}: {f.note}')}" for f in verdict.findings if f.note]
    lines += [f"- note: {escaped(note)}" for note in verdict.notes]
    lines += [""] if lines[-1] else []  # else the last item of the list would take the next line in
    lines.append(f"{NOTE} {READING}")
    return "\n".join(lines)


def worst_first(verdict: Verdict) -> list[Finding]:
    """Return the findings: those that failed, then those that are open, then those that passed."""
    return sorted(verdict.findings, key=lambda f: (FAIL, INCONCLUSIVE, PASS).index(f.verdict))
