"""Files of a diffusers model folder: JSON, and weights in one safetensors file or in shards. Atomic writes, hostile reads."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 2**30


class Advice(UserWarning):
    """A warning of ours, one line that says what to do; the command line prints it as such."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, with the file, the tensor, what was expected and what to do."""


def open_weights(path: Path):
    """Open a safetensors file for reading.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; copy the whole folder, or calibrate again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a source's weight or bias with NaN or infinite entries.

    Raises:
        CheckpointError: naming the layer.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        layer, _, kind = name.rpartition(".")
        raise CheckpointError(f"layer {layer}: {count} values of its {kind} are NaN or infinite; the source is damaged")


def narrowest(t: Tensor) -> Tensor:
    """Return a float tensor in the narrowest of float16, bfloat16, float32 that holds it exactly; others as they are."""
    if not t.is_floating_point():
        return t
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(t.to(dtype).to(t.dtype), t):
            return t.to(dtype)
    return t.float()


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder in order: one, or the shards that its index names.

    Raises:
        CheckpointError: an index that is no table of file names in this folder.
    """
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    table = read_json(folder / INDEX).get("weight_map")
    names = set(table.values()) if isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) else set()
    if not names or not all(Path(name).name == name and name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{folder / INDEX}: weight_map must name a safetensors file of this folder for each tensor")
    return [folder / name for name in sorted(names)]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return in which file of a model folder each tensor lies.

    Raises:
        CheckpointError: a missing or damaged file, or a tensor in two files.
    """
    return tensors_in(weight_files(folder))


def tensors_in(paths: Iterable[Path]) -> dict[str, Path]:
    """Return in which of these files each tensor lies.

    Raises:
        CheckpointError: a missing or damaged file, or a tensor in two files.
    """
    found: dict[str, Path] = {}
    for path in paths:
        with open_weights(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key in found:
                    raise CheckpointError(f"{path}: tensor {key} is in {found[key].name} too; copy the folder again")
                found[key] = path
    return found


WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "BOOL": 1}


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of each tensor in the weight files of a model folder, from their headers.

    Raises:
        CheckpointError: as `tensor_files`.
    """
    found = {}
    for path in weight_files(folder):
        with open_weights(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                stored = file.get_slice(key)
                found[key] = math.prod(stored.get_shape()) * WIDTHS[stored.get_dtype()]
    return found


def write_tensors(
    folder: Path, names: Iterable[str], read: Callable[[str], Tensor], metadata: dict[str, str], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors into a model folder, in shards of about `shard_bytes`, with an index where there are several.

    Args:
        folder: what it holds of earlier weights is removed.
        names: of the tensors.
        read: returns one of them; no more than a shard is in memory at a time.
        metadata: one entry at most, since safetensors writes several in no fixed order.
        shard_bytes: a shard is closed once it holds that much.

    Raises:
        OSError: the folder cannot be written.
    """
    for old in (*folder.glob("diffusion_pytorch_model*.safetensors*"), *folder.glob("*.part")):
        old.unlink()
    shards: list[list[str]] = []
    tensors: dict[str, Tensor] = {}
    total = size = 0

    def close() -> None:
        nonlocal tensors, size
        part = folder / f"{len(shards)}.part"
        save_file(tensors, part, metadata=metadata)
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        fsync(part)
        shards.append(list(tensors))
        tensors, size = {}, 0

    for name in sorted(names):
        tensor = read(name).detach().cpu().contiguous()
        if tensors and size + tensor.nbytes > shard_bytes:
            close()
        tensors[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    close()
    paths = [folder / WEIGHTS]
    if len(shards) > 1:
        stem = WEIGHTS.removesuffix(".safetensors")
        paths = [folder / f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        table = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total} | metadata, "weight_map": dict(sorted(table.items()))})
    for number, path in enumerate(paths):
        os.replace(folder / f"{number}.part", path)
    return paths


def digest(folder: Path) -> str:
    """Return the sha256 of a model folder's weights."""
    return digest_of(weight_files(folder))


def digest_of(paths: Iterable[Path]) -> str:
    """Return the sha256 of a file, or of the sha256s of several."""
    sums = [sha256(path) for path in paths]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically, indented, newline at the end."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    fsync(part)
    os.replace(part, path)


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: this is no diffusers model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def read_text(path: Path) -> str:
    """Return what a person wrote into a text file: UTF-8, with or without a byte order mark, line ends made newlines.

    Raises:
        ValueError: not UTF-8, or no text.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text (it has zero bytes, as UTF-16 does); save it as UTF-8")
    return text


def fsync(path: Path) -> None:
    """Have the file's content on the disk before anything else is done."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
