"""The command `quantdit evaluate`."""

from __future__ import annotations

import argparse

from quantdit.cli import options
from quantdit.cli.parser import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    sub = add_command(
        commands,
        "evaluate",
        run,
        "Compare two models on the same seeds.",
        "quantdit evaluate fashion-dit out/fashion-dit-w4a8 --output out/drift",
    )
    sub.add_argument("reference", type=options.model_name, metavar="REF")
    sub.add_argument("candidate", type=options.model_name, metavar="CAND")
    sub.add_argument(
        "--output", type=options.path, required=True, help="folder for report.html, report.md, report.json, drift.png"
    )
    sub.add_argument(
        "--prompts", type=options.path, metavar="FILE", help="text file, one prompt a line (the model's own, or its classes)"
    )
    number = sub.add_mutually_exclusive_group()
    number.add_argument("--seeds", type=options.positive, metavar="N", help="samples of each prompt")
    number.add_argument("--samples", type=options.positive, help="samples of each model, prompts in turn, at least 4 (64)")
    sub.add_argument("--batch", type=options.positive, default=32, help="samples at once (%(default)s)")
    sub.add_argument(
        "--probes", type=options.positive, default=16, help="samples whose inputs both transformers get (%(default)s)"
    )
    sub.add_argument(
        "--cache", type=options.path, metavar="DIR", help="where samples are kept for the next time (OUTPUT/samples)"
    )
    sub.add_argument(
        "--noise-floor",
        action="store_true",
        help="also measure how far REF is from itself on the same seeds, with another batch size and in another dtype;"
        " --update-baseline needs it",
    )
    sub.add_argument("--real", type=options.path, metavar="DIR", help="folder of real images to measure both sets against")
    sub.add_argument(
        "--inception-weights",
        type=options.path,
        metavar="FILE",
        help="FID and KID by the original network instead of EfficientNet-Lite0",
    )
    sub.add_argument("--clip-weights", type=options.path, metavar="DIR", help="a CLIP model's folder: CLIP score and CMMD")
    sub.add_argument(
        "--vbench", type=options.path, metavar="DIR", help="an environment that has the vbench package, to score clips with"
    )
    sub.add_argument(
        "--vbench-weights",
        type=options.path,
        metavar="DIR",
        help="of its networks: scores what it finds there (it fetches them all)",
    )
    sub.add_argument(
        "--only",
        metavar="NAMES",
        help="components of CAND to compare, with commas between, such as transformer; the others are REF's (all)",
    )
    sub.add_argument(
        "--steps-plan",
        action="store_true",
        help="sample CAND by the step plan that it carries (calibrate --steps-plan), and show what as many steps give otherwise",
    )
    options.add_sampling(sub)


def run(args: argparse.Namespace) -> int:
    """Compare two models, and print the table and where the page lies."""
    from quantdit.system import progress
    from quantdit.system.output_places import require_folder

    asked = options.asked(args)
    require_folder(args.output)
    progress.say("loading diffusers")
    from quantdit.evaluation.run import FOLDERS, SUMMARY, evaluate

    options.quiet()
    others = {
        key: getattr(args, key)
        for key in ("seeds", "probes", "device", "noise_floor", "accept_config", "only", "steps_plan", *FOLDERS)
    }
    evaluate(args.reference, args.candidate, args.output, **asked, **others)
    print((args.output / SUMMARY).read_text())
    print(args.output / "report.html")
    return 0
