"""The command `quantdit gate`."""

from __future__ import annotations

import argparse

from quantdit.cli import options
from quantdit.cli.parser import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    sub = add_command(
        commands,
        "gate",
        run,
        "Hold a report against a baseline: exit code 0 for pass, 1 for fail, 3 for inconclusive.",
        "quantdit gate out/drift/report.json --baseline reports/baselines/fashion-dit-w4a8.json",
    )
    sub.add_argument("report", type=options.path, metavar="REPORT", help="report.json of quantdit evaluate, or its folder")
    sub.add_argument("--baseline", type=options.path, required=True, metavar="FILE.json")
    sub.add_argument("--update-baseline", action="store_true", help="make the baseline of this report; margins in it are kept")
    sub.add_argument(
        "--summary", type=options.path, metavar="FILE.md", help="write the verdict there, too, as for a pull request"
    )


def run(args: argparse.Namespace) -> int:
    """Print the verdict; returns its exit code."""
    from quantdit.evaluation.gate import judge
    from quantdit.evaluation.report import page
    from quantdit.system import files
    from quantdit.system.output_places import require_file

    for written in (args.summary, args.baseline if args.update_baseline else None):
        if written is not None:
            require_file(written)
    path = judge.report_in(args.report)
    if args.update_baseline:
        report = judge.read(path, "report")
        margins = judge.read(args.baseline, "baseline")["margins"] if args.baseline.exists() else None
        args.baseline.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(args.baseline, judge.make_baseline(report, margins))
        print(args.baseline)
    verdict = judge.gate(path, args.baseline)
    text = judge.summary(verdict)
    if args.summary:
        args.summary.write_text(text + "\n")
    page.add_verdict(path.with_name("report.html"), verdict)
    print(text)
    return verdict.exit_code
