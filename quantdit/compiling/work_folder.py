"""The work folder of a calibration, `OUTPUT.partial`: begun, resumed, given its final name; and what to do about disk errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from quantdit.checkpoints import checkpoint
from quantdit.pipelines.components import COMPONENTS
from quantdit.system import checksummed_json, files

REPORT = "calibration_report.json"
STATE = "identity.json"
WORK = "work"
FINISHED = "finished"
FILES = "files"  # key of a report: what the run wrote into its output
SHORT = 60  # characters of a value that an error shows; digests have 64
LONGEST_NAME = 240  # bytes; file systems take 255, and the names beside the output are longer than its own

# Files of weights and their indexes; those of them that a pipeline reads: diffusers' own names, without a variant's.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|ckpt|pt|pth|gguf|onnx|onnx_data|msgpack|h5)(\.index(\.[^.]+)?\.json)?")
# What parts of a pipeline are made of: what a folder without a list of its files may hold.
_OF_PART = re.compile(r"[^.].*\.(json|safetensors|model|jinja)|merges\.txt|vocab\.txt")
_PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")


def place_of(output: Path) -> Path:
    """Return the path that is written for an output: the target of a link (the link stays); `.` and `..` as absolute paths."""
    return output.resolve() if output.is_symlink() or output.name in ("", "..") else output


def partial_of(output: Path) -> Path:
    """Return the work folder of an output."""
    place = place_of(output)
    return place.with_name(f"{place.name}.partial")


def check_output(output: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output that cannot be written, or that holds what is not to be replaced.

    Args:
        output: to be written.
        overwrite: it may replace another of quantdit's.
        resume: it may be there already, finished.

    Raises:
        ValueError: a file; a folder that is not empty, and not to be overwritten or not quantdit's; a link to nothing; a folder
            that cannot be renamed; a name that is too long; to be overwritten, but with a file in it that is the user's.
    """
    if output.is_symlink() and not output.exists():
        raise ValueError(f"output {output} is a link to {os.readlink(output)}, which does not exist; make that folder first")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; give a folder")
    place = place_of(output)
    if len(os.fsencode(place.name)) > LONGEST_NAME:
        raise ValueError(f"output {output} has a name of more than {LONGEST_NAME} bytes; choose a shorter one")
    if not output.is_dir():
        return
    if any(output.iterdir()):
        if not overwrite and not resume:
            raise ValueError(f"output {output} is not empty; choose another folder or pass --overwrite")
        if overwrite and not is_ours(output):
            raise ValueError(
                f"output {output} holds something that quantdit did not write, which --overwrite does not replace; choose another"
                " folder, or empty this one"
            )
    # The result takes the folder's name, and the folder itself goes.
    if Path.cwd().is_relative_to(output.resolve()):
        raise ValueError(f"output {output} is, or contains, the folder that this command runs in; name a folder inside it")
    if os.path.ismount(output):
        raise ValueError(f"output {output} is a mount point, which no finished folder can replace; name a folder in it")
    if overwrite:
        check_no_others(output)


def is_ours(folder: Path) -> bool:
    """Return whether quantdit wrote a folder: it says so of a run, or holds a transformer that quantdit quantized."""
    runs = (_known(folder / name) for name in (REPORT, STATE))
    if any({"recipe", "provenance"} <= run.keys() for run in runs):
        return True
    configs = (_known(place / "config.json") for place in (folder, *(folder / part for part in COMPONENTS)))
    quantized = (config.get("quantization_config") for config in configs)
    return any(isinstance(found, dict) and found.get("quant_method") == checkpoint.METHOD for found in quantized)


def check_no_others(folder: Path) -> None:
    """Refuse to replace a folder that quantdit wrote if somebody put a file of their own into it.

    What a calibration wrote is listed in its report. A folder without that list may hold what pipelines are made of.

    Raises:
        ValueError: naming the first such file, or link, which no run writes.
    """
    listed = _known(folder / REPORT).get(FILES)
    if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        wrote = {*listed, REPORT, STATE}.__contains__
    else:
        wrote = _pipelines_own(folder)
    for path in sorted(_entries(folder)):
        if path.is_symlink() or not wrote(path.relative_to(folder).as_posix()):
            raise ValueError(
                f"{path} would be lost: the output takes the place of {folder}, and no calibration wrote this into it; move it"
                " away, or choose another --output"
            )


