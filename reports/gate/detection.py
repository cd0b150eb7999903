"""How often the gate catches damage, and how often it cries out at none: every case of it with fresh seeds, again and again.

    python reports/gate/detection.py out/fashion-dit-w4a8 out/emoji-wan-w4a8

A row is one repetition of one case: full precision against itself (another batch size), the good quantized model, and the good
model after each of damage.DAMAGES, the place of the damage drawn anew. The baseline is the committed one, of seeds that no
repetition has; only the probe's noise is always the same, as it is in every report. Rows that are in detection.jsonl are kept, so
that an interrupted run goes on; the table is detection.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from quantdit.evaluation import gate
from quantdit.evaluation.run import Opened, Reference, compare_models, open_model, sample_reference
from quantdit.evaluation.samples import Sampling

HERE = Path(__file__).parent
REPETITIONS, FIRST_SEED, BASELINE_SEED = 20, 100, 0
CLEAN = ("full precision", "good model")
EXTRA = "one sign of one channel"  # more than was asked for, and no damage at all where the channel is silent
BASELINES = HERE.parent / "baselines"


# As `make gate` samples, which is what a gate in CI can afford: samples, steps, probes.
SIZES = {"fashion-dit": (20, 4, 10), "emoji-wan": (8, 3, 4)}


def damages() -> ModuleType:
    """Return damage.py, which lies beside this file."""
    spec = importlib.util.spec_from_file_location("damage", HERE / "damage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(name: str, reference: Reference, good: Opened, seed: int, tables: ModuleType) -> tuple[Opened, str]:
    """Return the candidate of a case, and where its damage is."""
    if name == "full precision":
        return reference.model, ""
    if name == "good model":
        return good, ""
    pipeline = copy.copy(good.pipeline)
    pipeline.transformer = copy.deepcopy(good.pipeline.transformer)
    with torch.no_grad():
        place = tables.DAMAGES[name](pipeline.transformer, reference.model.pipeline.transformer, random.Random(f"{name} {seed}"))
    return replace(good, pipeline=pipeline), place


def run(folder: Path, rows: list[dict], output: Path) -> None:
    """Add the rows of one model that are missing."""
    good = open_model(str(folder))
    name = next(n for n in SIZES if folder.resolve().name.startswith(n))
    tables = damages()
    cases = (*CLEAN, *tables.DAMAGES)
    done = {(row["model"], row["repetition"], row["case"]) for row in rows}
    # What needs the fewest of them comes last: a run that is cut short has whole repetitions of the others.
    order = [c for c in cases if c != EXTRA], [EXTRA]
    wanted = [(r, c) for part in order for r in range(REPETITIONS) for c in part if (name, r, c) not in done]
    if not wanted:
        return
    samples, steps, probes = SIZES[name]
    sampling = Sampling(samples, BASELINE_SEED, steps)
    baseline = gate.read(BASELINES / f"{name}-w4a8.json", "baseline")
    current = None
    for repetition, case_name in wanted:
        seed = FIRST_SEED + 2 * repetition  # a reference takes the next seed, too
        if current != repetition:
            current, reference = repetition, sample_reference(name, replace(sampling, seed=seed))
        start = time.perf_counter()
        candidate, place = case(case_name, reference, good, seed, tables)
        if case_name == "full precision":
            reference_again = replace(reference, sampling=replace(reference.sampling, batch=max(1, samples // 2)))
            found = compare_models(reference_again, candidate, probes=probes)
        else:
            found = compare_models(reference, candidate, probes=probes)
        verdict = gate.gate(found.report, baseline)
        row = {
            "model": name,
            "repetition": repetition,
            "case": case_name,
            "seed": seed,
            "place": place,
            "verdict": verdict.verdict,
            "more": verdict.more,
            "failed": [f.name for f in verdict.findings if f.verdict == gate.FAIL],
            "undecided": [f.name for f in verdict.findings if f.verdict == gate.INCONCLUSIVE],
            "differences": {
                f.name: [round(v, 4) for v in (f.difference.estimate, f.difference.low, f.difference.high)]
                for f in verdict.findings
            },
            "seconds": round(time.perf_counter() - start, 2),
        }
        rows.append(row)
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name} {repetition} {case_name}: {verdict.verdict} {place} {row['failed'] or row['undecided']}", flush=True)


def table(rows: list[dict]) -> str:
    """Return the verdicts of each model and case, and which measures alone would have caught it."""
    lines = [
        "# How often the gate catches damage",
        "",
        "Fresh seeds in every repetition, and for each damage a fresh place. The committed baseline, of other seeds."
        " Expected: pass for the first two cases, fail for the others. `make detection` makes the rows, `detection.jsonl`.",
        "",
    ]
    whole = len(SIZES) * REPETITIONS * (len(CLEAN) + len(damages().DAMAGES))
    if len(rows) < whole:
        lines += [f"**Not finished: {len(rows)} of {whole} rows.** So few say nothing of a rate of 19 in 20.", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        samples, steps, probes = SIZES[model]
        own = [row for row in rows if row["model"] == model]
        seconds = sum(row["seconds"] for row in own) / len(own)
        lines += [
            f"## {model}",
            "",
            f"{samples} samples, {steps} steps, {probes} probes; {seconds:.1f} s a case on one core, reference not counted.",
            "",
            "| case | as expected | pass | fail | inconclusive | caught by | images alone would have failed |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in dict.fromkeys(row["case"] for row in own):
            some = [row for row in own if row["case"] == name]
            counts = [sum(row["verdict"] == v for row in some) for v in (gate.PASS, gate.FAIL, gate.INCONCLUSIVE)]
            expected = counts[0] if name in CLEAN else counts[1]
            by = {f: sum(f in row["failed"] for row in some) for row in some for f in row["failed"]}
            caught = ", ".join(f"{f} {n}" for f, n in sorted(by.items(), key=lambda pair: -pair[1])[:4])
            inner = ("largest growth of a layer's error", "model output error")
            images = sum(any(f not in inner for f in row["failed"]) for row in some)
            lines.append(
                f"| {name} | {expected} of {len(some)} | {counts[0]} | {counts[1]} | {counts[2]} | {caught} | {images} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Add what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", type=Path, nargs="+", help="good quantized models, named as the originals with something after it"
    )
    parser.add_argument("--output", type=Path, default=HERE / "detection.jsonl")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    for folder in args.folders:
        run(folder, rows, args.output)
    args.output.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
