"""The engine: a transformer quantized block after block, each on what the quantized blocks before it hand on; resumable.

In the work folder of a pass lie `inputs/NUMBER` (the calls of the next block) and, for each finished block, its tensors and its
report. A folder of inputs is whole once it has its index, a block is finished once it has its report, so that a process killed
at any moment goes on at the last finished block, and ends with the same bytes.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantdit.calibration.data_free import quantize_without_data, unit_seed
from quantdit.calibration.layer import Quantized, quantize_layers
from quantdit.calibration.observe import block_order, capture
from quantdit.calibration.observe import recorded_calls as call_files
from quantdit.calibration.observe.block_order import BlockLink, BlocksNotSequential
from quantdit.calibration.observe.recorded_calls import Call, StoredCall, StoredCalls
from quantdit.calibration.observe.sensitivity import replaced
from quantdit.calibration.stats import Stats
from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.streaming import Stream
from quantdit.compiling import finetune
from quantdit.compiling.finetune import Training
from quantdit.layers.quant_linear import QuantLinear, follow_timesteps, weight_bits
from quantdit.models import adapter as adapters
from quantdit.models.call_view import view
from quantdit.recipes.recipe import LayerPlan, layer_without_data
from quantdit.system import files, memory, progress, sealed
from quantdit.system.threads import one_thread
from quantdit.tensors.layer_spec import LayerSpec
from quantdit.tensors.timesteps import edges_of

MEASURED_CALLS = 8
OUTSIDE = "outside"


@dataclass(frozen=True)
class Job:
    """What a run works on and with.

    Attributes:
        transformer: the model, its finished blocks quantized.
        blocks: paths of its blocks.
        calls: its recorded calls; none if nothing was captured.
        buckets: parts of a trajectory.
        seed: of the whole run.
        folder: of the work on this transformer.
        stream: reads blocks that are not in memory; None if all are.
        tokens: rows of each call that statistics are made of; 0 for all.
        training: how assignments are calibrated; None for not at all.
        run: names the run; what another one left in the folder is refused.
        seconds: spent so far, by stage.
    """

    transformer: nn.Module
    blocks: tuple[str, ...]
    calls: StoredCalls
    buckets: int
    seed: int
    folder: Path
    stream: Stream | None = None
    tokens: int = 0
    training: Training | None = None
    run: str = ""
    seconds: Counter[str] = field(default_factory=Counter)

    def unit_seed(self, number: int) -> int:
        """Return the seed of the unit of this number."""
        return unit_seed(self.seed, number)

    def loaded(self, path: str):
        """Have a part of the model in memory."""
        return self.stream.loaded(path) if self.stream is not None else nullcontext()

    def following(self):
        """Have each block in memory while it runs."""
        return self.stream.following(self.blocks) if self.stream is not None else nullcontext()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of the body."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began


@dataclass(frozen=True)
class Unit:
    """A part of the model that is calibrated at once: a block, or everything outside the blocks.

    Attributes:
        path: of the block, or OUTSIDE.
        number: in running order; what is outside comes last.
        names: of the layers in it that are to be quantized.
        run: the module that is called.
        calls: its calls; None if the block is finished and so is the next one's input.
    """

    path: str
    number: int
    names: tuple[str, ...]
    run: nn.Module
    calls: StoredCalls | None

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Return its layers; their names are paths in the transformer."""
        inside = len(self.path) + 1 if self.path != OUTSIDE else 0
        return {name: self.run.get_submodule(name[inside:]) for name in self.names}


@dataclass(frozen=True)
class Made:
    """The layers' reports of a quantized transformer, and its model_rel_rmse (None without calls)."""

    reports: dict[str, dict]
    drift: float | None


def quantize(job: Job, plans: Mapping[str, LayerPlan], folder: Path) -> Made:
    """Quantize the transformer as planned; finished blocks are kept in `folder`, and taken from there if they are."""
    reports: dict[str, dict] = {}
    end_to_end = job.training is not None and job.training.mode == "end-to-end" and len(job.calls) > 0
    linears = {name: job.transformer.get_submodule(name) for name in plans} if end_to_end else {}
    with progress.bar(len(plans), "quantize", "layer") as bar:
        for unit in walk(job, plans, job.calls, folder):
            reports |= _quantize_unit(job, unit, plans, folder, bar.update)
    if idle := [name for name, report in reports.items() if not report.get("calibrated", True)]:
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        text = f"no call reached {idle[0]}{more}, which are quantized from their weights alone; more samples may reach them"
        warnings.warn(files.Advice(text), stacklevel=2)
    if end_to_end:
        with job.timed("assignments"):
            _calibrate_end_to_end(job, linears, reports)
    layers = checkpoint.quant_layers(job.transformer)
    if any(m.layer_spec.activation.by_time for m in layers.values()):
        follow_timesteps(job.transformer, _timestep_edges(job))
    with job.timed("measure"):
        drift = _drift(job, plans, folder)
    return Made({name: reports[name] for name in plans}, drift)


