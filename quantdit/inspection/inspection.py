"""Reading a quantized folder, and showing what is in it as tables, as JSON and as a picture."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from quantdit.checkpoints import checkpoint
from quantdit.compiling.report import REPORT, Size, added, size_of
from quantdit.inspection import allocation, plot
from quantdit.inspection.inspected_layer import InspectedLayer, describe_layer, roles_of
from quantdit.inspection.layer_tables import candidate_tables, group_table, layer_table
from quantdit.inspection.report_checks import checked_allocation, checked_report, stated_errors
from quantdit.inspection.text_table import wrapped
from quantdit.layers.quant_linear import QuantLinear
from quantdit.pipelines.components import COMPONENTS, TRANSFORMER_NAMES
from quantdit.pipelines.source import check_quantized
from quantdit.step_plans.step_plan import StepPlan
from quantdit.system import files

WORST = 10
GROUPS = ("role", "block")
EDGES = "edges: {} takes the wider activations from the noisiest time to {:g}, and from beyond {:g} to the cleanest"


@dataclass(frozen=True, repr=False)
class Inspection:
    """A quantized folder that was read and checked; printed, it is the tables of `text`.

    Attributes:
        folder: that was read.
        layers: its quantized layers, of all its transformers, described.
        modules: the same as modules.
        report: what calibration_report.json says of each; empty without that file.
        allocation: how weight formats were chosen, None if they were not.
        size: of all of them, as compiling.report.size_of.
        components: the size of each component; layers of others than the first begin with its name.
        attention: by transformer, how many of its attention modules compute in 8 bits, by how they do.
        plans: by transformer, its step plan; those without one are left out.
        edges: by transformer, the times that the wider activations of the first and of the last steps end at; those without such
            activations are left out.
    """

    folder: Path
    layers: dict[str, InspectedLayer]
    modules: dict[str, QuantLinear]
    report: dict[str, dict]
    allocation: dict | None
    size: Size
    components: dict[str, Size]
    attention: dict[str, dict[str, int]]
    plans: dict[str, StepPlan]
    edges: dict[str, tuple[float, float]]

    def __repr__(self) -> str:
        """Return the first line of `text`, after the folder."""
        return f"<{self.folder}: {self._total()}>"

    def __str__(self) -> str:
        """Return `text` as wide as the terminal, or as it takes where there is none."""
        return self.text()

    def text(self, width: int | None = None, every: bool = False, by: str = GROUPS[0]) -> str:
        """Return tables: groups of layers with their means, then the worst layers, or every one.

        Where the calibration compared rotations or strengths of smoothing, a table has the error of every candidate; where it
        chose the weight formats, a last one has the error of each and what came of the choice.

        Args:
            width: of the longest line, in characters; None: of the terminal, or no limit where there is none.
            every: list all layers in their order, instead of the worst alone.
            by: what to group by, one of GROUPS.

        Raises:
            ValueError: `by` is none of GROUPS.
        """
        if by not in GROUPS:
            raise ValueError(f"cannot group layers by {by!r}; use {' or '.join(GROUPS)}")
        width = shutil.get_terminal_size((sys.maxsize, 0)).columns if width is None else width
        layers = list(self.layers.values())
        errors = {layer.name: layer.error for layer in layers if layer.error is not None}
        worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:WORST]
        shown = layers if every or not worst else [self.layers[name] for name in worst]
        lines = wrapped([self._total()], width)
        for name, size in self.components.items():
            own = self._layers_of(name)
            lines += ["", *(wrapped([f"{name}: {_counted(len(own), size)}"], width) if len(self.components) > 1 else [])]
            lines += group_table(own, by, width)
        if len(shown) < len(layers):
            lines += ["", f"the {len(shown)} worst of {len(layers)} layers; --all lists every one"]
        lines += ["", *layer_table(shown, width)]
        for part, kinds in self.attention.items():
            found = ", ".join(f"{count} modules {kind}" for kind, count in kinds.items())
            lines += wrapped([f"8-bit attention of {part}: {found}"], width)
        for part, plan in self.plans.items():
            lines += wrapped([f"step plan of {part}: {plan}"], width)
        for part, levels in self.edges.items():
            lines += wrapped([EDGES.format(part, *levels)], width)
        names = [layer.name for layer in shown]
        lines += candidate_tables({name: self.report[name] for name in names if name in self.report}, width)
        if self.allocation:
            lines += allocation.format_table(self.allocation, names, width)
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Return what `text` shows, of every layer, for JSON: `layers`, `size`, `allocation`, and `report` of each layer."""
        layers = {name: asdict(layer) | {"report": self.report.get(name)} for name, layer in self.layers.items()}
        known = {
            "folder": str(self.folder),
            "size": self.size,
            "components": self.components,
            "layers": layers,
            "allocation": self.allocation,
        }
        known |= {"attention": self.attention} if self.attention else {}
        known |= {"step_plans": {part: plan.to_dict() for part, plan in self.plans.items()}} if self.plans else {}
        return known | ({"edges": self.edges} if self.edges else {})

    def plot(self, output: str | Path) -> None:
        """Draw weight histograms with the levels given, the error of each layer, and activation absmax per timestep.

        Args:
            output: a PNG file.

        Raises:
            ValueError: the output cannot be written, or the folder has no calibration report (CheckpointError).
            ImportError: matplotlib is not installed.
        """
        output = Path(files.check_path("output", output))
        plot.check_output(output)
        if not self.report:
            raise files.CheckpointError(
                f"{self.folder / REPORT} is missing, so there is nothing to draw; quantdit calibrate writes one"
            )
        plot.draw(output, self.folder.name, self.modules, self.report, self.allocation)

    def _layers_of(self, component: str) -> list[InspectedLayer]:
        """Return the layers of a component; those of the first have no prefix."""
        others = tuple(f"{name}." for name in list(self.components)[1:])
        if component == next(iter(self.components)):
            return [layer for layer in self.layers.values() if not layer.name.startswith(others)]
        return [layer for layer in self.layers.values() if layer.name.startswith(f"{component}.")]

    def _total(self) -> str:
        return _counted(len(self.layers), self.size)


