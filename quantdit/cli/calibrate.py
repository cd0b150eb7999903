"""The command `quantdit calibrate`."""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from quantdit.cli import options
from quantdit.cli.parser import Commands, add_command
from quantdit.recipes.recipe import BEST, METHODS


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
        "--max-drift",
        type=options.number,
        metavar="ERROR",
        help="choose each layer's weight bits for the smallest size whose model_rel_rmse is at most this (0.05: 5 %%)",
    )
    sub.add_argument("--output", type=options.path, help="folder to write (MODEL-BITS, here)")
    whose = sub.add_argument_group("whose method makes a recipe of --bits", _methods())
    whose.add_argument("--method", metavar="NAME", default=BEST, help="(%(default)s)")


def _add_weights(sub: argparse.ArgumentParser) -> None:
    vectors = sub.add_argument_group("weights and how they are calibrated on the outputs of blocks (VQ4DiT)")
    vectors.add_argument(
        "--weight-format",
        choices=("table", "vq", "ssvq", "trellis"),
        help="with --bits: level tables, codebooks of vectors, these with signs split off, or trellis codes (w2, w3: trellis,"
        " else table)",
    )
    vectors.add_argument(
        "--calibration-steps",
        type=options.count,
        metavar="N",
        help="optimizer steps, of each block or end to end (w2: 300, vq4dit: 500, else 0)",
    )
    vectors.add_argument("--calibration-mode", choices=("block", "end-to-end"), help="a block at a time, or all at once (block)")
    vectors.add_argument("--candidates", type=options.positive, help="codewords that each sub-vector may choose among (2; w2: 1)")
    vectors.add_argument("--initial-ratios", choices=("distance", "uniform"), help="of the candidates (distance)")


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
    data.add_argument("--timesteps", type=options.count, default=0, help="of the steps, how many to keep; 0: all")
    data.add_argument("--timestep-choice", choices=("even", "salience"), default="even", help="which to keep (%(default)s)")
    data.add_argument("--tokens", type=options.count, default=0, help="tokens of each call to make statistics of; 0: all")
    data.add_argument("--prompts", type=options.path, metavar="FILE", help="text file, one prompt a line (the built-in list)")
    data.add_argument("--height", type=options.positive, help="of a sample, in pixels")
    data.add_argument("--width", type=options.positive, help="of a sample, in pixels")
    data.add_argument("--frames", type=options.positive, help="of a clip")


def run(args: argparse.Namespace) -> int:
    from quantdit.compiling import work_folder
    from quantdit.compiling.compiler import ALREADY, REPORT, calibrate
    from quantdit.inspection import allocation
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
        prompts = options.read_prompts(args.prompts) if args.prompts else []
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
        print(allocation.summary(report["allocation"]))
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
    from quantdit.models.known_models import ALIASES, locate

    if args.random_weights and (args.model not in ALIASES or not ALIASES[args.model].hub):
        raise ValueError(f"--random-weights needs a known model that is not embedded, got {args.model!r}; see quantdit models")
    locate(args.model)


def _open(args: argparse.Namespace, scratch: Path | None):
    """Return the pipeline to calibrate, or its bare transformer, and its source."""
    from dataclasses import replace

    from quantdit.checkpoints.random_weights import open_scratch, write_random_transformer
    from quantdit.models.known_models import ALIASES, transformer_config
    from quantdit.pipelines.pipeline import load_pipeline

    options.quiet()
    if scratch is None:
        return load_pipeline(args.model, device=args.device, weights=args.weights, memory_budget=args.memory_budget)
    open_scratch(scratch, {"model": args.model, "seed": args.seed})
    for number, part in enumerate(ALIASES[args.model].transformers):
        write_random_transformer(transformer_config(args.model), scratch / part, args.seed + number)
    pipeline, source = load_pipeline(args.model, device=args.device, weights=scratch, memory_budget=args.memory_budget)
    return pipeline, replace(source, random_weights=True)


def _settings(args: argparse.Namespace, pipeline: object, prompts: list[str]):
    """Return what is sampled: what the user said, else what suits the model, else the defaults."""
    from quantdit.models.known_models import ALIASES
    from quantdit.pipelines.pipeline import BareTransformer
    from quantdit.pipelines.sampling import SIZES, Settings, takes

    given = {
        key: getattr(args, key) for key in ("samples", "steps", "guidance", "seed", "timesteps", "timestep_choice", "tokens")
    }
    given |= {size: getattr(args, size) for size in SIZES}
    if prompts:
        given["prompts"] = tuple(prompts)
    wanted = {}
    if args.model in ALIASES:
        known = ALIASES[args.model].cpu if args.device == "cpu" else ALIASES[args.model].gpu
        wanted = {"samples": known.prompts, "steps": known.steps, "guidance": known.guidance}
        wanted |= {size: getattr(known, size) for size in SIZES if takes(pipeline, size)}
        wanted |= {"latent": known.latent} if isinstance(pipeline, BareTransformer) else {}
    return Settings(**{**wanted, **{key: value for key, value in given.items() if value is not None}})