def links_of(job: Job) -> list[BlockLink]:
    """Return the chain of the transformer's blocks; empty if they cannot be run one after the other.

    Raises:
        ValueError: the blocks have no chain, and are not all in memory.
    """
    path = job.folder / "chain.json"
    if not path.exists():
        try:
            with job.timed("observe"), job.following():
                links = block_order.observe(job.transformer, job.blocks, job.calls[0])
        except BlocksNotSequential as error:
            if job.stream is not None:
                raise ValueError(
                    f"{type(job.transformer).__name__}: {error}; such a model must be in memory as a whole, give a larger"
                    " --memory-budget"
                ) from error
            links = []
        sealed.write(path, {"links": [link.to_dict() for link in links]}, job.run)
    return [BlockLink.from_dict(content) for content in sealed.read(path, job.run)["links"]]


def describe_chain(job: Job) -> dict | None:
    """Return for the report how many blocks there are, and of how many the inputs had to be replayed; None without calls.

    No blocks: the model could only be calibrated as a whole.
    """
    if not len(job.calls):
        return None
    links = links_of(job)
    return {"count": len(links), "replayed": sum(link.fed is None for link in links)}


def walk(job: Job, names: Collection[str], calls: StoredCalls, folder: Path) -> Iterator[Unit]:
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
                yield _unit(job, path, number, names, calls)
    done = tuple(f"{path}." for path in ([link.path for link in links] if len(calls) else job.blocks))
    rest = tuple(name for name in names if not name.startswith(done))
    if rest:
        with job.following():
            yield Unit(OUTSIDE, len(job.blocks), rest, job.transformer, calls)


def _unit(job: Job, path: str, number: int, names: Collection[str], calls: StoredCalls | None) -> Unit:
    mine = tuple(name for name in names if name.startswith(f"{path}."))
    return Unit(path, number, mine, job.transformer.get_submodule(path), calls)


def _walk_chain(job: Job, links: list[BlockLink], names: Collection[str], calls: StoredCalls, inputs: Path) -> Iterator[Unit]:
    reached = max((int(p.parent.name) for p in inputs.glob(f"*/{call_files.INDEX}")), default=-1)
    if reached < 0:
        with job.timed("propagate"):
            _first_inputs(job, links[0], calls, inputs / _number(0))
        reached = 0
    for number, link in enumerate(links):
        if number < reached:
            yield _unit(job, link.path, number, names, None)
            if job.stream is not None:
                job.stream.drop(link.path)
            continue
        with job.loaded(link.path):
            mine = _open_inputs(job, inputs / _number(number), calls)
            yield _unit(job, link.path, number, names, mine)
            with job.timed("propagate"):
                _hand_on(job, links, number, calls, mine, inputs)
        memory.give_back()


