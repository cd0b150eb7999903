"""The command `quantdit bench`."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields

from quantdit.benchmarks.pipeline_prediction import Speeds
from quantdit.cli import options
from quantdit.cli.parser import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    sub = add_command(
        commands,
        "bench",
        run,
        "Measure quantized linears against full precision on this machine, and write a table.",
        "quantdit bench cpu --output out/cpu.jsonl",
    )
    sub.add_argument(
        "what",
        choices=("cpu", "kernels", "onnx", "memory", "pipeline"),
        help="cpu; kernels: the Triton kernels on a CUDA GPU; onnx: exported graphs; memory: of whole pipelines, by arithmetic;"
        " pipeline: seconds a clip with 8-bit attention and step plans",
    )
    sub.add_argument(
        "--output", type=options.path, required=True, metavar="FILE.jsonl", help="one row a measurement; a table beside it"
    )
    sub.add_argument("--tune", action="store_true", help="kernels: time every tile configuration first and keep the fastest")
    sub.add_argument(
        "--write-crossover", action="store_true", help="kernels: put the crossover points measured here where layers look them up"
    )
    sub.add_argument("--predict", action="store_true", help="pipeline: only the arithmetic for Wan on an H100")
    for name, default in asdict(Speeds()).items():
        what = "part of a step that nothing makes faster" if name == "untouched" else f"TFLOP/s of {name}"
        sub.add_argument(
            f"--assume-{name}", type=options.finite, default=default, metavar="X", help=f"pipeline: {what} (%(default)g)"
        )


def run(args: argparse.Namespace) -> int:
    """Measure, and print where the rows lie."""
    if args.output.suffix != ".jsonl":
        raise ValueError(f"--output {args.output} must end in .jsonl; the table is written beside it as .md")
    if args.what == "kernels":
        from quantdit.benchmarks import gpu_kernels

        gpu_kernels.run(args.output, args.tune, args.write_crossover)
    elif args.what == "onnx":
        from quantdit.benchmarks import onnx_graphs

        options.quiet()
        onnx_graphs.run(args.output)
    elif args.what == "memory":
        from quantdit.benchmarks import memory

        options.quiet()
        memory.run(args.output)
    elif args.what == "pipeline":
        from quantdit.benchmarks import pipeline_speed

        options.quiet()
        assumed = {each.name: getattr(args, f"assume_{each.name}") for each in fields(Speeds)}
        pipeline_speed.run(args.output, args.predict, Speeds(**assumed))
    else:
        from quantdit.benchmarks import cpu_linear

        cpu_linear.run(args.output)
    print(args.output)
    return 0
