"""Files of a model folder: JSON, and weights in one safetensors file or in shards. Atomic writes, hostile reads."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
ENCODER_WEIGHTS = "model.safetensors"  # of transformers
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 2**30
JSON_BYTES = 2**28  # more than any index, config or report has
# What diffusers and transformers call a component's weights, or the index of their shards, plain or of a variant such as fp16.
_STORED = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?![\w-]*-of-\d)(?P<file>[\w-]+))?\.safetensors"
    r"|(?:diffusion_pytorch_)?model\.safetensors\.index(?:\.(?P<index>[\w-]+))?\.json"
)
_SHARD = re.compile(r"(?:diffusion_pytorch_)?model(?:\.[\w-]+)?-\d+-of-\d+\.safetensors")


class Advice(UserWarning):
    """A warning of ours, one line that says what to do; the command line prints it as such."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, with the file, the tensor, what was expected and what to do."""


def check_path(what: str, given: object, expected: str = "a path") -> str:
    """Return a path, or a model's name, as text.

    Args:
        what: the name of the argument.
        given: what the user gave for it.
        expected: what it takes, in words.

    Raises:
        ValueError: it is neither text nor a path, or empty.
    """
    if not isinstance(given, str | os.PathLike):
        raise ValueError(f"{what} is a {type(given).__name__}, expected {expected}")
    if not (text := os.fspath(given)):
        raise ValueError(f"{what} is empty, expected {expected}; . is the folder that you are in")
    return text


def check_regular(path: Path) -> None:
    """Refuse what is there but is no regular file: reading a pipe or a device may never end.

    Raises:
        CheckpointError: it is a folder, a pipe, a device, or nothing that the system can look at.
        FileNotFoundError: it is not there.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long or holds a NUL
        raise CheckpointError(f"{path} cannot be read: {error}; copy the whole folder again") from error
    if not regular:
        raise CheckpointError(f"{path} is no regular file; copy the whole folder again")


def open_weights(path: Path):
    """Open a safetensors file for reading.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        check_regular(path)
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; copy the whole folder, or calibrate again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite; also of float8, which torch does not test."""
    return bool(torch.isfinite(tensor.float() if is_float8(tensor) else tensor).all())


def is_float8(tensor: Tensor) -> bool:
    """Return whether a tensor is one of the float8 types."""
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a source's weight or bias with NaN or infinite entries.

    Raises:
        CheckpointError: naming the layer.
    """
    if not tensor.is_floating_point() or is_finite(tensor):
        return
    count = int((~torch.isfinite(tensor.float())).sum())
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

    A folder without plain weights is read by its variant.

    Raises:
        CheckpointError: an index that is no table of file names in this folder, or several variants.
    """
    variant, name = variant_of(folder), weights_name(folder)
    one, many = (_of_variant(each, variant) for each in (name, f"{name}.index.json"))
    if not (folder / many).exists():
        return [folder / one]
    table = read_json(folder / many).get("weight_map")
    names = set(table.values()) if isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) else set()
    if not names or not all(_is_plain(name) and name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{folder / many}: weight_map must name a safetensors file of this folder for each tensor")
    return [folder / name for name in sorted(names)]


def weights_name(folder: Path) -> str:
    """Return what the weights in a folder are called: as transformers calls them if such are there and none of diffusers."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any(name.startswith("diffusion_pytorch_model") for name in names):
        return WEIGHTS
    return ENCODER_WEIGHTS if any(is_weights(name) or name.startswith("pytorch_model") for name in names) else WEIGHTS


def variant_of(folder: Path) -> str | None:
    """Return the variant, such as `fp16`, that the weights of a pipeline's component are stored as; None for plain ones.

    Raises:
        CheckpointError: there are several and none is plain.
    """
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    found = {m["file"] or m["index"] for name in names if (m := _STORED.fullmatch(name))}
    if None in found or not found:
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds its weights as the variants {', '.join(sorted(found))} and none as"
            f" {weights_name(folder)}; leave one of them in the folder"
        )
    return found.pop()


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds a component's weights, whole or as a shard, or is the index of its shards."""
    return _STORED.fullmatch(name) is not None or _SHARD.fullmatch(name) is not None


def _of_variant(name: str, variant: str | None) -> str:
    """Return what diffusers calls the variant of a file: the last ending stays."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _is_plain(name: str) -> bool:
    """Return whether this is the name of a file in a folder, not a path out of it, and fit to be printed."""
    return Path(name).name == name and name.isprintable() and len(name.encode()) < 256


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return in which file of a model folder each tensor lies.

    Raises:
        CheckpointError: a missing or damaged file, or a tensor in two files.
    """
    return tensors_in(weight_files(folder))


WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
WIDTHS |= dict.fromkeys(("I8", "U8", "F8_E4M3", "F8_E5M2", "BOOL"), 1)


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        path: of the file.
        dtype: as safetensors names it, `F32`.
        shape: of the tensor.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(paths: Iterable[Path]) -> dict[str, Stored]:
    """Return what the headers of these files say of each tensor.

    Raises:
        CheckpointError: a missing or damaged file, or a tensor in two files.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        with open_weights(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key in found:
                    raise CheckpointError(f"{path}: tensor {key} is in {found[key].path.name} too; copy the folder again")
                stored = file.get_slice(key)
                found[key] = Stored(path, stored.get_dtype(), tuple(stored.get_shape()))
    return found


def tensors_in(paths: Iterable[Path]) -> dict[str, Path]:
    """Return in which of these files each tensor lies.

    Raises:
        CheckpointError: as `stored_tensors`.
    """
    return {key: stored.path for key, stored in stored_tensors(paths).items()}


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of each tensor in the weight files of a model folder, from their headers.

    Raises:
        CheckpointError: as `stored_tensors`.
    """
    return {key: math.prod(t.shape) * WIDTHS[t.dtype] for key, t in stored_tensors(weight_files(folder)).items()}


def write_tensors(
    folder: Path,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    metadata: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
    *,
    weights: str = WEIGHTS,
) -> list[Path]:
    """Write tensors into a model folder, in shards of about `shard_bytes`, with an index where there are several.

    Args:
        folder: what it holds of earlier weights is removed.
        names: of the tensors.
        read: returns one of them; no more than a shard is in memory at a time.
        metadata: one entry at most, since safetensors writes several in no fixed order.
        shard_bytes: a shard is closed once it holds that much.
        weights: name of the one file.

    Raises:
        OSError: the folder cannot be written.
    """
    stem = weights.removesuffix(".safetensors")
    for old in (*folder.glob(f"{stem}*.safetensors*"), *folder.glob("*.part")):
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
    paths = [folder / weights]
    if len(shards) > 1:
        paths = [folder / f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        table = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
        write_json(
            folder / f"{weights}.index.json",
            {"metadata": {"total_size": total} | metadata, "weight_map": dict(sorted(table.items()))},
        )
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


def read_json(path: Path, finite: bool = True) -> dict:
    """Read a JSON object, strictly: no NaN, no infinite number, no key twice in a table.

    Args:
        path: of the file.
        finite: refuse NaN and infinities. False where the caller looks at the numbers: diffusers writes -Infinity into the
            configs of some schedulers.

    Raises:
        CheckpointError: missing, unreadable, or not an object.
    """
    try:
        check_regular(path)
        if path.stat().st_size > JSON_BYTES:
            raise ValueError(f"it has more than {JSON_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        number = _finite if finite else float
        content = json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=_table)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: this is no whole diffusers model folder; copy the folder again, or give one that save_pretrained"
            " or quantdit calibrate wrote"
        ) from error
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _table(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"key {twice!r:.80} is there twice")
    return table


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
