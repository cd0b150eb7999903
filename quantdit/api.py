"""Commands as functions: what `quantdit generate` and `quantdit export` do, for Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from quantdit.evaluation.report.clips import require_writer, write_clips
from quantdit.evaluation.report.picture import side_by_side
from quantdit.pipelines.arguments import check_options, checked_numbers, dtype_of
from quantdit.pipelines.call_arguments import makes_clips, sampling_arguments
from quantdit.pipelines.generate import Sampling
from quantdit.pipelines.generate import generate as sample_from
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.pipelines.source import MODEL, check_quantized
from quantdit.pipelines.step_plans import carried, following
from quantdit.system import files, progress
from quantdit.system.output_places import PICTURES, require_picture, require_suffix

IMAGES, CLIPS = 40, 8  # made where no number and no prompts are given
IMAGE_COLUMNS, CLIP_COLUMNS = 10, 4


class SamplingOptions(TypedDict, total=False):
    """Options of `generate` that `Sampling` explains."""

    seed: int
    steps: int
    guidance: float | None
    prompts: str | Sequence[str] | None
    classes: int | str | Sequence[int | str] | None
    negative_prompt: str | None
    height: int | None
    width: int | None
    frames: int | None
    batch: int


def generate(
    model: str | Path,
    output: str | Path,
    columns: int | None = None,
    device: str = "cpu",
    onnx: str | Path | Sequence[str | Path] = (),
    samples: int | None = None,
    dtype: str | torch.dtype = "float32",
    accept_config: bool = False,
    steps_plan: bool = False,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """Sample images or clips from a model, full precision or quantized, and write a picture of them.

    Args:
        model: name, hub id or folder.
        output: file to write: PNG for images; .webp, .gif or .mp4 for clips, or .png for rows of their frames.
        columns: samples in a row; None: 10 images or 4 clips.
        device: torch device to sample on.
        onnx: graphs that `quantdit export --to onnx` wrote from this folder; they compute in the transformer's place.
        samples: how many; None: one of each prompt, or 40 images or 8 clips without prompts.
        dtype: of everything that is not quantized: torch.float32, torch.bfloat16, torch.float16, or the name of one of them.
        accept_config: load a quantized model although its config or its scheduler's config was changed since it was written.
        steps_plan: follow the step plan that the model carries: compute some of the steps, and forecast the others.
        options: of `Sampling`: seed, steps, guidance, prompts, classes, negative_prompt, height, width, frames, batch.

    Returns:
        Images `[n, c, h, w]` or clips `[n, f, c, h, w]`, float32 in [-1, 1].

    Raises:
        ValueError: an option that Sampling does not have, or that the pipeline does not take; a number that is none; the model
            cannot be loaded, or the output cannot be written or has a suffix that is unknown.
    """
    *own, _ = signature(generate).parameters
    check_options("generate", options, [*own, *(each.name for each in fields(Sampling) if each.name not in own)])
    model, output = files.check_path("model", model, MODEL), Path(files.check_path("output", output))
    require_picture(output)
    graphs = [Path(files.check_path("onnx", path)) for path in ((onnx,) if isinstance(onnx, str | Path) else onnx)]
    for path in graphs:
        if not path.is_file():
            raise ValueError(f"{path}: no such graph; quantdit export --to onnx writes it")
    given: dict[str, Any] = {**options, "dtype": dtype}
    asked = Sampling(**given) if samples is None else Sampling(**given, samples=samples)
    in_a_row = checked_numbers({"columns": columns}, optional=("columns",))["columns"]
    progress.say(f"loading {model}")
    made_by, source = load_pipeline(model, dtype_of(dtype), device, accept_config=accept_config)
    clips = makes_clips(made_by)
    _check_suffix(output, clips)
    for path in graphs:
        from quantdit.exporters.onnx_session import use_graph

        use_graph(made_by, source, path)
    count = asked.samples if samples is not None else len(asked.prompts) if asked.prompts else CLIPS if clips else IMAGES
    settled = asdict(asked)
    del settled["samples"]
    plans = carried(made_by, source.label) if steps_plan else {}
    with following(made_by, plans):
        made = sample_from(made_by, count, **settled)
    output.parent.mkdir(parents=True, exist_ok=True)
    in_a_row = int(in_a_row or (CLIP_COLUMNS if clips else IMAGE_COLUMNS))
    if clips:
        labels = sampling_arguments(made_by, count, asked.prompts, asked.classes)["prompt"]
        write_clips(made, labels, output, in_a_row)
    else:
        side_by_side([(f"{source.name}, seed {asked.seed}, {asked.steps} steps", made)], in_a_row, output)
    return made


def _check_suffix(output: Path, clips: bool) -> None:
    """Refuse a suffix before minutes go into sampling."""
    if clips:
        require_writer(output)
    else:
        require_suffix(output, PICTURES, "images")


@overload
def export(
    folder: str | Path,
    to: Literal["dense"],
    output: str | Path,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    accept_config: bool = False,
) -> None: ...
@overload
def export(folder: str | Path, to: Literal["comfyui"], output: str | Path, *, accept_config: bool = False) -> dict[str, int]: ...
@overload
def export(
    folder: str | Path,
    to: Literal["onnx"],
    output: str | Path,
    *,
    storage: str = "packed",
    verify: bool = True,
    part: str | None = None,
    target: str = "cpu",
    accept_config: bool = False,
) -> dict[str, Any]: ...
def export(folder: str | Path, to: str, output: str | Path, **options: Any) -> dict[str, Any] | None:
    """Write a quantized folder in another form: `to` is `dense`, `comfyui` or `onnx`.

    Args:
        folder: as `quantdit calibrate` writes it.
        to: the form.
        output: folder for dense, `.safetensors` file for comfyui, `.onnx` file for onnx.
        options: `accept_config`; for dense a `dtype`, torch's own or its name; for onnx those of `exporters.to_onnx.to_onnx`.

    Returns:
        dense: None. comfyui: how many layers there are of each format, by its name. onnx: what the graph's metadata hold: which
        sizes may vary (`dynamic`), each layer's format (`layers`) and, unless `verify=False`, how far it is from PyTorch
        (`verified`).

    Raises:
        ValueError: an unknown form, an option that its exporter does not have, or a folder that cannot be written in it.
    """
    from quantdit.exporters.to_comfyui import to_comfyui
    from quantdit.exporters.to_dense import to_dense
    from quantdit.exporters.to_onnx import to_onnx

    writers: dict[str, Callable[..., dict[str, Any] | None]] = {"dense": to_dense, "comfyui": to_comfyui, "onnx": to_onnx}
    if not isinstance(to, str) or to not in writers:
        raise ValueError(f"cannot export to {to!r:.60}; use one of {', '.join(writers)}")
    _, _, *known = signature(writers[to]).parameters
    check_options(f"export to {to}", options, known)
    folder, output = Path(files.check_path("folder", folder)), Path(files.check_path("output", output))
    check_quantized(folder)
    return writers[to](folder, output, **options)
