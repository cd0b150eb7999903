"""`Recipe`: what the user wants, as ordered rules from layer names to formats. The first rule that matches a layer wins."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

from quantdit.formats import FORMATS
from quantdit.system import files
from quantdit.tensors.layer_spec import ACTIVATION_BITS, ACTIVATION_FORMATS, ActivationSpec, decodes_to_fp8
from quantdit.tensors.timesteps import LEAST_BUCKETS

DENSE = "dense"
AUTO = "auto"
BEST = "best"
GROUP_SIZES = (32, 64, 128)
ROUNDINGS = ("gptq", "rtn", "hqq")
ROTATIONS = ("none", "hadamard", "outlier", "ars", "auto", "regular")
FIXED_ROTATIONS = ("none", "hadamard", "regular", "auto")  # for which weights are enough; auto is Hadamard then
FIXED_SMOOTHINGS = ("none", "auto")
SMOOTHINGS = ("none", "auto", "rms", "absmax", "salience")
TABLES = ("lloyd-max", "twin-log", "twin-log-paper", "gaussian")
EDGE_FIELDS = ("edge_activation_bits", "edge_steps")
LARGEST_RANK = 512
MOST_EDGE_STEPS = 100
LEAST_OUTPUTS = 32  # of a trellis, whose windows go round: of fewer weights they leave too few to choose from


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
        descent: passes of coordinate descent over the codes after gptq.
        bias_correction: the bias takes up what quantization does to the mean of the output.
        table: for `table2..6`, how the levels are chosen.
        table_rows: one table per `layer` or per output `channel`.
        otherwise: the format of layers that `weight` cannot take: of a width that its vectors do not divide, or of fewer outputs
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
    descent: int = 2
    bias_correction: bool = True
    table: str = "lloyd-max"
    table_rows: str = "layer"
    otherwise: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is not one of the known ones, or two do not go together.
        """
        known = {
            "weight": (*FORMATS, DENSE, AUTO),
            "otherwise": ("", *FORMATS),
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
                hint = _unquoted(key, value) if value in map(str, allowed) else _near(value, allowed)
                raise ValueError(f"rule {self.match!r}: {key} = {value!r} is unknown{hint}")
        for key, low, high in (("low_rank", 0, LARGEST_RANK), ("descent", 0, 100), ("edge_steps", 0, MOST_EDGE_STEPS)):
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
        if self.otherwise and self.weight not in FORMATS:
            raise ValueError(f"rule {self.match!r}: otherwise = {self.otherwise!r} goes with a format, not with {self.weight!r}")
        if self.weight == DENSE:
            return
        if self.weight == AUTO:
            for weight in WEIGHTS.values():
                replace(self, weight=weight, table="lloyd-max", table_rows="layer")  # what some of them take
            return
        formats = (self.weight, self.otherwise)
        if isinstance(self.group_size, int) and not any(re.fullmatch(r"int[2346]", f) for f in formats):
            raise ValueError(
                f"rule {self.match!r}: group_size = {self.group_size} goes with int2 to int6, {self.weight} has one scale"
                " for each output; leave it out"
            )
        if (self.table, self.table_rows) != ("lloyd-max", "layer") and not any(f.startswith("table") for f in formats):
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
        if self.method == "hqq" and not re.fullmatch(r"int[2346]", self.weight):
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
    """Ordered rules under a name."""

    name: str
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        """Check that the rules go together.

        Raises:
            ValueError: two ask for edges of different lengths.
        """
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

    def to_dict(self) -> dict:
        """Return a JSON-serialisable form that `from_dict` reads back."""
        return {"name": self.name, "rule": [rule.to_dict() for rule in self.rules]}


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


# The weight format per X of wXaY. Level tables beat integers with a group size of equal stored bits: reports/study.
WEIGHTS = {2: "table2", 3: "table3", 4: "table4", 6: "table6", 8: "int8"}

# What --weight-format replaces a preset's weights by: tables of levels, codebooks of vectors, the same with signs split off,
# trellis codes.
WEIGHT_FORMATS = {
    "table": {2: "table2", 3: "table3", 4: "table4"},
    "vq": {2: "vq256x4", 3: "vq64x2", 4: "vq256x2"},
    "ssvq": {2: "ssvq256x8", 3: "ssvq256x4"},
    "trellis": {2: "trellis2_l12", 3: "trellis3_l12", 4: "trellis4_l12"},
}

# What presets take. At 2 and 3 bits trellis codes, which leave three quarters of a table's error (reports/study); those of 2 bits
# are calibrated further (quantdit/compiling/finetune.py). At 4 bits they do as well, but there kernels for few tokens and the
# time that calibration takes speak for tables.
PRESETS = WEIGHTS | {x: WEIGHT_FORMATS["trellis"][x] for x in (2, 3)}

# What group_size = "auto" prefers. Narrow codes need small groups; a format not listed needs none.
AUTO_GROUP = {"int2": 32, "int3": 64, "int4": 64}

# Outliers are smoothed away, and what is left is rotated (reports/robust.md).
ROBUST = {"rotation": "auto", "smooth": "auto"}

# Four bits spread over a whole token lose 3 dB to groups with an offset (reports/study); wider ones lose nothing.
ACTIVATIONS = {4: {"activation_format": "affine", "activation_group_size": 32}}


def from_bits(bits: str, method: str = BEST) -> Recipe:
    """Return what a method of METHODS makes of `wXaY`: of X bits a weight and Y an activation.

    `best` has X in 2, 3, 4, 6, 8 and Y in 4, 6, 8, 16, and `autoaY`, where X is left open; `auto` is `autoa8`.

    Raises:
        ValueError: an unknown method, bits not of this form, or a width that the method does not have; names the nearest ones.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}{_near(method, list(METHODS), 0)}; known: {', '.join(METHODS)}")
    known = METHODS[method].bits
    if bits not in known:
        elsewhere = method != BEST and bits in METHODS[BEST].bits
        other = f"; --method {BEST} has {bits}" if elsewhere else ""
        of = f" of method {method}" if method != BEST else ""
        widths = _rule_of_bits() if method == BEST else f"known: {', '.join(known)}"
        raise ValueError(f"unknown bits {bits!r}{of}{_near_bits(bits, list(known))}; {widths}{other}")
    return METHODS[method].recipe(bits)


def _rule_of_bits() -> str:
    x, y = (" ".join(map(str, widths)) for widths in (WEIGHTS, ACTIVATION_BITS))
    return f"bits are wXaY, such as w4a8, with X one of {x} and Y one of {y}, {AUTO}, {AUTO}aY"


def _preset(bits: str) -> Recipe:
    """Return today's preset.

    The block linears get X and Y. Modulation (AdaLN) and embedder linears inside blocks see one row per image, so their
    activations cost nothing and stay 16 bit; what lies outside the blocks stays dense.
    """
    if bits.startswith(AUTO):
        return with_auto(replace(_preset(f"w4{bits.removeprefix(AUTO) or 'a8'}"), name=bits))
    x, y = _widths(bits)
    side = PRESETS[x]
    otherwise = "" if side == WEIGHTS[x] else WEIGHTS[x]
    return Recipe(
        bits,
        (
            Rule("role:outside", weight=DENSE, optional=True),
            Rule("role:modulation", weight=side, otherwise=otherwise, activation_bits=16, optional=True, **ROBUST),
            Rule("role:embedder", weight=side, otherwise=otherwise, activation_bits=16, optional=True, **ROBUST),
            Rule("*", weight=side, otherwise=otherwise, activation_bits=y, **ROBUST, **ACTIVATIONS.get(y, {})),
        ),
    )


# Rounded to nearest, biases as they are: what papers without error feedback do.
PLAIN = {"method": "rtn", "act_order": False, "descent": 0, "bias_correction": False}


def _lrq_dit(bits: str) -> Recipe:
    """Return LRQ-DiT's recipe: attention and feed-forward linears; modulation and embedders stay as they are.

    Twin-log levels of each output channel (section 4.1, Eq. 4 to 7), rotations by J (section 4.2, Eq. 11 and 12), one symmetric
    step a token, rounding to nearest. Inputs are smoothed first, as in the released scripts and in DuQuant, whose rotation it is:
    without that salient channels ruin the weights (reports/papers.md).
    """
    x, y = _widths(bits)
    twin_log = {"weight": WEIGHTS[x], "table": "twin-log", "table_rows": "channel"}
    return Recipe(
        f"{bits} lrq-dit",
        (
            *(Rule(f"role:{role}", weight=DENSE, optional=True) for role in ("outside", "modulation", "embedder")),
            Rule("*", activation_bits=y, rotation="ars", smooth="absmax", **twin_log, **PLAIN),
        ),
    )


def _vq4dit(bits: str) -> Recipe:
    """Return VQ4DiT's recipe: every linear of the blocks, modulation too, embedders as they are; k-means without a rotation.

    At 2 bits 256 codewords of 4 weights, at 3 bits 64 of 2. Layers whose width a codeword does not divide get a table of as many
    bits.
    """
    x, _ = _widths(bits)
    return Recipe(
        f"{bits} vq4dit",
        (
            *(Rule(f"role:{role}", weight=DENSE, optional=True) for role in ("outside", "embedder")),
            Rule("*", weight=WEIGHT_FORMATS["vq"][x], otherwise=WEIGHTS[x], rotation="none", **PLAIN),
        ),
    )


def _widths(bits: str) -> tuple[int, int]:
    """Return X and Y of `wXaY`."""
    x, y = re.findall(r"\d+", bits)
    return int(x), int(y)


@dataclass(frozen=True)
class Method:
    """How bits become a recipe, and how its codes are then trained.

    Attributes:
        about: what it is, for the help: of a paper its title.
        bits: that it has.
        recipe: of bits.
        arxiv: the paper's number; "" for the presets.
        training: fields of calibration.assignments.Training; empty for what the presets train, a paper's for nothing.
    """

    about: str
    bits: tuple[str, ...]
    recipe: Callable[[str], Recipe]
    arxiv: str = ""
    training: Mapping[str, object] = field(default_factory=dict)


# LRQ-DiT's tables and generated results have weights of 3 and 4 bits; VQ4DiT quantizes weights alone. What the released code of
# either does otherwise than its paper is not copied: see calibration/rotate.py, twinlog.py, assignments.py.
METHODS = {
    BEST: Method(
        "today's presets: what measures best on the embedded models",
        (*(f"w{x}a{y}" for x in WEIGHTS for y in ACTIVATION_BITS), AUTO, *(f"{AUTO}a{y}" for y in ACTIVATION_BITS)),
        _preset,
    ),
    "lrq-dit": Method(
        "LRQ-DiT: Log-Rotation Post-Training Quantization of Diffusion Transformers for Image and Video Generation",
        tuple(f"w{x}a{y}" for x in (3, 4) for y in (4, 6, 8)),
        _lrq_dit,
        "2508.03485",
    ),
    "vq4dit": Method(
        "VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers",
        ("w2a16", "w3a16"),
        _vq4dit,
        "2408.17131",
        {
            "steps": 500,
            "candidates": 2,
            "distance": "weight",
            "optimizer": "rmsprop",
            "logit_rate": 5e-2,
            "codebook_rate": 1e-4,
        },
    ),
}


def with_auto(recipe: Recipe) -> Recipe:
    """Return the recipe with the weight of every rule that quantizes left open: `auto`."""
    return replace(recipe, rules=tuple(r if r.weight == DENSE else replace(r, weight=AUTO, otherwise="") for r in recipe.rules))


def with_weight_format(recipe: Recipe, kind: str) -> Recipe:
    """Return a preset with the weights of a kind of WEIGHT_FORMATS, of the same bits.

    Raises:
        ValueError: an unknown kind, or a width that the kind does not have.
    """
    if kind not in WEIGHT_FORMATS:
        raise ValueError(f"unknown weight format {kind!r}; known: {', '.join(WEIGHT_FORMATS)}")
    bits = {weight: x for of_kind in WEIGHT_FORMATS.values() for x, weight in of_kind.items()}
    offered, rules = WEIGHT_FORMATS[kind], []
    for rule in recipe.rules:
        if rule.weight == AUTO:
            raise ValueError(
                f"weight format {kind} goes with fixed bits, such as w3a8; where layers' widths are chosen (auto bits,"
                " --size-budget, --max-drift) weights are level tables"
            )
        if rule.weight != DENSE:
            x = bits.get(rule.weight)
            if x not in offered:
                widths = " or ".join(f"w{x}" for x in offered)
                raise ValueError(f"{recipe.name}: weight format {kind} has no weights of this width; use {widths}")
            rule = replace(rule, weight=offered[x], otherwise="" if kind == "table" else WEIGHT_FORMATS["table"][x])
        rules.append(rule)
    return replace(recipe, rules=tuple(rules))


def without_data(recipe: Recipe, remedy: str = "calibrate with --samples of at least 1", times_are_known: bool = False) -> Recipe:
    """Return the recipe with what needs calibration data taken out: rounding to nearest, fixed rotations, biases as they are.

    Args:
        recipe: to take it out of.
        remedy: what the error tells the user to do.
        times_are_known: the times of the sampling steps are known, which tell where its edges end.

    Raises:
        ValueError: a rule that asks for what data alone can give: static activation scales, smoothing, a low-rank branch, a
            rotation fitted to outliers, weights to be chosen.
    """
    rules = []
    for rule in recipe.rules:
        needs = {
            f'weight = "{AUTO}"': rule.weight == AUTO,
            'activation_scale = "static"': rule.activation_scale == "static",
            f'smooth = "{rule.smooth}"': rule.smooth not in FIXED_SMOOTHINGS,
            f"low_rank = {rule.low_rank}": rule.low_rank > 0,
            f'rotation = "{rule.rotation}"': rule.rotation not in FIXED_ROTATIONS,
            f"edge_steps = {rule.edge_steps}": rule.edge_steps > 0 and not times_are_known,
        }
        if rule.weight != DENSE and (what := next((key for key, is_needed in needs.items() if is_needed), None)):
            raise ValueError(f"rule {rule.match!r}: {what} needs calibration data; {remedy}")
        method = "hqq" if rule.method == "hqq" else "rtn"
        rules.append(replace(rule, method=method, act_order=False, descent=0, bias_correction=False))
    return replace(recipe, rules=tuple(rules))


def layer_without_data(plan: LayerPlan) -> LayerPlan:
    """Return the plan of a layer that calibration never reached, as near to the one given as weights alone allow."""
    rule = plan.rule
    fixed = replace(
        rule,
        method="hqq" if rule.method == "hqq" else "rtn",
        act_order=False,
        descent=0,
        bias_correction=False,
        activation_scale="dynamic",
        smooth=rule.smooth if rule.smooth in FIXED_SMOOTHINGS else "auto",
        low_rank=0,
        rotation=rule.rotation if rule.rotation in FIXED_ROTATIONS else "hadamard",
    )
    return replace(plan, rule=fixed)


def from_any(given: Recipe | Mapping | str | Path, method: str = BEST) -> Recipe:
    """Return the recipe itself, or that of a dictionary, of a TOML file, or what a method makes of bits such as `w4a8`.

    Raises:
        ValueError: as `from_bits`, `from_toml`, `from_dict`; a file that cannot be read; a method beside a whole recipe.
    """
    if method != BEST and not is_bits(given):
        raise ValueError(f"method {method!r} goes with bits such as 'w4a8'; a recipe says all by itself, leave out method=")
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        return from_dict(given)
    if not isinstance(given, str | Path):
        kind = type(given).__name__
        raise ValueError(f"a recipe is bits such as 'w4a8', the path of a TOML file, a dictionary or a Recipe, got a {kind}")
    if is_bits(given):
        return from_bits(given, method)
    try:
        return from_toml(Path(given))
    except OSError as error:
        raise ValueError(
            f"recipe {given} cannot be read: {error.strerror}; give the path of a TOML file, bits such as 'w4a8', a dictionary"
            " or a Recipe"
        ) from error


def is_bits(given: object) -> bool:
    """Return whether `from_any` takes it for bits such as `w4a8`: a text that is no TOML file's name."""
    return isinstance(given, str) and not given.endswith(".toml")


def from_toml(path: Path) -> Recipe:
    """Read a recipe file: `name = "..."` and `[[rule]]` tables with the fields of `Rule`.

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
    _known_keys(content, ("name", "rule"), source)
    rules = content.get("rule")
    if not isinstance(rules, list) or not rules:
        raise ValueError(f'{source}: no [[rule]] found; a recipe needs at least one, such as match = "*" with weight = "int4"')
    built = []
    for number, table in enumerate(rules, 1):
        where = f"{source}, rule {number}"
        if not isinstance(table, Mapping) or not isinstance(table.get("match"), str):
            raise ValueError(f'{where}: needs match = "PATTERN"')
        _known_keys(table, [f.name for f in fields(Rule)], f"{where} ({table['match']!r})")
        try:
            built.append(Rule(**table))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    return Recipe(str(content.get("name", source)), tuple(built))


def resolve(recipe: Recipe, layers: list[Layer]) -> dict[str, LayerPlan]:
    """Return the plan of every layer that some rule quantizes, by layer name, in the order of `layers`.

    Raises:
        ValueError: as `options`; or a layer whose weight is `auto`.
    """
    found = options(recipe, layers)
    for name, plans in found.items():
        if len(plans) > 1:
            raise ValueError(
                f'recipe {recipe.name}: layer {name} has weight = "auto", which a size budget or a drift must settle'
            )
    return {name: next(iter(plans.values())) for name, plans in found.items()}


def options(recipe: Recipe, layers: list[Layer]) -> dict[str, dict[str, LayerPlan]]:
    """Return the plans of every layer that some rule quantizes by weight format: all of WEIGHTS for `auto`, otherwise one.

    Raises:
        ValueError: a rule that no layer is left for, or a group size or vector length that does not divide a layer's width.
    """
    plans: dict[str, dict[str, LayerPlan]] = {}
    used: set[int] = set()
    for layer in layers:
        for number, rule in enumerate(recipe.rules):
            if rule.matches(layer.name, layer.role):
                used.add(number)
                if rule.otherwise and _refusal(rule.weight, layer):
                    rule = replace(rule, weight=rule.otherwise, otherwise="")
                if rule.weight != DENSE:
                    weights = WEIGHTS.values() if rule.weight == AUTO else (rule.weight,)
                    plans[layer.name] = {w: _plan(replace(rule, weight=w), number, layer, recipe) for w in weights}
                break
    for number, rule in enumerate(recipe.rules):
        if number not in used and not rule.optional:
            raise ValueError(_unused(recipe, number, layers))
    return plans


def _plan(rule: Rule, number: int, layer: Layer, recipe: Recipe) -> LayerPlan:
    width = layer.in_features
    where = f"recipe {recipe.name}, rule {number + 1} ({rule.match!r}): layer {layer.name} has"
    if refusal := _refusal(rule.weight, layer):
        raise ValueError(f'{where} {refusal}; name a scalar format for such layers, as in otherwise = "table2"')
    if isinstance(rule.group_size, int) and width % rule.group_size:
        raise ValueError(
            f'{where} {width} inputs, which group_size = {rule.group_size} does not divide; use group_size = "auto" or "channel"'
        )
    wanted = 0 if rule.activation_group_size == "token" else rule.activation_group_size
    return LayerPlan(rule, _group_size(rule, width), _largest_group(wanted, width, 0))


def _refusal(weight: str, layer: Layer) -> str:
    """Return why a format does not take a layer, or nothing."""
    f = FORMATS[weight]
    if layer.in_features % f.dim:
        return f"{layer.in_features} inputs, which {f.name} cannot take {f.dim} at a time"
    if f.state_bits and layer.out_features < LEAST_OUTPUTS:
        return f"{layer.out_features} outputs, and {f.name} needs {LEAST_OUTPUTS}"
    return ""


def _group_size(rule: Rule, width: int) -> int:
    if isinstance(rule.group_size, int):
        return rule.group_size
    preferred = AUTO_GROUP.get(rule.weight, 0) if rule.group_size == "auto" else 0
    return _largest_group(preferred, width, width)


def _largest_group(wanted: int, width: int, otherwise: int) -> int:
    return next((g for g in reversed(GROUP_SIZES) if g <= wanted and width % g == 0), otherwise)


def _unused(recipe: Recipe, number: int, layers: list[Layer]) -> str:
    rule = recipe.rules[number]
    text = f"recipe {recipe.name}, rule {number + 1}: {rule.match!r}"
    if any(rule.matches(layer.name, layer.role) for layer in layers):
        return f"{text} matches only layers that earlier rules have taken; move it up or remove it"
    names = [layer.name for layer in layers]
    roles = sorted({f"role:{layer.role}" for layer in layers})
    return (
        f"{text} matches no layer{_near(rule.match, names + roles)}; layers look like {names[0]!r}, roles are {', '.join(roles)}"
    )


def _known_keys(table: Mapping, known: tuple[str, ...] | list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{_near(key, known, 0)}; known: {', '.join(known)}")


def _near_bits(bits: str, known: list[str]) -> str:
    """Name the bits that were meant: `4`, `w4`, `int4`, `4bit` speak of weights alone."""
    width = re.fullmatch(r"[a-z]*[ _-]?(\d+)[ _-]?(bits?)?", bits.strip().lower())
    if width is not None and f"w{width[1]}a16" in known:
        return f" (did you mean w{width[1]}a16, weights alone, or w{width[1]}a8, activations too?)"
    return f" (did you mean {bits.lower()}?)" if bits.lower() in known else _near(bits, known, 0)


def _unquoted(key: str, value: object) -> str:
    """Return what to write for a number that was given as text, or nothing."""
    is_text = isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value)
    return f"; write {key} = {value} without quotes" if is_text else ""


def _near(value: object, known: tuple | list, fallback: int = 12) -> str:
    """Name the near matches, or the first `fallback` of what is known."""
    near = difflib.get_close_matches(str(value), [str(k) for k in known], n=3, cutoff=0.4)
    if near:
        return f" (did you mean {' or '.join(near)}?)"
    return f"; known: {', '.join(str(k) for k in known[:fallback])}" if fallback else ""
