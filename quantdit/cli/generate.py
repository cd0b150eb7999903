"""The command `quantdit generate`."""

from __future__ import annotations

import argparse

from quantdit.cli import options
from quantdit.cli.parser import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    sub = add_command(
        commands,
        "generate",
        run,
        "Sample a grid of images or clips.",
        "quantdit generate fashion-dit --count 40 --seed 1 --output clothes.png\n"
        '  quantdit generate emoji-wan --prompt "a bat moving left" "a rocket moving right" --output clips.webp',
    )
    sub.add_argument("model", type=options.model_name, metavar="NAME|HUB_ID|DIR")
    sub.add_argument(
        "--output",
        type=options.path,
        required=True,
        help="PNG file; of clips .webp, .gif or .mp4, or .png for rows of their frames",
    )
    sub.add_argument(
        "--count",
        type=options.positive,
        dest="samples",
        help="images or clips (one of each prompt given, else 40 images or 8 clips)",
    )
    sub.add_argument("--columns", type=options.positive, help="in a row (10 images, 4 clips)")
    sub.add_argument(
        "--classes",
        type=options.class_label,
        nargs="+",
        help="classes to draw, in turn: numbers, or names (class-conditional models)",
    )
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to draw, in turn (models that take text)")
    what.add_argument("--prompts", type=options.path, help="text file, one prompt a line")
    sub.add_argument(
        "--onnx",
        type=options.path,
        nargs="+",
        metavar="FILE",
        help="let graphs that were exported from DIR compute in the transformer's place",
    )
    sub.add_argument("--steps-plan", action="store_true", help="follow the step plan that the model carries")
    options.add_sampling(sub)


def run(args: argparse.Namespace) -> int:
    """Sample, and print where the picture lies."""
    from quantdit.system import progress
    from quantdit.system.output_places import require_picture

    asked = options.asked(args)
    require_picture(args.output)
    progress.say("loading diffusers")  # seconds go into it
    from quantdit.api import generate

    options.quiet()
    how = {"onnx": args.onnx or (), "accept_config": args.accept_config, "steps_plan": args.steps_plan}
    try:
        generate(args.model, args.output, args.columns, args.device, **how, **asked)
    except ValueError as error:
        if args.prompt is None or "--prompts" not in str(error):
            raise
        raise ValueError(str(error).replace("--prompts", "--prompt")) from error  # the one of the two that was given
    print(args.output)
    return 0