def _counted(layers: int, size: Size) -> str:
    """Return how much a component holds, or all of them."""
    return (
        f"{layers} layers, {size['quantized_weights']:,} weights at {size['bits_per_weight']:.3f} bits with scales,"
        f" {size['dense_values']:,} dense values, file {size['file_bytes'] / 1e6:.2f} MB"
    )


def inspect(folder: str | Path, accept_config: bool = False) -> Inspection:
    """Read and check a quantized pipeline's folder, or that of a transformer alone.

    Args:
        folder: as `quantdit calibrate` or `save_pretrained` writes it.
        accept_config: read it although its config was changed since it was written.

    Returns:
        Its layers, size and calibration report. `print` shows them as tables, `to_dict` gives them for JSON, `plot` draws them.

    Raises:
        ValueError: no quantdit checkpoint, a damaged one, or one that its report does not fit (CheckpointError).
    """
    folder = Path(files.check_path("folder", folder))
    check_quantized(folder)
    bare = (folder / "config.json").exists()
    places = {"": folder} if bare else {part: folder / part for part in COMPONENTS if (folder / part).is_dir()}
    quantized = {part: place for part, place in places.items() if checkpoint.is_quantized(place)} or places
    modules: dict[str, QuantLinear] = {}
    roles: dict[str, tuple[str, str]] = {}
    errors: dict[str, dict] = {}
    sizes, edges, plans, attention = {}, {}, {}, {}
    for part, place in quantized.items():
        transformer = checkpoint.read_transformer(place, accept_config=accept_config)
        own = checkpoint.quant_layers(transformer)
        prefix = "" if part in ("", TRANSFORMER_NAMES[0]) else f"{part}."
        modules |= {f"{prefix}{name}": module for name, module in own.items()}
        roles |= {f"{prefix}{name}": where for name, where in roles_of(transformer).items()}
        errors |= {f"{prefix}{name}": entry for name, entry in stated_errors(place, own).items()}
        sizes[part or TRANSFORMER_NAMES[0]] = size_of(transformer, place)
        if specs := getattr(transformer, "attention_specs", {}):
            attention[part or TRANSFORMER_NAMES[0]] = dict(Counter(map(str, specs.values())))
        if isinstance(plan := getattr(transformer, "step_plan", None), StepPlan):
            plans[part or TRANSFORMER_NAMES[0]] = plan
        if any(module.layer_spec.activation.edge_bits for module in own.values()):
            times = list(getattr(transformer, "timestep_edges", ()))
            edges[part or TRANSFORMER_NAMES[0]] = (times[0], times[-2])
    report, chosen = _report_in(folder, modules)
    known = report or errors
    layers = {name: describe_layer(name, module, *roles[name], known.get(name, {})) for name, module in modules.items()}
    return Inspection(folder, layers, modules, report, chosen, added(list(sizes.values())), sizes, attention, plans, edges)


def _report_in(folder: Path, names: Collection[str]) -> tuple[dict[str, dict], dict | None]:
    """Return what the calibration report says of each layer, and its allocation; nothing where there is no report."""
    path = folder / REPORT
    if not path.exists():
        return {}, None
    content = files.read_json(path)
    return checked_report(content, names, path), checked_allocation(content, names, path)