def _first_inputs(job: Job, first: BlockLink, calls: StoredCalls, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, call in enumerate(calls):
        reached = block_order.first_call(job.transformer, first.path, call)
        call_files.save_call(folder / _file(i), reached.args, reached.kwargs)
    call_files.finish(folder, {"base": folder.name, "fed": []}, job.run)


def _open_inputs(job: Job, folder: Path, calls: StoredCalls) -> StoredCalls:
    """Return the calls of a block: what the folder holds in full, or in place of arguments of an earlier block's calls."""
    index = call_files.index_of(folder, job.run)
    base = folder.parent / index["base"]
    fed = tuple((key, number) for key, number in index["fed"])
    sums = call_files.sums_of(base, job.run) | call_files.sums_of(folder, job.run)
    entries = [
        StoredCall(base / _file(i), entry.bucket, carried=None if base == folder else folder / _file(i), fed=fed, sums=sums)
        for i, entry in enumerate(calls.entries)
    ]
    return StoredCalls(tuple(entries))


def _hand_on(job: Job, links: list[BlockLink], number: int, calls: StoredCalls, mine: StoredCalls, inputs: Path) -> None:
    """Run the block `links[number]` on its calls and keep what the next one gets; of the last, what it returns."""
    folder = inputs / _number(number + 1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    base = call_files.index_of(inputs / _number(number), job.run)["base"]
    following = links[number + 1] if number + 1 < len(links) else None
    replayed = following is not None and following.fed is None
    ends = inputs.parent / "ends"  # outputs that a later replay needs
    is_needed = any(number in link.needs for link in links)
    if is_needed:
        (ends / _number(number)).mkdir(parents=True, exist_ok=True)
    block = job.transformer.get_submodule(links[number].path)
    needed = {*following.needs} - {number} if replayed else set()
    earlier = {j: call_files.sums_of(ends / _number(j), job.run) for j in sorted(needed)}
    for i, call in enumerate(mine):
        outputs = block_order.outputs_of(capture.run_block(block, call))
        if is_needed:
            call_files.save_outputs(ends / _number(number) / _file(i), outputs)
        if replayed:
            recorded = {j: call_files.load_outputs(ends / _number(j) / _file(i), sums) for j, sums in earlier.items()}
            reached = block_order.next_call(job.transformer, links, number, calls[i], recorded | {number: outputs})
            call_files.save_call(folder / _file(i), reached.args, reached.kwargs)
        else:
            call_files.save_outputs(folder / _file(i), outputs)
    if is_needed:
        call_files.finish(ends / _number(number), {}, job.run)
    base = folder.name if replayed else base
    call_files.finish(folder, {"base": base, "fed": [] if following is None else list(following.fed or ())}, job.run)
    for old in inputs.iterdir():
        if old.name not in (base, folder.name):
            shutil.rmtree(old)


def _drift(job: Job, plans: Mapping[str, LayerPlan], folder: Path) -> float | None:
    """Return model_rel_rmse on MEASURED_CALLS of the calls: from the last block's outputs, if nothing outside has changed."""
    stride = max(1, len(job.calls) // MEASURED_CALLS)
    links = links_of(job) if len(job.calls) else []
    prefixes = tuple(f"{link.path}." for link in links)
    if not links or not all(name.startswith(prefixes) for name in plans):
        with job.following():
            return capture.model_error(job.transformer, job.calls[::stride])
    last = folder / "inputs" / _number(len(links))
    sums = call_files.sums_of(last, job.run)
    pairs = (
        (
            block_order.last_output(job.transformer, links, call, call_files.load_outputs(last / _file(i * stride), sums)),
            call.output,
        )
        for i, call in enumerate(job.calls[::stride])
    )
    return capture.relative_error(pairs)


def _quantize_unit(
    job: Job, unit: Unit, plans: Mapping[str, LayerPlan], folder: Path, done: Callable[[int], object]
) -> dict[str, dict]:
    """Replace the unit's linears by QuantLinears, from the folder if they are there, and return their reports.

    `done` is told how many more layers are done.
    """
    if not unit.names:
        return {}
    tensors_path = folder / f"{unit.path}.safetensors"
    report_path = tensors_path.with_suffix(".json")
    if report_path.exists():
        done(len(unit.names))
        return _install(job, tensors_path, report_path)
    if unit.calls is None:
        raise ValueError(f"{folder} lacks the finished block {unit.path}; {sealed.REMEDY}")
    with job.timed("statistics"):
        stats = statistics_of(job, unit) if len(unit.calls) else {}
    linears, seed = unit.linears, job.unit_seed(unit.number)
    with job.timed("layers"):
        made = {}
        for names in _sharing(linears, stats, plans):
            if names[0] in stats:
                group = {name: (linears[name].weight, linears[name].bias) for name in names}
                made |= quantize_layers(group, stats[names[0]], plans[names[0]], seed)
            else:
                made |= {name: _without_data(unit, name, plans[name], seed, job.buckets) for name in names}
            done(len(names))
        made = {name: made[name] for name in linears}
    if job.training is not None and job.training.mode == "block" and stats and unit.path != OUTSIDE:
        with job.timed("assignments"):
            made = _calibrated(job, unit.run, unit.calls, linears, made, stats, (unit.path,), seed)
    stored, reports = {}, {}
    for name, found in made.items():
        tensors = found.tensors if found.bias is None else found.tensors | {"bias": found.bias.detach()}
        stored.update({f"{name}.{field}": t for field, t in tensors.items()})
        layer = _replace(job.transformer, name, found.spec, found.tensors, found.bias)
        reports[name] = _report(found.report, linears[name], layer, stats.get(name))
    part = tensors_path.with_suffix(".part")
    save_file(stored, part)
    files.fsync(part)
    os.replace(part, tensors_path)
    sealed.write(report_path, {"sha256": files.sha256(tensors_path), "layers": reports}, job.run)
    if job.stream is not None:
        job.stream.adopt(tensors_path, list(stored))
    return reports


def _sharing(
    linears: Mapping[str, nn.Linear], stats: Mapping[str, Stats], plans: Mapping[str, LayerPlan]
) -> list[tuple[str, ...]]:
    """Return the layers in groups: those of one input (q, k, v), one plan, and all with a bias or all without."""
    groups: dict[tuple, list[str]] = {}
    for name, linear in linears.items():
        of_input = id(stats[name]) if name in stats else name
        groups.setdefault((of_input, plans[name], linear.bias is None), []).append(name)
    return [tuple(names) for names in groups.values()]


def _without_data(unit: Unit, name: str, plan: LayerPlan, seed: int, buckets: int) -> Quantized:
    """Quantize a layer from its weights; if there are calls and none reached it, its report says so."""
    linear = unit.linears[name]
    if not len(unit.calls):
        return quantize_without_data(linear.weight, linear.bias, plan, seed, buckets)
    made = quantize_without_data(linear.weight, linear.bias, layer_without_data(plan), seed, buckets)
    return replace(made, report=made.report | {"calibrated": False})


@one_thread()
def _calibrated(
    job: Job,
    module: nn.Module,
    calls: StoredCalls,
    linears: Mapping[str, nn.Linear],
    made: Mapping[str, Quantized],
    stats: Mapping[str, Stats],
    paths: Sequence[str],
    seed: int,
) -> dict[str, Quantized]:
    """Return the layers with assignments calibrated on the outputs of blocks; as they were, if that does not help.

    Args:
        job: the run; the linears are in its transformer.
        module: what is called.
        calls: of it.
        linears: the layers in full precision, by path in the transformer.
        made: the layers quantized.
        stats: of their inputs.
        paths: blocks whose outputs count.
        seed: of the choice of samples.
    """
    groups = finetune.parts({name: layer for name, layer in made.items() if name in stats}, job.training)
    if not groups:
        return dict(made)
    folder = job.folder / "wanted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def run(call: Call) -> list[Tensor]:
        with block_order.outputs_at(job.transformer, paths) as outputs:
            capture.set_bucket(module, call.bucket)
            module(*call.args, **call.kwargs)
        return [v for path in paths for v in outputs[path] if v is not None]

    with torch.no_grad():
        for i, call in enumerate(calls):
            call_files.save_outputs(folder / _file(i), run(call))
    examples = finetune.Examples(calls, lambda number: call_files.load_outputs(folder / _file(number)))
    made = dict(made)
    with progress.bar(job.training.steps * len(groups), "train", "step", leave=False) as bar:
        for names in groups:
            with replaced(job.transformer, _hard(made)):
                made |= _trained(job, {name: made[name] for name in names}, linears, stats, run, examples, seed, bar.update)
    shutil.rmtree(folder)
    return made


def _trained(
    job: Job,
    made: Mapping[str, Quantized],
    linears: Mapping[str, nn.Linear],
    stats: Mapping[str, Stats],
    run: finetune.Run,
    examples: finetune.Examples,
    seed: int,
    progress: Callable[[int], object],
) -> dict[str, Quantized]:
    """Return the layers trained at once, all others as the transformer has them; as they were, if that does not help."""
    before = finetune.held_out_error(run, examples)
    full = {name: (linears[name].weight, linears[name].bias, stats[name]) for name in made}
    soft = {name: finetune.soft_linear(found, *full[name], job.training) for name, found in made.items()}
    with replaced(job.transformer, soft), torch.enable_grad():
        report = finetune.train(list(soft.values()), run, examples, job.training, seed, progress)
    found = {name: layer.decided(made[name], *full[name]) for name, layer in soft.items()}
    with replaced(job.transformer, _hard(found)):
        after = finetune.held_out_error(run, examples)
    size = sum(finetune.bytes_of(layer, job.training) for layer in made.values())
    report |= {"held_out_before": before, "held_out": after, "helped": after < before, "layers": len(made), "bytes": size}
    kept = found if after < before else made
    return {name: replace(layer, report=layer.report | {"assignments": report}) for name, layer in kept.items()}


def _hard(made: Mapping[str, Quantized]) -> dict[str, QuantLinear]:
    return {name: QuantLinear.from_tensors(layer.spec, layer.tensors, layer.bias) for name, layer in made.items()}


def _calibrate_end_to_end(job: Job, linears: Mapping[str, nn.Linear], reports: dict[str, dict]) -> None:
    """Calibrate the assignments of all blocks at once, in place; needs the layers in full precision and all statistics."""
    layers = {name: m for name, m in checkpoint.quant_layers(job.transformer).items() if name.startswith(job.blocks)}
    made = {name: Quantized(layer.layer_spec, layer.tensors(), layer.bias, reports[name]) for name, layer in layers.items()}
    full = {name: linears[name] for name in layers}
    with replaced(job.transformer, full):
        whole = Unit(OUTSIDE, len(job.blocks), tuple(full), job.transformer, job.calls)
        stats = statistics_of(job, whole)
        found = _calibrated(job, job.transformer, job.calls, full, made, stats, job.blocks, job.unit_seed(len(job.blocks)))
    for name, layer in found.items():
        placed = _replace(job.transformer, name, layer.spec, layer.tensors, layer.bias)
        reports[name] = _report(layer.report, full[name], placed, stats.get(name))


def _install(job: Job, tensors_path: Path, report_path: Path) -> dict[str, dict]:
    """Put the layers of a finished block into the transformer."""
    finished = sealed.read(report_path, job.run)
    if not tensors_path.exists() or files.sha256(tensors_path) != finished["sha256"]:
        raise ValueError(f"{tensors_path} is not what the interrupted run wrote; {sealed.REMEDY}")
    stored, reports = load_file(tensors_path), finished["layers"]
    for name in reports:
        tensors = {k.removeprefix(f"{name}."): t for k, t in stored.items() if k.startswith(f"{name}.")}
        bias = tensors.pop("bias", None)
        _replace(job.transformer, name, LayerSpec.from_dict(reports[name]["spec"]), tensors, bias)
    if job.stream is not None:
        job.stream.adopt(tensors_path, list(stored))
    return reports


def statistics_of(job: Job, unit: Unit) -> dict[str, Stats]:
    """Return the statistics of the inputs of each of the unit's linears; experts that no token reaches have none.

    Raises:
        ValueError: inputs that overflow.
    """
    stats: dict[str, Stats] = {}
    with capture.collecting(unit.linears, job.buckets, stats, job.tokens) as set_bucket:
        for call in unit.calls:
            set_bucket(call.bucket)
            capture.run_block(unit.run, call)
    for name, found in stats.items():
        if not bool(torch.isfinite(found.gram.diagonal()).all()):
            raise ValueError(f"layer {name}: its inputs are so large that their squares overflow float32; the model is broken")
    return stats


def _report(made: dict, linear: nn.Linear, layer: QuantLinear, stats: Stats | None) -> dict:
    """Return the report of a layer that is in place, with its size and, where inputs are known, its error."""
    error = {} if stats is None else {"rel_rmse": _layer_error(linear, layer, stats)}
    return made | {"bits_per_weight": round(weight_bits(layer), 4)} | error


@one_thread()
def _layer_error(linear: nn.Linear, layer: QuantLinear, stats: Stats) -> float:
    """Return rel_rmse of the layer's output on sampled calibration rows, quantized activations included."""
    error = power = 0.0
    with torch.no_grad():
        for bucket in stats.row_buckets.unique().tolist():
            layer.bucket = bucket
            rows = stats.rows[stats.row_buckets == bucket].to(linear.weight.dtype)
            reference = linear(rows)
            error += float((layer(rows) - reference).square().sum())
            power += float((reference - (0 if linear.bias is None else linear.bias)).square().sum())
    return (error / max(power, 1e-30)) ** 0.5


def _replace(transformer: nn.Module, name: str, spec: LayerSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> QuantLinear:
    layer = QuantLinear.from_tensors(spec, tensors, bias)
    parent, _, child = name.rpartition(".")
    setattr(transformer.get_submodule(parent), child, layer)
    return layer


def _timestep_edges(job: Job) -> tuple[float, ...]:
    times = [(view(job.transformer, call.args, call.kwargs).time, call.bucket) for call in job.calls]
    return edges_of([*((time, bucket) for time, bucket in times if time is not None), *job.calls.levels], job.buckets)


def _number(number: int) -> str:
    return f"{number:04d}"


def _file(number: int) -> str:
    return f"{number:06d}.safetensors"


def blocks_of(transformer: nn.Module, adapter: adapters.Adapter) -> tuple[str, ...]:
    """Return the paths of the transformer's blocks."""
    return tuple(path for path, _ in adapters.blocks(transformer, adapter))
