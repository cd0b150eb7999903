"""`Recipe`: what the user wants, as ordered rules from layer names to formats. The first rule that matches a layer wins."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

from quantdit.formats import FORMATS
from quantdit.recipes.attention import AttentionRule
from quantdit.recipes.attention import rules_of as attention_rules
from quantdit.recipes.steps import Steps
from quantdit.system import files
from quantdit.tensors.layer_spec import ACTIVATION_BITS, ACTIVATION_FORMATS, ActivationSpec, decodes_to_fp8
from quantdit.tensors.timesteps import LEAST_BUCKETS

DENSE = "dense"
AUTO = "auto"
GROUP_SIZES = (32, 64, 128)
ROUNDINGS = ("gptq", "rtn", "hqq")
ROTATIONS = ("none", "hadamard", "outlier", "ars", "auto", "regular")
FIXED_ROTATIONS = ("none", "hadamard", "regular", "auto")  # for which weights are enough; auto is Hadamard then
FIXED_SMOOTHINGS = ("none", "auto")
SMOOTHINGS = ("none", "auto", "rms", "absmax", "salience")
TABLES = ("lloyd-max", "twin-log", "twin-log-paper", "gaussian")
FORMER_KEYS = {"descent": "cd_passes", "otherwise": "fallback"}  # of files that earlier versions wrote
EDGE_FIELDS = ("edge_activation_bits", "edge_steps")
LARGEST_RANK = 512
MOST_EDGE_STEPS = 100
LEAST_OUTPUTS = 32  # of a trellis, whose windows go round: of fewer weights they leave too few to choose from

# The weight format per X of wXaY, and what `auto` chooses from. Level tables beat integers with a group size of equal stored bits
# (reports/study).
WEIGHTS = {2: "table2", 3: "table3", 4: "table4", 6: "table6", 8: "int8"}


@dataclass(frozen=True)
class Rule:
    """How the layers it matches are quantized.

    Attributes:
        match: a shell pattern over the layer's path in the transformer, such as `transformer_blocks.*.attn*`, or `role:NAME`
            for a role the model's adapter gives its linears (`role:attention`, `role:feed_forward`, `role:modulation`, ...).
        weight: a format name; `dense` to leave the layer alone; `auto`: one of WEIGHTS, each layer its own, so that together
            they keep within a size or an error (calibration/allocate.py).
        group_size: 32, 64, 128, `channel`, or `auto`: what AUTO_GROUP prefers if it divides the width, else the next smaller
            one that does, else one group per channel.
        activation_bits: 4, 6, 8 or 16 (activations stay as they are).
        activation_format: `int`, `affine` or `fp8` (layer_spec.ActivationSpec).
        activation_group_size: 32, 64, 128, or `token`: one step for the whole token. Where it does not divide the width, the next
            smaller one that does, else `token`.
        activation_scale: `dynamic` (of each token) or `static` (one per timestep bucket, fixed at calibration).
        edge_activation_bits: of the activations in the first and the last `edge_steps` steps of the trajectory, wider than
            `activation_bits`; 0 for no such steps.
        edge_steps: how many steps at each end, of those that calibration samples. Others are told by their noise: a step is at an
            edge if it is noisier, or cleaner, than half-way to the next sampled step. All rules that have some have as many.
        rotation: `hadamard` (blocks of the largest power of two up to 128 that divides the width), `outlier` (DuQuant's), `ars`
            (Hadamard if J < ars_threshold, else outlier; LRQ-DiT section 4.2), `regular` (ConvRot's Hadamard, with fixed signs,
            in blocks of a power of four; ComfyUI knows it), `none`, or `auto`: Hadamard where that leaves tokens as even as
            Gaussian ones, elsewhere what measures best (calibration/choice.py).
        ars_threshold: of J, the RMS of the layer's inputs.
        smooth: `none`; `auto`: a factor between inputs and weight, of fixed strength, left out where it measures worse; or what a
            factor is made of whose strength is searched: `rms` or `absmax` of each input channel, or `salience` over timesteps
            (PTQ4DiT).
        low_rank: rank of a 16-bit branch beside the weight (SVDQuant), 0 for none; left out where it does not help.
        method: `gptq` (error feedback), `rtn` (round to nearest) or `hqq` (zero points searched without data).
        act_order: gptq takes inputs in order of falling power.
        cd_passes: of coordinate descent over the codes after gptq.
        bias_correction: the bias takes up what quantization does to the mean of the output.
        table: for `table2..6`, how the levels are chosen.
        table_rows: one table per `layer` or per output `channel`.
        fallback: the format of layers that `weight` cannot take: of a width that its vectors do not divide, or of fewer outputs
            than LEAST_OUTPUTS for a trellis; "" refuses such layers.
        optional: a preset's rule may match nothing; a user's may not.
    """

    match: str
    weight: str = "int4"
    group_size: int | str = "auto"
    activation_bits: int = 16
    activation_format: str = "int"
    activation_group_size: int | str = "token"
    activation_scale: str = "dynamic"
    edge_activation_bits: int = 0
    edge_steps: int = 0
    rotation: str = "hadamard"
    ars_threshold: float = 1.0
    smooth: str = "none"
    low_rank: int = 0
    method: str = "gptq"
    act_order: bool = True
    cd_passes: int = 2
    bias_correction: bool = True
    table: str = "lloyd-max"
    table_rows: str = "layer"
    fallback: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is not one of the known ones, or two do not go together.
        """
        known = {
            "weight": (*FORMATS, DENSE, AUTO),
            "fallback": ("", *FORMATS),
            "group_size": (*GROUP_SIZES, "channel", "auto"),
            "activation_bits": ACTIVATION_BITS,
            "activation_format": ACTIVATION_FORMATS,
            "activation_group_size": (*GROUP_SIZES, "token"),
            "activation_scale": ("dynamic", "static"),
            "edge_activation_bits": (0, *ACTIVATION_BITS),
            "rotation": ROTATIONS,
            "smooth": SMOOTHINGS,
            "method": ROUNDINGS,
            "table": TABLES,
            "table_rows": ("layer", "channel"),
        }
        for key in ("act_order", "bias_correction", "optional"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"rule {self.match!r}: {key} = {getattr(self, key)!r} must be true or false")
        for key, allowed in known.items():
            value = getattr(self, key)
            # 8.0 == 8 and True == 1 in Python, but a checkpoint's config distinguishes them.
            if not isinstance(value, int | str) or isinstance(value, bool) or value not in allowed:
                hint = _unquoted(key, value) if value in [str(each) for each in allowed] else near(value, allowed)
                raise ValueError(f"rule {self.match!r}: {key} = {value!r} is unknown{hint}")
        for key, low, high in (("low_rank", 0, LARGEST_RANK), ("cd_passes", 0, 100), ("edge_steps", 0, MOST_EDGE_STEPS)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                hint = _unquoted(key, value)
                raise ValueError(f"rule {self.match!r}: {key} = {value!r} must be a whole number, {low} to {high}{hint}")
        threshold = self.ars_threshold
        if type(threshold) not in (int, float) or not 0 < threshold < math.inf:
            hint = _unquoted("ars_threshold", threshold)
            raise ValueError(f"rule {self.match!r}: ars_threshold = {threshold!r} must be a positive number{hint}")
        self._check_together()

    def _check_together(self) -> None:
        if bool(self.edge_activation_bits) != bool(self.edge_steps):
            missing = "edge_steps, such as 3" if self.edge_activation_bits else "edge_activation_bits, such as 16"
            given = "edge_activation_bits" if self.edge_activation_bits else "edge_steps"
            raise ValueError(f"rule {self.match!r}: {given} = {getattr(self, given)} needs {missing}; give both or neither")
        if self.fallback and self.weight not in FORMATS:
            raise ValueError(f"rule {self.match!r}: fallback = {self.fallback!r} goes with a format, not with {self.weight!r}")
        if self.weight == DENSE:
            return
        if self.weight == AUTO:
            for weight in WEIGHTS.values():
                replace(self, weight=weight, table="lloyd-max", table_rows="layer")  # what some of them take
            return
        kinds = {FORMATS[name].kind for name in (self.weight, self.fallback) if name}
        if isinstance(self.group_size, int) and "affine" not in kinds:
            raise ValueError(
                f"rule {self.match!r}: group_size = {self.group_size} goes with int2 to int6, {self.weight} has one scale"
                " for each output; leave it out"
            )
        if (self.table, self.table_rows) != ("lloyd-max", "layer") and "codebook" not in kinds:
            key, value = ("table", self.table) if self.table != "lloyd-max" else ("table_rows", self.table_rows)
            raise ValueError(
                f"rule {self.match!r}: {key} = {value!r} goes with table2 to table6, {self.weight} has no such table;"
                " leave it out"
            )
        if self.activation_format == "fp8" and not decodes_to_fp8(self.weight):
            raise ValueError(
                f"rule {self.match!r}: fp8 activations need a weight that decodes to e4m3 (fp8_e4m3, table4_e4m3, ...),"
                f" {self.weight} does not"
            )
        if self.method == "hqq" and FORMATS[self.weight].kind != "affine":
            raise ValueError(f"rule {self.match!r}: hqq searches zero points, which {self.weight} has none of; use int2 to int6")
        try:
            self.activation(32 if self.activation_group_size != "token" else 0)
        except ValueError as error:
            raise ValueError(f"rule {self.match!r}: {error}") from error

    def activation(self, group_size: int, buckets: int = LEAST_BUCKETS) -> ActivationSpec:
        """Return how inputs are quantized, in `buckets` parts of a trajectory."""
        static = buckets if self.activation_scale == "static" else 0
        last = buckets - 1 if self.edge_steps else 0
        return ActivationSpec(self.activation_bits, self.activation_format, group_size, static, self.edge_activation_bits, last)

    def to_dict(self) -> dict:
        """Return its fields, those of edges only if it has some: the file of a rule without them stays as it was."""
        return {key: value for key, value in asdict(self).items() if self.edge_steps or key not in EDGE_FIELDS}

    def matches(self, name: str, role: str) -> bool:
        """Return whether the rule speaks of the layer of this path and role."""
        if self.match.startswith("role:"):
            return fnmatchcase(role, self.match[5:])
        return fnmatchcase(name, self.match)


@dataclass(frozen=True)
class Recipe:
    """Ordered rules under a name.

    Attributes:
        name: of the recipe.
        rules: of a pipeline's transformers.
        components: recipes of its text encoders, by the names that the pipeline gives them.
        steps: what step plan is chosen; None for none.
        attention: which attention modules of the transformers compute in 8 bits.
    """

    name: str
    rules: tuple[Rule, ...]
    components: Mapping[str, Recipe] = field(default_factory=dict)
    steps: Steps | None = None
    attention: tuple[AttentionRule, ...] = ()

    def __post_init__(self) -> None:
        """Check that the rules go together.

        Raises:
            ValueError: two ask for edges of different lengths; those of a text encoder ask for what goes by timesteps, or leave
                widths open.
        """
        for name, recipe in self.components.items():
            for rule in recipe.rules:
                by_time = rule.activation_scale == "static" or rule.edge_steps
                if rule.weight != DENSE and (by_time or rule.weight == AUTO):
                    what = "timesteps" if by_time else f'weight = "{AUTO}"'
                    raise ValueError(f"recipe {self.name}, component {name}, rule {rule.match!r}: text encoders have no {what}")
        lengths = {rule.edge_steps: rule for rule in self.rules if rule.edge_steps and rule.weight != DENSE}
        if len(lengths) > 1:
            first, second = list(lengths.values())[:2]
            raise ValueError(
                f"recipe {self.name}: edge_steps = {first.edge_steps} of rule {first.match!r} and {second.edge_steps} of rule"
                f" {second.match!r}: one trajectory has edges of one length; give all rules the same, or none"
            )

    @property
    def edge_steps(self) -> int:
        """Return how many steps at each end of a trajectory some layers have wider activations on; 0 for none."""
        return max((rule.edge_steps for rule in self.rules if rule.weight != DENSE), default=0)

    def of(self, component: str) -> Recipe:
        """Return what it says of a component: of a transformer its own rules."""
        return self.components.get(component) or replace(self, components={})

    def to_dict(self) -> dict:
        """Return a JSON-serialisable form that `from_dict` reads back."""
        content: dict = {"name": self.name, "rule": [rule.to_dict() for rule in self.rules]}
        if self.components:
            content["component"] = {name: recipe.to_dict() for name, recipe in self.components.items()}
        if self.steps is not None:
            content["steps"] = self.steps.to_dict()
        if self.attention:
            content["attention"] = [rule.to_dict() for rule in self.attention]
        return content


@dataclass(frozen=True)
class Layer:
    """What a recipe must know of one linear."""

    name: str
    role: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class LayerPlan:
    """A rule made concrete for one layer: sizes are numbers now. `activation_group_size` 0 means the whole token."""

    rule: Rule
    group_size: int
    activation_group_size: int


def from_toml(path: Path) -> Recipe:
    """Read a recipe file: `name = "..."` and `[[rule]]` tables with the fields of `Rule`.

    Rules of a text encoder are in tables `[[component.NAME.rule]]`, NAME being what the pipeline calls it.

    Raises:
        ValueError: unreadable TOML, an unknown key or value; the message names the rule and the near matches.
        OSError: the file cannot be read.
    """
    try:
        content = tomllib.loads(files.read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    return from_dict({"name": path.stem, **content}, str(path))


def from_dict(content: Mapping, source: str = "recipe") -> Recipe:
    """Build a recipe from its dictionary form.

    Raises:
        ValueError: as `from_toml`.
    """
    _known_keys(content, ("name", "rule", "component", "steps", "attention"), source)
    rules = content.get("rule")
    if not isinstance(rules, list) or not rules:
        raise ValueError(f'{source}: no [[rule]] found; a recipe needs at least one, such as match = "*" with weight = "int4"')
    built = []
    for number, table in enumerate(rules, 1):
        where = f"{source}, rule {number}"
        if not isinstance(table, Mapping) or not isinstance(table.get("match"), str):
            raise ValueError(f'{where}: needs match = "PATTERN"')
        table = _renamed(table, where)
        _known_keys(table, [f.name for f in fields(Rule)], f"{where} ({table['match']!r})")
        try:
            built.append(Rule(**table))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    sections = content.get("component", {})
    if not isinstance(sections, Mapping) or not all(isinstance(section, Mapping) for section in sections.values()):
        raise ValueError(f"{source}: component must be tables, such as [[component.text_encoder.rule]]")
    name = str(content.get("name", source))
    inside = {part: from_dict({"name": f"{name} {part}", **section}, f"{source}, {part}") for part, section in sections.items()}
    if wrong := next((part for part, recipe in inside.items() if recipe.steps is not None or recipe.attention), None):
        raise ValueError(f"{source}, {wrong}: [steps] and [[attention]] are of transformers; write them outside of component")
    steps = Steps.from_dict(content["steps"], source) if "steps" in content else None
    return Recipe(name, tuple(built), inside, steps, attention_rules(content.get("attention", ()), source))


def _renamed(table: Mapping, where: str) -> dict:
    """Return a rule's table with the keys of earlier versions under their names of today."""
    for old, new in FORMER_KEYS.items():
        if old in table and new in table:
            raise ValueError(f"{where}: {old} is the former name of {new}; leave {old} out")
    return {FORMER_KEYS.get(key, key): value for key, value in table.items()}


def _known_keys(table: Mapping, known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{near(key, known, 0)}; known: {', '.join(known)}")


def _unquoted(key: str, value: object) -> str:
    """Return what to write for a number that was given as text, or nothing."""
    is_text = isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value)
    return f"; write {key} = {value} without quotes" if is_text else ""


def near(value: object, known: Sequence, listed: int = 12) -> str:
    """Name the near matches, or the first `listed` of what is known."""
    found = difflib.get_close_matches(str(value), [str(k) for k in known], n=3, cutoff=0.4)
    if found:
        return f" (did you mean {' or '.join(found)}?)"
    return f"; known: {', '.join(str(k) for k in known[:listed])}" if listed else ""
