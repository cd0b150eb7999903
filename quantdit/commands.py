"""Commands as functions: what `quantdit generate` and `quantdit export` do, for Python."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from quantdit import pipeline, progress
from quantdit.evaluation.clips import SUFFIXES, require_suffix, write_clips
from quantdit.evaluation.picture import side_by_side
from quantdit.evaluation.places import require_file
from quantdit.pipeline import Sampling, as_list, check_options, dtype_of, load_pipeline, makes_clips, sampling_arguments

IMAGES, CLIPS = 40, 8  # made where no number and no prompts are given
IMAGE_COLUMNS, CLIP_COLUMNS = 10, 4


def generate(
    model: str | Path,
    output: str | Path,
    columns: int | None = None,
    device: str = "cpu",
    onnx: Sequence[str | Path] = (),
    samples: int | None = None,
    dtype: str = "float32",
    accept_config: bool = False,
    **options: object,
) -> Tensor:
    """Sample images or clips from a model, full precision or quantized, and write a picture of them.

    Args:
        model: name, hub id or folder.
        output: file to write: PNG for images; .webp, .gif or .mp4 for clips, or .png for rows of their frames.
        columns: samples in a row; None: 10 images or 4 clips.
        device: torch device to sample on.
        onnx: graphs that `quantdit export --to onnx` wrote from this folder; they compute in the transformer's place.
        samples: how many; None: one of each prompt, or 40 images or 8 clips without prompts.
        dtype: name in `pipeline.DTYPES` of the dtype of everything that is not quantized.
        accept_config: load a quantized model although its config or its scheduler's config was changed since it was written.
        options: of `pipeline.Sampling`: seed, steps, guidance, prompts, classes, negative_prompt, height, width, frames, batch.

    Returns:
        Images `[n, c, h, w]` or clips `[n, f, c, h, w]`, float32 in [-1, 1].

    Raises:
        ValueError: an option that Sampling does not have, or that the pipeline does not take; the model cannot be loaded, or the
            output cannot be written.
    """
    *own, _ = inspect.signature(generate).parameters
    check_options("generate", options, [*own, *(each.name for each in fields(Sampling) if each.name not in own)])
    output = Path(output)
    require_file(output)
    if output.suffix.lower() not in (*SUFFIXES, ""):
        require_suffix(output)
    for path in map(Path, onnx):
        if not path.is_file():
            raise ValueError(f"{path}: no such graph; quantdit export --to onnx writes it")
    loaded_in = dtype_of(dtype)
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}, expected at least 1")
    progress.say(f"loading {model}")
    made_by, source = load_pipeline(str(model), loaded_in, device, accept_config=accept_config)
    clips = makes_clips(made_by)
    _check_suffix(output, clips)
    for path in onnx:
        from quantdit.exporters.onnx_session import use_graph

        use_graph(made_by, source, Path(path))
    seed, steps = options.pop("seed", 0), options.pop("steps", 20)
    prompts, classes = as_list(options.get("prompts")), options.get("classes")
    count = samples if samples is not None else len(prompts) if prompts else CLIPS if clips else IMAGES
    made = pipeline.generate(made_by, count, seed, steps, dtype=dtype, **options)
    output.parent.mkdir(parents=True, exist_ok=True)
    if clips:
        labels = sampling_arguments(made_by, count, prompts, classes)["prompt"]
        write_clips(made, labels, output, columns or CLIP_COLUMNS)
    else:
        side_by_side([(f"{source.name}, seed {seed}, {steps} steps", made)], columns or IMAGE_COLUMNS, output)
    return made


def _check_suffix(output: Path, clips: bool) -> None:
    """Refuse a suffix before minutes go into sampling."""
    if clips:
        require_suffix(output)
    elif output.suffix.lower() in SUFFIXES and output.suffix.lower() != ".png":
        raise ValueError(f"{output}: this model makes images, which are written as PNG; choose a name that ends in .png")


def export(folder: str | Path, to: str, output: str | Path, **options: object) -> object:
    """Write a quantized folder in another form: `to` is `dense`, `comfyui` or `onnx`.

    Args:
        folder: as `quantdit calibrate` writes it.
        to: the form.
        output: folder for dense, `.safetensors` file for comfyui, `.onnx` file for onnx.
        options: `accept_config`; for dense a torch `dtype`; for onnx those of `exporters.to_onnx.to_onnx`.

    Returns:
        What the exporter returns: for comfyui how many layers of each format, for onnx what was measured, for dense nothing.

    Raises:
        ValueError: an unknown form, an option that its exporter does not have, or a folder that cannot be written in it.
    """
    from quantdit.exporters.to_comfyui import to_comfyui
    from quantdit.exporters.to_dense import to_dense
    from quantdit.exporters.to_onnx import to_onnx

    writers = {"dense": to_dense, "comfyui": to_comfyui, "onnx": to_onnx}
    if to not in writers:
        raise ValueError(f"cannot export to {to!r}; use one of {', '.join(writers)}")
    _, _, *known = inspect.signature(writers[to]).parameters
    check_options(f"export to {to}", options, known)
    return writers[to](Path(folder), Path(output), **options)
