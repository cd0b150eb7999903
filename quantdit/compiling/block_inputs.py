"""What each block gets: the chain of blocks walked in order, every one run on what the quantized ones before it hand on.

In the work folder of a pass lie `inputs/NUMBER`, the calls of block NUMBER; a folder of inputs is whole once it has its index.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from quantdit.calibration.observe import block_order, capture
from quantdit.calibration.observe import recorded_calls as call_files
from quantdit.calibration.observe.block_order import BlockLink, BlocksNotSequential
from quantdit.calibration.observe.recorded_calls import StoredCall, StoredCalls
from quantdit.compiling.job import OUTSIDE, Job, Segment
from quantdit.system import checksummed_json, memory

MEASURED_CALLS = 8


def walk(job: Job, names: Collection[str], calls: StoredCalls, folder: Path) -> Iterator[Segment]:
    """Yield block after block with its calls, as handed on by the blocks before as the caller left them; the rest last.

    Args:
        job: the run.
        names: of the layers to be quantized; blocks without any are walked through all the same.
        calls: of the transformer.
        folder: where the inputs of the next block are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    links = links_of(job) if len(calls) else []
    if links:
        yield from _walk_chain(job, links, names, calls, folder / "inputs")
    elif not len(calls):
        for number, path in enumerate(job.blocks):
            with job.loaded(path):
                yield _segment(job, path, number, names, calls)
    done = tuple(f"{path}." for path in ([link.path for link in links] if len(calls) else job.blocks))
    rest = tuple(name for name in names if not name.startswith(done))
    if rest:
        with job.following():
            yield Segment(OUTSIDE, len(job.blocks), rest, job.model, calls)


def _segment(job: Job, path: str, number: int, names: Collection[str], calls: StoredCalls | None) -> Segment:
    mine = tuple(name for name in names if name.startswith(f"{path}."))
    return Segment(path, number, mine, job.model.get_submodule(path), calls)


def _walk_chain(job: Job, links: list[BlockLink], names: Collection[str], calls: StoredCalls, inputs: Path) -> Iterator[Segment]:
    reached = max((int(p.parent.name) for p in inputs.glob(f"*/{call_files.INDEX}")), default=-1)
    if reached < 0:
        with job.timed("propagate"):
            _first_inputs(job, links[0], calls, inputs / _number(0))
        reached = 0
    for number, link in enumerate(links):
        if number < reached:
            yield _segment(job, link.path, number, names, None)
            if job.stream is not None:
                job.stream.drop(link.path)
            continue
        with job.loaded(link.path):
            mine = _open_inputs(job, inputs / _number(number), calls)
            yield _segment(job, link.path, number, names, mine)
            with job.timed("propagate"):
                _hand_on(job, links, number, calls, mine, inputs)
        memory.give_back()


