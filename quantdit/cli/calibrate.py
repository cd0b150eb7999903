"""The command `quantdit calibrate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quantdit.cli import options
from quantdit.cli.parser import Commands, add_command
from quantdit.recipes.presets import BEST, ENCODER_BITS, METHODS, from_bits

if TYPE_CHECKING:
    from quantdit.compiling.report import CompileResult


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    sub = add_command(
        commands,
        "calibrate",
        run,
        "Quantize a model.",
        "quantdit calibrate --model fashion-dit --bits w4a8 --output out/fashion-dit-w4a8",
    )
    sub.add_argument(
        "--model",
        type=options.model_name,
        required=True,
        metavar="NAME|HUB_ID|DIR",
        help="what to quantize; `quantdit models` lists the names",
    )
    _add_recipe(sub)
    _add_weights(sub)
    _add_source(sub)
    _add_samples(sub)
    sub.add_argument("--device", default="cpu", help="(%(default)s)")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    sub.add_argument(
        "--overwrite", action="store_true", help="replace an output folder that quantdit wrote, unless it holds files of yours"
    )


def _add_recipe(sub: argparse.ArgumentParser) -> None:
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument("--bits", metavar="wXaY", help="weight bits X in 2 3 4 6 8 and activation bits Y in 4 6 8 16; auto, autoaY")
    how.add_argument("--recipe", type=options.path, metavar="FILE.toml", help="ordered per-layer rules")
    goal = sub.add_mutually_exclusive_group()
    goal.add_argument(
        "--size-budget",
        type=options.number,
        metavar="PART",
        help="choose each layer's weight bits so that all take this part of their size in 16 bits (0.25: 4 bits a weight)",
    )
    goal.add_argument(
        "--max-output-error",
        type=options.number,
        metavar="ERROR",
        help="choose each layer's weight bits for the smallest size whose model_rel_rmse is at most this (0.05: 5 %%)",
    )
    goal.add_argument("--max-drift", type=options.number, dest="max_output_error", help=argparse.SUPPRESS)  # its former name
    sub.add_argument("--output", type=options.path, help="folder to write (MODEL-BITS, here)")
    parts = sub.add_argument_group("components of the pipeline to quantize")
    parts.add_argument(
        "--components",
        default="transformer",
        metavar="NAMES",
        help="with commas between: transformer (all of them), names of text encoders, such as text_encoder; all (%(default)s)",
    )
    parts.add_argument(
        "--encoder-bits",
        metavar="wXaY",
        help=f"of the text encoders among them: {' '.join(ENCODER_BITS)} (by the transformer's X: w8a16, w4a16 or w3a16)",
    )
    sub.add_argument(
        "--attention",
        choices=("int8",),
        help="8-bit attention, too (Wan, FLUX, FLUX.2, Qwen-Image, LTX, Chroma, Z-Image); a recipe's [[attention]] says more",
    )
    sub.add_argument(
        "--steps-plan",
        type=options.number,
        metavar="SHARE",
        help="compute this share of the sampling steps (0.5: half) and forecast the others, as measures best on the quantized"
        " model; transformer.enable_cache(quantdit.step_plan(transformer)) turns it on",
    )
    whose = sub.add_argument_group("whose method makes a recipe of --bits", _methods())
    whose.add_argument("--method", metavar="NAME", default=BEST, help="(%(default)s)")


def _add_weights(sub: argparse.ArgumentParser) -> None:
    vectors = sub.add_argument_group("weights and how they are fine-tuned on the outputs of blocks (VQ4DiT)")
    vectors.add_argument(
        "--weight-format",
        choices=("table", "vq", "ssvq", "trellis"),
        help="with --bits: level tables, codebooks of vectors, these with signs split off, or trellis codes (w2, w3: trellis,"
        " else table)",
    )
    vectors.add_argument(
        "--finetune-steps",
        type=options.count,
        metavar="N",
        help="optimizer steps, of each block or end to end (w2: 300, vq4dit: 500, else 0)",
    )
    vectors.add_argument("--finetune-mode", choices=("block", "end-to-end"), help="a block at a time, or all at once (block)")
    vectors.add_argument("--candidates", type=options.positive, help="codewords that each sub-vector may choose among (2; w2: 1)")
    vectors.add_argument("--initial-ratios", choices=("distance", "uniform"), help="of the candidates (distance)")
    # Under their former names.
    vectors.add_argument("--calibration-steps", type=options.count, dest="finetune_steps", help=argparse.SUPPRESS)
    vectors.add_argument("--calibration-mode", choices=("block", "end-to-end"), dest="finetune_mode", help=argparse.SUPPRESS)


def _add_source(sub: argparse.ArgumentParser) -> None:
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", type=options.path, metavar="DIR", help="where the model lies: its whole pipeline, or its transformer alone"
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="made-up weights of the true shapes, to measure time, memory and size"
    )
    sub.add_argument("--memory-budget", type=options.size, metavar="8GiB", help="stay within; blocks are then read one at a time")


def _add_samples(sub: argparse.ArgumentParser) -> None:
    data = sub.add_argument_group("calibration data (of a known model: what quantdit models shows for it)")
    data.add_argument("--samples", type=options.count, help="images or clips to calibrate on; 0: none, round to nearest (32)")
    data.add_argument("--steps", type=options.positive, help="sampling steps (20)")
    data.add_argument("--guidance", type=options.finite, help="guidance scale (the pipeline's own default)")
    data.add_argument("--seed", type=options.seed, default=0, help="(%(default)s)")
    data.add_argument("--timesteps", type=options.count, help="of the steps, how many to keep; 0: all (0)")
    data.add_argument("--timestep-choice", choices=("even", "salience"), default="even", help="which to keep (%(default)s)")
    data.add_argument("--tokens", type=options.count, default=0, help="tokens of each call to make statistics of; 0: all")
    data.add_argument(
        "--threads", type=options.positive, default=1, help="of the CPU to sample with; bytes depend on it (%(default)s)"
    )
    data.add_argument("--prompts", type=options.path, metavar="FILE", help="text file, one prompt a line (the built-in list)")
    data.add_argument("--height", type=options.positive, help="of a sample, in pixels")
    data.add_argument("--width", type=options.positive, help="of a sample, in pixels")
    data.add_argument("--frames", type=options.positive, help="of a clip")


def run(args: argparse.Namespace) -> int:
    from quantdit.compiling import work_folder
    from quantdit.compiling.compile import FINETUNING, LOADING, SAMPLING, calibrate
    from quantdit.inspection import allocation

    recipe = args.recipe or args.bits
    named = from_bits(args.bits, args.method).name.replace(" ", "-") if args.bits is not None else args.recipe.stem
    output = args.output or Path(f"{Path(args.model).resolve().name}-{named}")
    given = {key: getattr(args, key) for key in (*SAMPLING, "weight_format", *FINETUNING, *LOADING)}
    with work_folder.clear_disk_errors(output):
        if args.prompts:
            work_folder.check_apart(output, {"prompts": (args.prompts,)})
            given["prompts"] = options.read_prompts(args.prompts)
        result = calibrate(
            args.model,
            recipe,
            output,
            method=args.method,
            size_budget=args.size_budget,
            max_output_error=args.max_output_error,
            components=args.components,
            encoder_bits=args.encoder_bits,
            attention=args.attention,
            steps_plan=args.steps_plan,
            resume=args.resume,
            overwrite=args.overwrite,
            **given,
        )
    _print(result)
    if result.allocation is not None:
        print(allocation.summary(result.allocation))
    return 0


def _print(result: CompileResult) -> None:
    """Print what came of a run in a line, after what else a user must know of it."""
    from quantdit.compiling.report import REPORT

    if result.warning is not None:
        print(f"quantdit: warning: {result.warning}", file=sys.stderr)
    if result.already_finished:
        print(f"{result.output} is finished already, by a run of the same settings; --overwrite calibrates again")
    kind, error = result.mean_error()
    dense = f", {result.dense_layers} left dense" if result.dense_layers else ""
    print(
        f"{result.output}: {len(result.layers)} layers quantized{dense},"
        f" {result.size['bits_per_weight']:.2f} bits a weight, {result.size['file_bytes'] / 1e6:.2f} MB,"
        f" mean {kind} {error:.4f}, {sum(result.seconds.values()):.0f} s, at most"
        f" {result.memory['peak_bytes'] / 2**30:.1f} GiB of memory; report in {result.output / REPORT}"
    )
    for part, error in (result.model_rel_rmse_together or {}).items():
        alone = (result.model_rel_rmse_of_parts or {}).get(part)
        beside = "" if alone is None else f", {alone:.4f} on embeddings in full precision"
        print(f"{part}: error of its output on the quantized text encoders' embeddings {error:.4f}{beside}")
    _print_steps(result)
    _print_rest(result)


def _print_steps(result: CompileResult) -> None:
    """Print which step plan the output has, and what it costs."""
    if result.step_plan is None or (best := result.step_plan["chosen"]) is None:
        return
    computed, count = next(iter(result.step_plan["computed"].values())), result.step_plan["asked"]["count"]
    fewer = result.step_plan["fewer_steps"]
    print(
        f"step plan: {len(computed)} of {count} steps computed, the others forecast ({best['forecast']}): {best['psnr']:.1f} dB"
        f" from every step; {fewer['steps']} steps without a plan: {fewer['psnr']:.1f} dB"
    )


def _print_rest(result: CompileResult) -> None:
    """Print what the pipeline's other components take, and how to quantize more of them."""
    from quantdit.pipelines.components import ENCODERS

    folders = sorted(path for path in result.output.iterdir() if path.is_dir() and path.name not in result.blocks)
    sizes = {folder.name: sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in folders}
    rest = [f"{name} {size / 1e6:,.2f} MB" for name, size in sizes.items() if size]
    advice = "; --components all quantizes text encoders, too" if any(sizes.get(name) for name in ENCODERS) else ""
    _print_components(result)
    if rest:
        print(f"the rest of the pipeline, as it was: {', '.join(rest)}{advice}")
    if "vae" in sizes:
        from quantdit.benchmarks.vae_advice import vae_advice

        sampling = result.provenance["calibration"]
        small = [sum(p.stat().st_size for p in (result.output / part).glob("*.safetensors")) for part in result.blocks]
        largest = max([*small, *(size for name, size in sizes.items() if name != "vae")])
        if said := vae_advice(result.output, {name: sampling.get(name) for name in ("height", "width", "frames")}, largest):
            print(said)


def _print_components(result: CompileResult) -> None:
    """Print what each quantized component takes where there are several, and what of it stayed as it was."""
    from quantdit.inspection.left_dense import left_dense
    from quantdit.system import files

    for name in result.blocks:
        dense, size = left_dense(result.output / name), sum(files.tensor_bytes(result.output / name).values())
        stayed = ", ".join(f"{path} {taken / 1e6:,.2f} MB" for path, taken in dense.items())
        if stayed or len(result.blocks) > 1:
            print(f"{name}: {size / 1e6:,.2f} MB{f', of which as it was: {stayed}' if stayed else ''}")


def _methods() -> str:
    """Return a line of each method, and one of the bits that it has where these are not all."""
    width, lines = max(map(len, METHODS)), []
    for name, method in METHODS.items():
        lines.append(f"{name:{width}}  {method.about}")
        lines += [f"{'':{width}}  (arXiv {method.arxiv}; {' '.join(method.bits)})"] if method.arxiv else []
    no_images = "No method needs images: samples come from noise by the model itself, as in VQ4DiT's zero-data calibration."
    return "\n".join([*lines, no_images])