def _pipelines_own(folder: Path) -> Callable[[str], bool]:
    """Return what tells the files that a pipeline, or a transformer alone, is made of, by their paths in its folder."""
    index = _known(folder / "model_index.json")
    parts = {name for name, entry in index.items() if isinstance(entry, list)}
    alone = {REPORT, STATE, "model_index.json", *((_own_files(index["_class_name"]) or ()) if "_class_name" in index else ())}

    def is_own(path: str) -> bool:
        part, _, name = path.rpartition("/")
        if path in alone:
            return True
        if part in ("", *COMPONENTS):
            return name == "config.json" or files.is_weights(name)
        return part in parts and _OF_PART.fullmatch(name) is not None

    return is_own


def files_in(folder: Path) -> list[str]:
    """Return the paths of all files and links below a folder, relative to it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in _entries(folder))


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, and the links, which are not followed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _entries(path)
        else:
            yield path


def _known(path: Path) -> dict:
    try:
        return files.read_json(path)
    except files.CheckpointError:
        return {}


def check_apart(output: Path, given: Mapping[str, Iterable[Path]]) -> None:
    """Refuse to write where the run reads.

    Args:
        output: of the run.
        given: paths that the run reads, by what they are.

    Raises:
        ValueError: one of them lies in the output or its work folder.
    """
    for target in (place_of(output), partial_of(output)):
        for what, paths in given.items():
            for path in paths:
                if path.resolve().is_relative_to(target.resolve()):
                    raise ValueError(f"the {what} {path} lies in {target}, which this run replaces; choose another --output")


def paths_of(source: Path) -> list[Path]:
    """Return a model's folder, what lies in it and in its folders: links in it may lead elsewhere."""
    return [path for path in (source, *source.glob("*"), *source.glob("*/*")) if path.exists()]


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other processes from an output while the body runs; a process that ends, however it does, holds no lock.

    Raises:
        ValueError: another process holds it.
        OSError: the folder around the output cannot be written.
    """
    place = place_of(output)
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f".{place.name}.lock")
    handle = _hold(path, output)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):  # those that are not empty stay
            for folder in made:
                folder.rmdir()


def _hold(path: Path, output: Path) -> int:
    """Return the locked file's descriptor."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed it in between; then the lock is on a file that nobody else finds.
            if os.path.samestat(os.fstat(handle), path.stat()):
                os.truncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            number = os.pread(handle, 20, 0).decode(errors="replace")
            os.close(handle)
            holder = f"process {number}" if number.isdecimal() else "another process"
            raise ValueError(f"{holder} is writing {output} at this moment; wait for it, or choose another --output") from error
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def open_partial(output: Path, identity: dict, resume: bool, overwrite: bool) -> None:
    """Make the work folder, fresh or holding the blocks of an interrupted run of the same identity.

    Raises:
        ValueError: the output or the work folder holds something else, or a run of another identity.
    """
    check_output(output, overwrite)
    partial = partial_of(output)
    state = partial / STATE
    stored = json.loads(json.dumps(identity))
    if partial.exists() and resume and state.exists():
        if other := differences(_identity(state), identity):
            raise ValueError(
                f"{partial} was begun with another source, recipe or settings: {other}; --resume needs the same, --overwrite"
                " begins again"
            )
        return
    if os.path.lexists(partial):
        begun = partial.is_dir() and not partial.is_symlink()
        if not begun or (not state.exists() and any(p.name != f"{STATE}.part" for p in partial.iterdir())):
            raise ValueError(f"{partial} is where work on {output.name} would go, but holds something else; move it away")
        if not resume and not overwrite and state.exists():
            raise ValueError(f"{partial} holds an interrupted run; pass --resume to go on with it, or --overwrite to begin again")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    checksummed_json.write(state, stored, "")


