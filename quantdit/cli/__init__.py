"""The command line: arguments in, calls of the library, one clear line for a user's error."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from itertools import takewhile
from pathlib import Path
from typing import NoReturn, TextIO

from quantdit.recipes.recipe import BEST, METHODS

EXAMPLES = """examples:
  quantdit models
  quantdit calibrate --model fashion-dit --bits w4a8 --output out/fashion-dit-w4a8
  quantdit generate out/fashion-dit-w4a8 --count 40 --seed 1 --output clothes.png
  quantdit evaluate fashion-dit out/fashion-dit-w4a8 --output out/drift
  quantdit inspect out/fashion-dit-w4a8 --plot layers.png
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a user's error (one line on stderr), 2 for wrong usage, 130 if interrupted.

    Whoever reads stdout may leave early (`| head -1`); the command ends as it would have. A closed stderr ends it with 141.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        with redirect_stdout(_Forgiving(sys.stdout or io.StringIO())) as printed, _advice_as_lines():
            try:
                return args.run(args)
            finally:
                printed.flush()
    except BrokenPipeError:
        _discard(sys.stderr)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        further = "; the same command with --resume goes on" if args.run is _calibrate else ""
        print(f"\nquantdit: interrupted{further}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            traceback.print_exc()
        named = isinstance(error, OSError) and error.filename is not None and error.strerror
        text = f"cannot open {error.filename2 or error.filename}: {error.strerror}; check the path" if named else str(error)
        _print_error(text)
        return 1


def _print_error(text: str) -> None:
    print("quantdit: error:", re.sub(r"\s*\n\s*", " ", text), file=sys.stderr)


class _Forgiving(io.TextIOBase):
    """A stream whose reader may leave."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            _discard(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            _discard(self._stream)

    def isatty(self) -> bool:
        return self._stream.isatty()


def _discard(stream: TextIO) -> None:
    """Let what is still to be written to a stream go nowhere, so that Python does not complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _advice_as_lines() -> Iterator[None]:
    """Print each advice once, as a line of ours that leaves progress bars whole."""
    given: set[str] = set()
    show = warnings.showwarning

    def print_once(message: Warning | str, category: type[Warning], *where: object) -> None:
        from tqdm import tqdm

        from quantdit.system.files import Advice

        if not issubclass(category, Advice):
            show(message, category, *where)
        elif str(message) not in given:
            given.add(str(message))
            tqdm.write(f"quantdit: note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = print_once
        yield


class _Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line that names what may have been meant."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        _print_error(f"{message}; see {self.prog} --help")
        sys.exit(2)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        # Before argparse complains of the option that is missing since its name was misspelled.
        for text in takewhile(lambda text: text.startswith("-"), given) if self._subparsers else given:
            name = text.partition("=")[0]
            if text.startswith("--") and " " not in text and name not in known:
                if name == "--":
                    break
                self.error(f"unknown option {name}{_meant(name, known)}")
        found, rest = super().parse_known_args(given, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{_meant(rest[0].partition('=')[0], known)}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice {value!r}{_meant(str(value), action.choices)}; choose from {known}"
            )


def _meant(given: str, known: Iterable[str]) -> str:
    """Return a question that names the nearest of what is known, or nothing."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("quantdit", description="Quantize diffusion transformers.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}")
        sub.add_argument("--traceback", action="store_true", help="print the whole traceback of an error")
        sub.set_defaults(run=run)
        return sub

    command("models", _models, "List the models known by name, and what each is calibrated on.", "quantdit models")

    sub = command(
        "calibrate",
        _calibrate,
        "Quantize a model.",
        "quantdit calibrate --model fashion-dit --bits w4a8 --output out/fashion-dit-w4a8",
    )
    sub.add_argument(
        "--model",
        type=_model,
        required=True,
        metavar="NAME|HUB_ID|DIR",
        help="what to quantize; `quantdit models` lists the names",
    )
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument("--bits", metavar="wXaY", help="weight bits X in 2 3 4 6 8 and activation bits Y in 4 6 8 16; auto, autoaY")
    how.add_argument("--recipe", type=_path, metavar="FILE.toml", help="ordered per-layer rules")
    goal = sub.add_mutually_exclusive_group()
    goal.add_argument(
        "--size-budget",
        type=_number,
        metavar="PART",
        help="choose each layer's weight bits so that all take this part of their size in 16 bits (0.25: 4 bits a weight)",
    )
    goal.add_argument(
        "--max-drift",
        type=_number,
        metavar="ERROR",
        help="choose each layer's weight bits for the smallest size whose model_rel_rmse is at most this (0.05: 5 %%)",
    )
    sub.add_argument("--output", type=_path, help="folder to write (MODEL-BITS, here)")
    whose = sub.add_argument_group("whose method makes a recipe of --bits", _methods())
    whose.add_argument("--method", metavar="NAME", default=BEST, help="(%(default)s)")
    vectors = sub.add_argument_group("weights and how they are calibrated on the outputs of blocks (VQ4DiT)")
    vectors.add_argument(
        "--weight-format",
        choices=("table", "vq", "ssvq", "trellis"),
        help="with --bits: level tables, codebooks of vectors, these with signs split off, or trellis codes (w2, w3: trellis,"
        " else table)",
    )
    vectors.add_argument(
        "--calibration-steps",
        type=_count,
        metavar="N",
        help="optimizer steps, of each block or end to end (w2: 300, vq4dit: 500, else 0)",
    )
    vectors.add_argument("--calibration-mode", choices=("block", "end-to-end"), help="a block at a time, or all at once (block)")
    vectors.add_argument("--candidates", type=_positive, help="codewords that each sub-vector may choose among (2; w2: 1)")
    vectors.add_argument("--initial-ratios", choices=("distance", "uniform"), help="of the candidates (distance)")
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", type=_path, metavar="DIR", help="where the model lies: its whole pipeline, or its transformer alone"
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="made-up weights of the true shapes, to measure time, memory and size"
    )
    sub.add_argument("--memory-budget", type=_bytes, metavar="8GiB", help="stay within; blocks are then read one at a time")
    data = sub.add_argument_group("calibration data (of a known model: what quantdit models shows for it)")
    data.add_argument("--samples", type=_count, help="images or clips to calibrate on; 0: none, round to nearest (32)")
    data.add_argument("--steps", type=_positive, help="sampling steps (20)")
    data.add_argument("--guidance", type=_finite, help="guidance scale (the pipeline's own default)")
    data.add_argument("--seed", type=_seed, default=0, help="(%(default)s)")
    data.add_argument("--timesteps", type=_count, default=0, help="of the steps, how many to keep; 0: all")
    data.add_argument("--timestep-choice", choices=("even", "salience"), default="even", help="which to keep (%(default)s)")
    data.add_argument("--tokens", type=_count, default=0, help="tokens of each call to make statistics of; 0: all")
    data.add_argument("--prompts", type=_path, metavar="FILE", help="text file, one prompt a line (the built-in list)")
    data.add_argument("--height", type=_positive, help="of a sample, in pixels")
    data.add_argument("--width", type=_positive, help="of a sample, in pixels")
    data.add_argument("--frames", type=_positive, help="of a clip")
    sub.add_argument("--device", default="cpu", help="(%(default)s)")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    sub.add_argument(
        "--overwrite", action="store_true", help="replace an output folder that quantdit wrote, unless it holds files of yours"
    )

    sub = command(
        "generate",
        _generate,
        "Sample a grid of images or clips.",
        "quantdit generate fashion-dit --count 40 --seed 1 --output clothes.png\n"
        '  quantdit generate emoji-wan --prompt "a bat moving left" "a rocket moving right" --output clips.webp',
    )
    sub.add_argument("model", type=_model, metavar="NAME|HUB_ID|DIR")
    sub.add_argument(
        "--output", type=_path, required=True, help="PNG file; of clips .webp, .gif or .mp4, or .png for rows of their frames"
    )
    sub.add_argument(
        "--count", type=_positive, dest="samples", help="images or clips (one of each prompt given, else 40 images or 8 clips)"
    )
    sub.add_argument("--columns", type=_positive, help="in a row (10 images, 4 clips)")
    sub.add_argument(
        "--classes", type=_class, nargs="+", help="classes to draw, in turn: numbers, or names (class-conditional models)"
    )
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to draw, in turn (models that take text)")
    what.add_argument("--prompts", type=_path, help="text file, one prompt a line")
    sub.add_argument(
        "--onnx",
        type=_path,
        nargs="+",
        metavar="FILE",
        help="let graphs that were exported from DIR compute in the transformer's place",
    )
    _sampling(sub)

    sub = command(
        "inspect", _inspect, "Show what is inside a quantized folder.", "quantdit inspect out/fashion-dit-w4a8 --plot layers.png"
    )
    sub.add_argument("folder", type=_path, metavar="DIR")
    _accept_config(sub)
    sub.add_argument("--all", action="store_true", help="list every layer in its order, not the worst ten alone")
    sub.add_argument("--by", choices=("role", "block"), default="role", help="what layers are grouped by (%(default)s)")
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print all of it as JSON")
    shown.add_argument("--plot", type=_path, metavar="FILE.png", help="draw weights and levels, errors, activations per timestep")

    sub = command(
        "evaluate",
        _evaluate,
        "Compare two models on the same seeds.",
        "quantdit evaluate fashion-dit out/fashion-dit-w4a8 --output out/drift",
    )
    sub.add_argument("reference", type=_model, metavar="REF")
    sub.add_argument("candidate", type=_model, metavar="CAND")
    sub.add_argument("--output", type=_path, required=True, help="folder for report.html, report.md, report.json, drift.png")
    sub.add_argument(
        "--prompts", type=_path, metavar="FILE", help="text file, one prompt a line (the model's own, or its classes)"
    )
    number = sub.add_mutually_exclusive_group()
    number.add_argument("--seeds", type=_positive, metavar="N", help="samples of each prompt")
    number.add_argument("--samples", type=_positive, help="samples of each model, prompts in turn, at least 4 (64)")
    sub.add_argument("--batch", type=_positive, default=32, help="samples at once (%(default)s)")
    sub.add_argument("--probes", type=_positive, default=16, help="samples whose inputs both transformers get (%(default)s)")
    sub.add_argument("--cache", type=_path, metavar="DIR", help="where samples are kept for the next time (OUTPUT/samples)")
    sub.add_argument(
        "--noise-floor",
        action="store_true",
        help="also measure how far REF is from itself on the same seeds, with another batch size and in another dtype;"
        " --update-baseline needs it",
    )
    sub.add_argument("--real", type=_path, metavar="DIR", help="folder of real images to measure both sets against")
    sub.add_argument(
        "--inception-weights",
        type=_path,
        metavar="FILE",
        help="FID and KID by the original network instead of EfficientNet-Lite0",
    )
    sub.add_argument("--clip-weights", type=_path, metavar="DIR", help="a CLIP model's folder: CLIP score and CMMD")
    sub.add_argument(
        "--vbench", type=_path, metavar="DIR", help="an environment that has the vbench package, to score clips with"
    )
    sub.add_argument(
        "--vbench-weights", type=_path, metavar="DIR", help="of its networks: scores what it finds there (it fetches them all)"
    )
    _sampling(sub)

    sub = command(
        "gate",
        _gate,
        "Hold a report against a baseline: exit code 0 for pass, 1 for fail, 3 for inconclusive.",
        "quantdit gate out/drift/report.json --baseline reports/baselines/fashion-dit-w4a8.json",
    )
    sub.add_argument("report", type=_path, metavar="REPORT", help="report.json of quantdit evaluate, or its folder")
    sub.add_argument("--baseline", type=_path, required=True, metavar="FILE.json")
    sub.add_argument("--update-baseline", action="store_true", help="make the baseline of this report; margins in it are kept")
    sub.add_argument("--summary", type=_path, metavar="FILE.md", help="write the verdict there, too, as for a pull request")

    sub = command(
        "export",
        _export,
        "Write a quantized folder in another form.",
        "quantdit export out/fashion-dit-w4a8 --to dense --output out/fashion-dit-dense",
    )
    sub.add_argument("folder", type=_path, metavar="DIR")
    _accept_config(sub)
    sub.add_argument(
        "--to",
        choices=("dense", "comfyui", "onnx"),
        required=True,
        help="dense: its transformer as bfloat16, which plain diffusers loads; comfyui: one file in ComfyUI's own formats;"
        " onnx: its transformer as a graph for ONNX Runtime",
    )
    sub.add_argument(
        "--output",
        type=_path,
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

    sub = command(
        "bench",
        _bench,
        "Measure quantized linears against full precision on this machine, and write a table.",
        "quantdit bench cpu --output out/cpu.jsonl",
    )
    sub.add_argument(
        "what", choices=("cpu", "kernels", "onnx"), help="cpu; kernels: the Triton kernels on a CUDA GPU; onnx: exported graphs"
    )
    sub.add_argument("--output", type=_path, required=True, metavar="FILE.jsonl", help="one row a measurement; a table beside it")
    sub.add_argument("--tune", action="store_true", help="kernels: time every tile configuration first and keep the fastest")
    sub.add_argument(
        "--write-crossover", action="store_true", help="kernels: put the crossover points measured here where layers look them up"
    )
    return parser


def _accept_config(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--accept-config",
        action="store_true",
        help="load a quantized model although its config or its scheduler's config was changed since it was written",
    )


def _sampling(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("sampling (what is not given is the pipeline's own)")
    group.add_argument("--steps", type=_positive, default=20, help="sampling steps (%(default)s)")
    group.add_argument("--guidance", type=_finite, help="guidance scale")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    group.add_argument("--height", type=_positive, help="height of a sample, in pixels")
    group.add_argument("--width", type=_positive, help="width of a sample, in pixels")
    group.add_argument("--frames", type=_positive, help="number of frames of a clip")
    group.add_argument("--seed", type=_seed, default=0, help="(%(default)s)")
    _accept_config(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and activations that are not quantized (%(default)s)",
    )
    group.add_argument("--device", default="cpu", help="(%(default)s)")


# Options of the command line that are fields of pipeline.Sampling.
_SAMPLING = ("samples", "seed", "steps", "guidance", "negative_prompt", "height", "width", "frames", "dtype", "batch", "classes")


def _asked(args: argparse.Namespace) -> dict[str, object]:
    """Return what is asked of a model, by the names of pipeline.Sampling."""
    found = {key: getattr(args, key, None) for key in _SAMPLING}
    found["prompts"] = _prompts(args.prompts) if args.prompts else getattr(args, "prompt", None)
    return {key: value for key, value in found.items() if value is not None}


def _models(args: argparse.Namespace) -> int:
    from quantdit.models.known_models import KNOWN_MODELS

    rows = [("name", "size", "embedded", "transformer", "hub id", "what it makes")]
    rows += [
        (name, a.parameters, "no" if a.hub else "yes", a.transformer, a.hub or "-", a.about) for name, a in KNOWN_MODELS.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for name, size, *texts, about in rows:
        cells = [name.ljust(widths[0]), size.rjust(widths[1]), *(t.ljust(w) for t, w in zip(texts, widths[2:], strict=True))]
        print(*cells, about, sep="  ")
    print("\nwhat quantdit calibrate samples of each, but for what --samples, --steps, --guidance, --height, ... say")
    rows = [("name", "on a CPU", "on a GPU"), *((name, _captured(a.cpu), _captured(a.gpu)) for name, a in KNOWN_MODELS.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        print(row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2], sep="  ")
    return 0


def _captured(known) -> str:
    """Return what of a known model calibration samples: an aliases.Capture in words."""
    frames = f"{known.frames} frames of " if known.frames > 1 else ""
    return f"{known.prompts} samples, {known.steps} steps, guidance {known.guidance:g}, {frames}{known.width}x{known.height}"


def _calibrate(args: argparse.Namespace) -> int:
    from quantdit.compiling import work_folder
    from quantdit.compiling.compiler import ALREADY, REPORT, calibrate
    from quantdit.inspection import inspection
    from quantdit.pipelines.pipeline import BareTransformer
    from quantdit.system import progress

    plan, target = _plan(args)
    if args.output is None:
        named = plan.name.replace(" ", "-") if args.bits is not None else args.recipe.stem
        args.output = Path(f"{Path(args.model).resolve().name}-{named}")
    with work_folder.clear_disk_errors(args.output), ExitStack() as stack:
        work_folder.check_output(args.output, args.overwrite, args.resume)
        given = {"recipe": args.recipe, "prompts": args.prompts, "--weights folder": args.weights}
        work_folder.check_apart(args.output, {what: (path,) for what, path in given.items() if path is not None})
        prompts = _prompts(args.prompts) if args.prompts else []
        _check_model(args)
        progress.say(f"loading {args.model}")  # seconds go into it
        scratch = None
        if args.random_weights:
            place = work_folder.place_of(args.output)
            scratch = place.with_name(f"{place.name}.random")
            stack.enter_context(work_folder.locked(scratch))
        pipeline, source = _open(args, scratch)
        if isinstance(pipeline, BareTransformer) and not args.random_weights:
            print(f"quantdit: note: {source.folder} has no pipeline, only a transformer: conditions are made up", file=sys.stderr)
        settings = _settings(args, pipeline, prompts)
        if 0 < settings.samples < len(settings.prompts):
            print(
                f"quantdit: note: {settings.samples} of {len(settings.prompts)} prompts are used; see --samples", file=sys.stderr
            )
        training = _training(args, settings, plan)
        report = calibrate(pipeline, source, plan, args.output, settings, args.resume, args.overwrite, target, training)
        if scratch is not None:
            shutil.rmtree(scratch)
    size, seconds = report["size"], report["seconds"]
    layers = report["layers"].values()
    kind = "rel_rmse" if any("rel_rmse" in layer for layer in layers) else "weight_rel_rmse"
    errors = [layer[kind] for layer in layers if kind in layer]
    if "warning" in report:
        print(f"quantdit: warning: {report['warning']}", file=sys.stderr)
    if report.get(ALREADY):
        print(f"{args.output} is finished already, by a run of the same settings; --overwrite calibrates again")
    memory, dense = report["memory"], report.get("dense_layers", 0)  # reports of earlier versions do not say
    print(
        f"{args.output}: {len(layers)} layers quantized{f', {dense} left dense' if dense else ''},"
        f" {size['bits_per_weight']:.2f} bits a weight, {size['file_bytes'] / 1e6:.2f} MB,"
        f" mean {kind} {sum(errors) / max(1, len(errors)):.4f}, {sum(seconds.values()):.0f} s, at most"
        f" {memory['peak_bytes'] / 2**30:.1f} GiB of memory; report in {args.output / REPORT}"
    )
    if target is not None:
        print(inspection.allocation_summary(report["allocation"]))
    return 0


def _plan(args: argparse.Namespace):
    """Return the recipe, and what its open weights are to be chosen for, or None."""
    from quantdit.compiling.compiler import Target
    from quantdit.recipes import recipe

    plan = recipe.from_bits(args.bits, args.method) if args.bits is not None else recipe.from_toml(args.recipe)
    if args.method != recipe.BEST:
        _check_method(args)
    target = None
    if args.size_budget is not None or args.max_drift is not None:
        target = Target(args.size_budget, args.max_drift)
        plan = recipe.with_auto(plan) if args.bits is not None else plan
    if args.weight_format is not None:
        if args.bits is None:
            raise ValueError("--weight-format goes with --bits; a recipe names the weight format itself")
        plan = recipe.with_weight_format(plan, args.weight_format)
    return plan, target


def _methods() -> str:
    """Return a line of each method, and one of the bits that it has where these are not all."""
    width, lines = max(map(len, METHODS)), []
    for name, method in METHODS.items():
        lines.append(f"{name:{width}}  {method.about}")
        lines += [f"{'':{width}}  (arXiv {method.arxiv}; {' '.join(method.bits)})"] if method.arxiv else []
    no_images = "No method needs images: samples come from noise by the model itself, as in VQ4DiT's zero-data calibration."
    return "\n".join([*lines, no_images])


def _check_method(args: argparse.Namespace) -> None:
    """Refuse what goes with the presets alone."""
    given = {
        "--recipe": args.recipe is not None,
        "--weight-format": args.weight_format is not None,
        "--size-budget": args.size_budget is not None,
        "--max-drift": args.max_drift is not None,
    }
    if wrong := next((option for option, is_given in given.items() if is_given), None):
        raise ValueError(f"--method {args.method} takes --bits and settles the weights itself; leave out {wrong}, or --method")
    if args.samples == 0:
        raise ValueError(f"--method {args.method} calibrates on samples that the model makes itself; leave out --samples 0")


def _training(args: argparse.Namespace, settings, plan):
    """Return how assignments are calibrated: as the user said, else as the preset does where there are samples; or None."""
    from dataclasses import replace

    from quantdit.compiling.finetune import Training, chooses, preset, trains

    training = preset(args.bits or "", args.method) if settings.samples and any(map(trains, plan.rules)) else None
    if args.calibration_steps is not None:
        training = replace(training or Training(), steps=args.calibration_steps) if args.calibration_steps else None
    given = {"mode": args.calibration_mode, "candidates": args.candidates, "initial": args.initial_ratios}
    given = {key: value for key, value in given.items() if value is not None}
    if training is None and given and args.calibration_steps is None:
        raise ValueError(
            "--calibration-mode, --candidates and --initial-ratios go with --calibration-steps: without it no assignments are"
            " calibrated"
        )
    if (args.candidates or 1) > 1 and not any(map(chooses, plan.rules)):
        raise ValueError(
            f"--candidates {args.candidates}: no layer of {plan.name} has a codebook to choose from (trellis codes stay as they"
            " are); take --weight-format vq or table, or leave it out"
        )
    return None if training is None else replace(training, **given)


def _check_model(args: argparse.Namespace) -> None:
    """Refuse a model that there cannot be, before seconds go into loading what loads it."""
    from quantdit.models.known_models import KNOWN_MODELS, locate

    if args.random_weights and (args.model not in KNOWN_MODELS or not KNOWN_MODELS[args.model].hub):
        raise ValueError(f"--random-weights needs a known model that is not embedded, got {args.model!r}; see quantdit models")
    locate(args.model)


def _open(args: argparse.Namespace, scratch: Path | None):
    """Return the pipeline to calibrate, or its bare transformer, and its source."""
    from dataclasses import replace

    from quantdit.checkpoints.random_weights import open_scratch, write_random_transformer
    from quantdit.models.known_models import KNOWN_MODELS, transformer_config
    from quantdit.pipelines.pipeline import load_pipeline

    _quiet()
    if scratch is None:
        return load_pipeline(args.model, device=args.device, weights=args.weights, memory_budget=args.memory_budget)
    open_scratch(scratch, {"model": args.model, "seed": args.seed})
    for number, part in enumerate(KNOWN_MODELS[args.model].transformers):
        write_random_transformer(transformer_config(args.model), scratch / part, args.seed + number)
    pipeline, source = load_pipeline(args.model, device=args.device, weights=scratch, memory_budget=args.memory_budget)
    return pipeline, replace(source, random_weights=True)


def _settings(args: argparse.Namespace, pipeline: object, prompts: list[str]):
    """Return what is sampled: what the user said, else what suits the model, else the defaults."""
    from quantdit.models.known_models import KNOWN_MODELS
    from quantdit.pipelines.pipeline import BareTransformer
    from quantdit.pipelines.sampling import SIZES, Settings, takes

    given = {
        key: getattr(args, key) for key in ("samples", "steps", "guidance", "seed", "timesteps", "timestep_choice", "tokens")
    }
    given |= {size: getattr(args, size) for size in SIZES}
    if prompts:
        given["prompts"] = tuple(prompts)
    wanted = {}
    if args.model in KNOWN_MODELS:
        known = KNOWN_MODELS[args.model].cpu if args.device == "cpu" else KNOWN_MODELS[args.model].gpu
        wanted = {"samples": known.prompts, "steps": known.steps, "guidance": known.guidance}
        wanted |= {size: getattr(known, size) for size in SIZES if takes(pipeline, size)}
        wanted |= {"latent": known.latent} if isinstance(pipeline, BareTransformer) else {}
    return Settings(**{**wanted, **{key: value for key, value in given.items() if value is not None}})


def _prompts(path: Path) -> list[str]:
    from quantdit.system import files

    # Only line ends end a prompt: str.splitlines would cut it at U+2028 and others.
    prompts = [line for line in files.read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def _generate(args: argparse.Namespace) -> int:
    from quantdit.system import progress
    from quantdit.system.output_places import require_picture

    asked = _asked(args)
    require_picture(args.output)
    progress.say("loading diffusers")  # seconds go into it
    from quantdit.api import generate

    _quiet()
    try:
        generate(args.model, args.output, args.columns, args.device, args.onnx or (), accept_config=args.accept_config, **asked)
    except ValueError as error:
        if args.prompt is None or "--prompts" not in str(error):
            raise
        raise ValueError(str(error).replace("--prompts", "--prompt")) from error  # the one of the two that was given
    print(args.output)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from quantdit.inspection import inspection
    from quantdit.system.output_places import PICTURES, require_file, require_suffix

    if args.plot:
        require_file(args.plot)
        require_suffix(args.plot, PICTURES, "plots")
    found = inspection.read(args.folder, args.accept_config)
    if args.json:
        print(json.dumps(inspection.as_json(found), indent=2))
        return 0
    if args.plot:
        inspection.check_plot(found)
    print(inspection.describe(found, shutil.get_terminal_size().columns, args.all, args.by))
    if args.plot:
        inspection.plot(found, args.plot)
        print(args.plot)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from quantdit.system import progress
    from quantdit.system.output_places import require_folder

    asked = _asked(args)
    require_folder(args.output)
    progress.say("loading diffusers")
    from quantdit.evaluation.run import FOLDERS, SUMMARY, evaluate

    _quiet()
    others = {key: getattr(args, key) for key in ("seeds", "probes", "device", "noise_floor", "accept_config", *FOLDERS)}
    evaluate(args.reference, args.candidate, args.output, **asked, **others)
    print((args.output / SUMMARY).read_text())
    print(args.output / "report.html")
    return 0


def _gate(args: argparse.Namespace) -> int:
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


def _export(args: argparse.Namespace) -> int:
    from quantdit.api import export
    from quantdit.exporters.to_onnx import describe

    _quiet()
    of_onnx = ("storage", "verify", "part", "target") if args.to == "onnx" else ()
    options = {key: getattr(args, key) for key in ("accept_config", *of_onnx)}
    made = export(args.folder, args.to, args.output, **options)
    if args.to == "onnx":
        print(describe(args.output, made))
    elif args.to == "comfyui":
        print(f"{args.output}: {', '.join(f'{count} layers as {name}' for name, count in sorted(made.items()))}")
    else:
        print(args.output)
    return 0


def _bench(args: argparse.Namespace) -> int:
    if args.output.suffix != ".jsonl":
        raise ValueError(f"--output {args.output} must end in .jsonl; the table is written beside it as .md")
    if args.what == "kernels":
        from quantdit.benchmarks import gpu_kernels

        gpu_kernels.run(args.output, args.tune, args.write_crossover)
    elif args.what == "onnx":
        from quantdit.benchmarks import onnx_graphs

        _quiet()
        onnx_graphs.run(args.output)
    else:
        from quantdit.benchmarks import cpu_linear

        cpu_linear.run(args.output)
    print(args.output)
    return 0


def _quiet() -> None:
    """Leave the terminal to our own progress bars."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


def _path(text: str) -> Path:
    return Path(_model(text))


def _model(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; . is the folder that you are in")
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _count(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([KMGT])(i?))?B?", text)
    if found is None or not (value := float(found[1])) > 0:
        raise argparse.ArgumentTypeError(f"a size is a number with a unit, such as 8GiB or 500MB, got {text!r}")
    return int(value * (1024 if found[3] else 1000) ** (" KMGT".index(found[2] or " ")))


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"a seed lies in 0..2147483647, got {value}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _class(text: str) -> int | str:
    return int(text) if re.fullmatch("-?[0-9]+", text) else text


def _finite(text: str) -> float:
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def _version() -> str:
    from importlib.metadata import version

    return f"quantdit {version('quantdit')}"


if __name__ == "__main__":
    sys.exit(main())