def _first_inputs(job: Job, first: BlockLink, calls: StoredCalls, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, call in enumerate(calls):
        reached = block_order.first_call(job.model, first.path, call)
        call_files.save_call(folder / call_name(i), reached.args, reached.kwargs)
    call_files.finish(folder, {"base": folder.name, "fed": []}, job.run)


def _open_inputs(job: Job, folder: Path, calls: StoredCalls) -> StoredCalls:
    """Return the calls of a block: what the folder holds in full, or in place of arguments of an earlier block's calls."""
    index = _index_of(folder, job.run)
    base = folder.parent / index["base"]
    fed = tuple((key, number) for key, number in index["fed"])
    sums = call_files.sums_of(base, job.run) | call_files.sums_of(folder, job.run)
    entries = []
    for i, entry in enumerate(calls.entries):
        carried = None if base == folder else folder / call_name(i)
        entries.append(StoredCall(base / call_name(i), entry.bucket, carried=carried, fed=fed, sums=sums))
    return StoredCalls(tuple(entries))


def _index_of(folder: Path, run: str) -> dict:
    index = call_files.index_of(folder, run)
    assert index is not None, folder
    return index


def _hand_on(job: Job, links: list[BlockLink], number: int, calls: StoredCalls, mine: StoredCalls, inputs: Path) -> None:
    """Run the block `links[number]` on its calls and keep what the next one gets; of the last, what it returns."""
    folder = _fresh(inputs / _number(number + 1))
    base = _index_of(inputs / _number(number), job.run)["base"]
    following = links[number + 1] if number + 1 < len(links) else None
    replayed = following is not None and following.fed is None
    ends = inputs.parent / "ends"  # outputs that a later replay needs
    is_needed = any(number in link.needs for link in links)
    if is_needed:
        (ends / _number(number)).mkdir(parents=True, exist_ok=True)
    block = job.model.get_submodule(links[number].path)
    needed = {*following.needs} - {number} if following is not None and replayed else set()
    earlier = {j: call_files.sums_of(ends / _number(j), job.run) for j in sorted(needed)}
    for i, call in enumerate(mine):
        outputs = block_order.outputs_of(capture.run_block(block, call))
        if is_needed:
            call_files.save_outputs(ends / _number(number) / call_name(i), outputs)
        if replayed:
            recorded = {j: call_files.load_outputs(ends / _number(j) / call_name(i), sums) for j, sums in earlier.items()}
            reached = block_order.next_call(job.model, links, number, calls[i], recorded | {number: outputs})
            call_files.save_call(folder / call_name(i), reached.args, reached.kwargs)
        else:
            call_files.save_outputs(folder / call_name(i), outputs)
    if is_needed:
        call_files.finish(ends / _number(number), {}, job.run)
    base = folder.name if replayed else base
    call_files.finish(folder, {"base": base, "fed": [] if following is None else list(following.fed or ())}, job.run)
    for old in inputs.iterdir():
        if old.name not in (base, folder.name):
            shutil.rmtree(old)


def model_error(job: Job, names: Collection[str], folder: Path) -> float | None:
    """Return model_rel_rmse on MEASURED_CALLS of the calls, None without any.

    It comes from the last block's outputs if no layer outside the blocks has changed.
    """
    stride = max(1, len(job.calls) // MEASURED_CALLS)
    links = links_of(job) if len(job.calls) else []
    prefixes = tuple(f"{link.path}." for link in links)
    if not links or not all(name.startswith(prefixes) for name in names):
        with job.following():
            return capture.model_error(job.model, job.calls[::stride])
    last = folder / "inputs" / _number(len(links))
    sums = call_files.sums_of(last, job.run)
    pairs = []
    for i, call in enumerate(job.calls[::stride]):
        outputs = call_files.load_outputs(last / call_name(i * stride), sums)
        pairs.append((block_order.last_prediction(job.model, links, call, outputs), call.output))
    return capture.relative_error(pairs)


def links_of(job: Job) -> list[BlockLink]:
    """Return the chain of the transformer's blocks; empty if they cannot be run one after the other.

    Raises:
        ValueError: the blocks have no chain, and are not all in memory.
    """
    path = job.folder / "chain.json"
    if not path.exists():
        try:
            with job.timed("observe"), job.following():
                links = block_order.observe(job.model, job.blocks, job.calls[0])
        except BlocksNotSequential as error:
            if job.stream is not None:
                raise ValueError(
                    f"{type(job.model).__name__}: {error}; such a model must be in memory as a whole, give a larger"
                    " --memory-budget"
                ) from error
            links = []
        checksummed_json.write(path, {"links": [link.to_dict() for link in links]}, job.run)
    return [BlockLink.from_dict(content) for content in checksummed_json.read(path, job.run)["links"]]


def describe_chain(job: Job) -> dict | None:
    """Return for the report how many blocks there are, and of how many the inputs had to be replayed; None without calls.

    No blocks: the model could only be calibrated as a whole.
    """
    if not len(job.calls):
        return None
    links = links_of(job)
    return {"count": len(links), "replayed": sum(link.fed is None for link in links)}


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _number(number: int) -> str:
    return f"{number:04d}"


def call_name(number: int) -> str:
    """Return the name of the file that a call of this number is kept in."""
    return f"{number:06d}.safetensors"
