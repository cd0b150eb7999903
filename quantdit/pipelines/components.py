"""The transformers and text encoders of a pipeline: their names, which are meant, and what a model_index.json lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.libraries import DIFFUSERS, TRANSFORMERS
from quantdit.system import files

# What a pipeline calls its transformers; Wan 2.2 has two experts.
TRANSFORMER_NAMES = ("transformer", "transformer_2")
# And its text encoders, models of transformers.
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
COMPONENTS = (*TRANSFORMER_NAMES, *ENCODERS)
EVERYTHING = "all"  # transformers and text encoders


def components_of(folder: Path, index: dict) -> dict[str, tuple[str, str]]:
    """Return library and class of each component that a model_index.json names, having looked at their files.

    Raises:
        CheckpointError: a name that leaves the folder, a config that is no JSON or would build forever, or what is no file where
            one belongs.
    """
    where, found = folder / "model_index.json", {}
    for name, entry in index.items():
        # Other lists are settings of the pipeline; [null, null] is a component that it does without.
        if name.startswith("_") or not isinstance(entry, list) or [type(word) for word in entry] != [str, str]:
            continue
        if not name.isidentifier():
            raise files.CheckpointError(f"{where}: component {name!r:.80} has no name of a folder; copy the folder again")
        found[name] = tuple(entry)
    for path in sorted((*folder.iterdir(), *(path for name in found for path in _inside(folder / name)))):
        if path.exists() and not path.is_dir():
            files.check_regular(path)
    for name in found.keys() - set(TRANSFORMER_NAMES):
        for path in _inside(folder / name):
            if path.name == "config.json":
                weights = (file for file in _inside(folder / name) if file.suffix == ".safetensors")
                library = DIFFUSERS if found[name][0] == DIFFUSERS.name else TRANSFORMERS
                checkpoint.check_numbers(files.read_json(path, finite=False), sum(map(_tensors, weights)), path, library.largest)
    if (path := folder / checkpoint.SCHEDULER).exists():
        checkpoint.check_numbers(files.read_json(path, finite=False), 0, path)
    return found


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _tensors(path: Path) -> int:
    with files.open_weights(path) as file:
        return len(file.keys())


def named_components(asked: str | Sequence[str], known: Sequence[str], model: str) -> tuple[str, ...]:
    """Return which of a pipeline's transformers and text encoders are meant, in the order of `known`.

    Args:
        asked: their names, in a list or with commas between; `transformer` means all transformers, `all` means `known`.
        known: those that there are.
        model: what the error calls it.

    Raises:
        ValueError: a name that is none of them, or no name; says which there are.
    """
    words = [word.strip() for word in asked.split(",") if word.strip()] if isinstance(asked, str) else list(asked)
    meant = {name: [name] for name in known}
    meant |= {TRANSFORMER_NAMES[0]: [name for name in known if name in TRANSFORMER_NAMES], EVERYTHING: list(known)}
    if wrong := next((word for word in words if word not in meant), None):
        raise ValueError(f"{model} has no component {wrong!r} that can be quantized; it has {', '.join(known)}, or {EVERYTHING}")
    if not words:
        raise ValueError(f"components is empty; {model} has {', '.join(known)}, or {EVERYTHING}")
    chosen = {name for word in words for name in meant[word]}
    return tuple(name for name in known if name in chosen)
