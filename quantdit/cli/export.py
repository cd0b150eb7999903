"""The command `quantdit export`."""

from __future__ import annotations

import argparse

from quantdit.cli import options
from quantdit.cli.parser import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    sub = add_command(
        commands,
        "export",
        run,
        "Write a quantized folder in another form.",
        "quantdit export out/fashion-dit-w4a8 --to dense --output out/fashion-dit-dense",
    )
    sub.add_argument("folder", type=options.path, metavar="DIR")
    options.add_accept_config(sub)
    sub.add_argument(
        "--to",
        choices=("dense", "comfyui", "onnx"),
        required=True,
        help="dense: its transformer as bfloat16, which plain diffusers loads; comfyui: one file in ComfyUI's own formats;"
        " onnx: its transformer as a graph for ONNX Runtime",
    )
    sub.add_argument(
        "--output",
        type=options.path,
        required=True,
        help="folder to write; FILE.safetensors for comfyui; FILE.onnx, large weights beside it",
    )
    onnx = sub.add_argument_group("ONNX")
    onnx.add_argument(
        "--storage", choices=("packed", "int8"), default="packed", help="weights as narrow as here, or decoded (%(default)s)"
    )
    onnx.add_argument(
        "--target",
        choices=("cpu", "cpu-vnni", "cpu-nbits", "cuda"),
        default="cpu",
        help="cpu: 8-bit integer products; cpu-vnni: faster ones, right on CPUs with VNNI alone; cpu-nbits: 4-bit weights stay so"
        " in memory; cuda: float16 activations (%(default)s)",
    )
    onnx.add_argument("--part", metavar="NAME", help="which transformer, of a pipeline of several (the first)")
    onnx.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="compare with PyTorch before the file counts"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written."""
    from quantdit.api import export
    from quantdit.exporters.to_onnx import describe

    options.quiet()
    of_onnx = ("storage", "verify", "part", "target") if args.to == "onnx" else ()
    given = {key: getattr(args, key) for key in ("accept_config", *of_onnx)}
    made = export(args.folder, args.to, args.output, **given)
    if args.to == "onnx":
        print(describe(args.output, made))
    elif args.to == "comfyui":
        print(f"{args.output}: {', '.join(f'{count} layers as {name}' for name, count in sorted(made.items()))}")
    else:
        print(args.output)
    return 0
