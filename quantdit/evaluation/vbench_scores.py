"""VBench's scores by its own package, which runs in an environment of its own, because it pins old versions.

(Huang et al. 2023, arXiv 2311.17982; PyPI `vbench` 0.1.5.) The clips of both models are written as files, the package scores
those dimensions that it takes for any clip and whose networks are there (vbench_dimension.py), and what it says is put beside the
proxies. A total is made only of all official dimensions that belong to it, with VBench's own normalisation (its
scripts/constant.py).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from quantdit.evaluation.metrics.video import as_bytes, temporal_flickering
from quantdit.evaluation.report.clips import FRAMES_A_SECOND
from quantdit.evaluation.samples import Samples
from quantdit.system import progress
from quantdit.system.optional_import import require

FLICKERING = "temporal_flickering"
SCRIPT = Path(__file__).with_name("vbench_dimension.py")
# What VBench's mode for any clip takes, and the networks of each as VBench keeps them; temporal_flickering is computed here, by
# its definition.
WEIGHTS = {
    "subject_consistency": ("dino_model/dino_vitbase16_pretrain.pth", "dino_model/facebookresearch_dino_main/hubconf.py"),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
}
# Smallest and largest score of each dimension, by which VBench maps it to 0..1.
QUALITY = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    FLICKERING: (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
WEIGHT = {"dynamic_degree": 0.5}  # of all others: 1
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
RESULTS = "clips_eval_results.json"
_ADVICE = "make one with python3.10 -m venv DIR; DIR/bin/pip install vbench, and give DIR"
# RAFT halves an eighth of a frame three times, and interpolates in what is left: below, it fails or finds nothing that moves.
RAFT, RAFT_SIDE = "dynamic_degree", 128


def totals(scores: Mapping[str, float]) -> dict[str, float]:
    """Return `quality_score`, `semantic_score` and `total_score`, each only if all dimensions that it is made of are there."""
    found = {}
    for name, table in (("quality_score", QUALITY), ("semantic_score", SEMANTIC)):
        if table.keys() <= scores.keys():
            weights = {d: WEIGHT.get(d, 1.0) for d in table}
            mapped = {d: (scores[d] - low) / (high - low) for d, (low, high) in table.items()}
            found[name] = sum(weights[d] * mapped[d] for d in table) / sum(weights.values())
    if len(found) == 2:
        parts = QUALITY_WEIGHT * found["quality_score"] + SEMANTIC_WEIGHT * found["semantic_score"]
        found["total_score"] = parts / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return found


def check(environment: Path | None, weights: Path | None) -> None:
    """Refuse an environment or a folder of weights that will not do, before minutes are spent on sampling.

    Raises:
        ValueError: which, and what to do.
        ModuleNotFoundError: clips cannot be written, for want of PyAV.
    """
    if environment is None:
        if weights is not None:
            raise ValueError("--vbench-weights goes with --vbench DIR, the environment whose package runs with them")
        return
    done = subprocess.run(
        [_python(environment), "-I", "-c", "from importlib.metadata import version; print(version('vbench'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"--vbench {environment}: this environment has no vbench; {_ADVICE}")
    if weights is not None:
        dimensions(weights)
    require("av", "video")


def _python(environment: Path) -> str:
    """Return the environment's own Python.

    Raises:
        ValueError: there is none.
    """
    path = environment.absolute() / "bin" / "python"  # not resolved: what it links to knows nothing of the environment
    if not os.access(path, os.X_OK):
        raise ValueError(f"--vbench {environment}: no environment, which would hold bin/python; {_ADVICE}")
    return str(path)


def dimensions(weights: Path | None) -> list[str]:
    """Return the dimensions whose networks are in a folder; all of them if VBench is to fetch what it lacks (None).

    Raises:
        ValueError: no dimension's are there; says which files it takes.
    """
    if weights is None:
        return list(WEIGHTS)
    found = [name for name, paths in WEIGHTS.items() if all((weights / path).is_file() for path in paths)]
    if not found:
        wanted = "; ".join(f"{name}: {', '.join(paths)}" for name, paths in WEIGHTS.items())
        raise ValueError(f"--vbench-weights {weights}: no dimension's networks are there, as VBench keeps them ({wanted})")
    return found


def run(environment: Path, weights: Path | None, models: Mapping[str, Samples], folder: Path) -> dict:
    """Return VBench's scores of the clips of each model, and the totals that they make; no dynamic degree of small clips.

    Args:
        environment: that has the package.
        weights: of its networks; where it keeps them itself, and fetches what it lacks, if None.
        models: their samples by name.
        folder: for the clips and what the package writes; replaced.

    Raises:
        ValueError: the samples are no clips, or the package failed; with the last line it wrote.
    """
    found = {}
    for name, samples in models.items():
        if samples.images.ndim != 5:
            raise ValueError("--vbench scores clips, and this model makes images")
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        (place / "videos").mkdir(parents=True)
        numbers: dict[str, int] = {}
        for clip, prompt in zip(samples.images, samples.prompts, strict=True):
            numbers[prompt] = numbers.get(prompt, -1) + 1
            _write_clip(clip, place / "videos" / f"{_file_name(prompt)}-{numbers[prompt]}.mp4")
        scores = {FLICKERING: sum(temporal_flickering(c) for c in samples.images) / len(samples.images)}
        small = min(samples.images.shape[-2:]) < RAFT_SIDE
        asked = [d for d in dimensions(weights) if not (small and d == RAFT)]
        with progress.bar(len(asked), f"VBench, {name}", "dimension") as bar:
            for dimension in asked:
                scores[dimension] = _score(environment, weights, dimension, place)
                bar.update(1)
        found[name] = {k: float(f"{v:.6g}") for k, v in (scores | totals(scores)).items()}
    return found


def _score(environment: Path, weights: Path | None, dimension: str, place: Path) -> float:
    results = place / dimension
    results.mkdir()
    command = [_python(environment), "-I", str(SCRIPT), str((place / "videos").resolve()), str(results.resolve()), dimension]
    command += [str(weights.resolve())] if weights is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ValueError(f"vbench failed at {dimension} with exit code {done.returncode}: {said}")
    path = results / RESULTS
    try:
        value = json.loads(path.read_text())[dimension][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not the results that VBench 0.1.5 writes ({type(error).__name__})") from error
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{path}: the score of {dimension} is {value!r}, expected a number")
    return float(value)


def _file_name(prompt: str) -> str:
    """Return a prompt as part of a file's name."""
    return re.sub(r"[^\w ,.'-]", "_", prompt)[:150]


def _write_clip(clip: Tensor, path: Path) -> None:
    av = require("av", "video")
    frames = as_bytes(clip if clip.shape[1] == 3 else clip.expand(-1, 3, -1, -1))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=FRAMES_A_SECOND)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": "1"} if stream.codec_context.name == "libx264" else {}
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