def differences(before: dict, now: dict) -> str:
    """Name the settings in which the identities of two runs differ, with their values where these are short; or nothing."""
    return ", ".join(_differing(before, json.loads(json.dumps(now))))


def _differing(before: dict, now: dict) -> Iterator[str]:
    for key in [*before, *(key for key in now if key not in before)]:
        was, is_now = before.get(key), now.get(key)
        if key in before and key in now and was == is_now:
            continue
        if isinstance(was, dict) and isinstance(is_now, dict) and key != "recipe":
            yield from _differing(was, is_now)
            continue
        if key == "recipe":
            was, is_now = (str(found.get("name")) if isinstance(found, dict) else found for found in (was, is_now))
        is_short = was != is_now and all(len(str(v)) <= SHORT and not isinstance(v, dict | list) for v in (was, is_now))
        yield f"{key} ({was}, now {is_now})" if is_short else key


def is_finished(folder: Path, identity: dict) -> bool:
    """Return whether a folder holds the complete result of a run of this identity that was killed while it was renamed.

    Raises:
        ValueError: the state file is damaged, or a file of the result was changed since.
    """
    state = folder / STATE
    if not state.exists():
        return False
    content = checksummed_json.read(state, "")
    finished = content.pop(FINISHED, None)
    if finished is None or content != json.loads(json.dumps(identity)):
        return False
    if finished != _result_digest(folder):
        raise ValueError(f"{folder} is not what the interrupted run wrote; {checksummed_json.REMEDY}")
    return True


def _identity(state: Path) -> dict:
    return {k: v for k, v in checksummed_json.read(state, "").items() if k != FINISHED}


def _result_digest(folder: Path) -> str:
    """Return the sha256 of a result: its transformers and all JSON."""
    found = {path for pattern in ("*.json", "*/*.json", *(f"{part}/*" for part in COMPONENTS)) for path in folder.glob(pattern)}
    sums = [f"{path.relative_to(folder)} {files.sha256(path)}" for path in sorted(found - {folder / STATE})]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def rest_of(source: Path, leave: Collection[str]) -> tuple[list[Path], list[Path]]:
    """Return the files of a pipeline's other parts, and the weights among them that it does not read; relative to its folder.

    Args:
        source: the pipeline's folder.
        leave: names in it to leave out, besides hidden ones.

    Raises:
        ValueError: a link that leads out of the model or in a circle, or what is no file.
    """
    index = files.read_json(source / "model_index.json") if os.path.lexists(source / "model_index.json") else None
    parts = None if index is None else {name for name, entry in index.items() if isinstance(entry, list)}
    own = () if index is None else _own_files(index.get("_class_name"))
    found = [path.relative_to(source) for path in _files_in(source, leave)]
    safe = {path.parent for path in found if path.name.endswith(".safetensors") and _PLAIN.fullmatch(path.name)}

    def is_idle(path: Path) -> bool:
        if not _WEIGHTS.fullmatch(path.name):
            return False
        outside = len(path.parts) == 1 or (parts is not None and path.parts[0] not in parts)
        if outside and own is not None:
            return path.name not in own
        return path.parent in safe and not _PLAIN.fullmatch(path.name)

    return [path for path in found if not is_idle(path)], [path for path in found if is_idle(path)]


def _own_files(name: object) -> Collection[str] | None:
    """Return which weights a pipeline class reads besides its components'; None if nobody knows."""
    import diffusers

    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_diffusers = isinstance(cls, type) and cls.__module__.startswith("diffusers.")
    return getattr(cls, "own_files", () if is_diffusers else None)


def _files_in(source: Path, leave: Collection[str]) -> Iterator[Path]:
    """Yield the files below a folder."""
    whole = source.resolve()
    # Files of the hub's cache are links from its snapshots/REVISION into its blobs.
    inside = (whole, *((whole.parents[1] / "blobs",) if whole.parent.name == "snapshots" else ()))
    todo = [path for path in sorted(source.iterdir()) if path.name not in leave and not path.name.startswith(".")]
    while todo:
        path = todo.pop(0)
        if not path.exists():
            raise ValueError(f"{path} is a link to nothing; remove it, or copy the model again")
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(folder) for folder in inside):
            raise ValueError(f"{path} is a link out of the model, to {target}; put a copy in its place, or remove it")
        if path.is_dir():
            # A folder's link is a part that two names share; deeper ones could multiply what is copied without end.
            if path.is_symlink() and (path.parent != source or whole.is_relative_to(target)):
                raise ValueError(f"{path} is a link to the folder {target}; put a copy in its place, or remove it")
            todo += sorted(path.iterdir())
        elif stat.S_ISREG(path.stat().st_mode):
            yield path
        else:
            raise ValueError(f"{path} is neither a file nor a folder; remove it from the model")


def copy_rest(source: Path, partial: Path, leave: Collection[str]) -> list[str]:
    """Copy the pipeline's other parts into the output, except the names in `leave` and weights that the pipeline does not read.

    Returns:
        The files that were copied, relative to their folder.

    Raises:
        ValueError: as `rest_of`.
    """
    wanted, idle = rest_of(source, leave)
    for path in wanted:
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, partial / path)
        files.fsync(partial / path)
    if idle:
        more = f" (and {len(idle) - 3} more)" if len(idle) > 3 else ""
        names = ", ".join(str(path) for path in idle[:3])
        warnings.warn(files.Advice(f"not copied, since the pipeline does not read these weights: {names}{more}"), stacklevel=2)
    return [path.as_posix() for path in wanted]


def publish(partial: Path, output: Path, identity: dict) -> None:
    """Give the finished folder its name; an old one is moved away first and removed last.

    Killed at any moment, `is_finished` holds for the folder that has the result, and calling this again ends the work.

    Raises:
        ValueError: somebody put a file of their own into the old one meanwhile.
    """
    place = place_of(output)
    grave = f".{place.name}.old-"
    if partial.exists():
        checksummed_json.write(partial / STATE, identity | {FINISHED: _result_digest(partial)}, "")
        shutil.rmtree(partial / WORK, ignore_errors=True)
        if place.exists():
            check_no_others(place)
            os.replace(place, Path(tempfile.mkdtemp(prefix=grave, dir=place.parent)) / place.name)
        os.replace(partial, place)
    for old in place.parent.iterdir():
        if old.name.startswith(grave):
            shutil.rmtree(old, ignore_errors=True)
    (place / STATE).unlink()


_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command with --resume",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command with --resume",
    errno.EFBIG: "the file would be larger than the system allows (ulimit -f); raise the limit and use --resume",
    errno.EACCES: "no permission to write there; choose another --output",
    errno.EPERM: "no permission to write there; choose another --output",
    errno.EROFS: "the file system is read-only; choose another --output",
    errno.EEXIST: "a part of the path is a file; choose another --output",
    errno.ENOTDIR: "a part of the path is a file; choose another --output",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter --output",
    errno.EIO: "the disk reports an error of its own; choose another --output",
}


@contextmanager
def clear_disk_errors(output: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write an output into one line that says what to do.

    Raises:
        ValueError: no space, no permission, read-only, and the like.
        OSError: an error of something else, such as a file that is read; it names that.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors and shutil.copytree keep the error number only in their text.
        found = re.search(r"(?:os error |\[Errno )(\d+)", str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        named = [name for key in ("filename", "filename2") if (name := getattr(error, key, None)) is not None]
        if number not in _REMEDIES or (named and not any(_is_of(output, name) for name in named)):
            raise
        raise ValueError(f"cannot write {output}: {_REMEDIES[number]}") from error


def _is_of(output: Path, name: str | bytes) -> bool:
    """Return whether a path is that of an output, lies in it or around it, or in what a run writes beside it."""
    place, path = Path(os.path.realpath(output)), Path(os.path.realpath(os.fsdecode(name)))
    if place.is_relative_to(path):
        return True
    if not path.is_relative_to(place.parent):
        return False
    beside = path.relative_to(place.parent).parts[0]
    return beside in (place.name, f"{place.name}.partial", f"{place.name}.random") or beside.startswith(f".{place.name}.")
