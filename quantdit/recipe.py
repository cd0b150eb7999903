"""`Recipe`: what the user wants, as ordered rules from layer names to formats. The first rule that matches a layer wins."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path

from quantdit import hadamard
from quantdit.formats import FORMATS

DENSE = "dense"
GROUP_SIZES = (32, 64, 128)
ACTIVATION_BITS = (4, 6, 8, 16)
METHODS = ("gptq", "rtn")
ROTATIONS = ("hadamard", "none")
TABLES = ("lloyd-max", "twin-log")


@dataclass(frozen=True)
class Rule:
    """How the layers it matches are quantized.

    Attributes:
        match: a shell pattern over the layer's path in the transformer, such as `transformer_blocks.*.attn*`, or `role:NAME`
            for a role the model's adapter gives its linears (`role:attention`, `role:feed_forward`, `role:modulation`, ...).
        weight: a format name, or `dense` to leave the layer alone.
        group_size: 32, 64, 128, `channel`, or `auto`: what AUTO_GROUP prefers if it divides the width, else the next smaller
            one that does, else one group per channel.
        activation_bits: 4, 6, 8 (per-token integers) or 16 (activations stay as they are).
        rotation: `hadamard` (blocks of the largest power of two up to 128 that divides the width) or `none`.
        method: `gptq` or `rtn`.
        table: for `table2..4`, how the levels are chosen.
        optional: a preset's rule may match nothing; a user's may not.
    """

    match: str
    weight: str = "int4"
    group_size: int | str = "auto"
    activation_bits: int = 16
    rotation: str = "hadamard"
    method: str = "gptq"
    table: str = "lloyd-max"
    optional: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value is not one of the known ones.
        """
        known = {
            "weight": (*FORMATS, DENSE),
            "group_size": (*GROUP_SIZES, "channel", "auto"),
            "activation_bits": ACTIVATION_BITS,
            "rotation": ROTATIONS,
            "method": METHODS,
            "table": TABLES,
        }
        if not isinstance(self.optional, bool):
            raise ValueError(f"rule {self.match!r}: optional = {self.optional!r} must be true or false")
        for key, allowed in known.items():
            value = getattr(self, key)
            # 8.0 == 8 and True == 1 in Python, but a checkpoint's config distinguishes them.
            if not isinstance(value, int | str) or isinstance(value, bool) or value not in allowed:
                raise ValueError(f"rule {self.match!r}: {key} = {value!r} is unknown{_near(value, allowed)}")

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

    def to_dict(self) -> dict:
        """Return a JSON-serialisable form that `from_dict` reads back."""
        return {"name": self.name, "rule": [asdict(rule) for rule in self.rules]}


@dataclass(frozen=True)
class Layer:
    """What a recipe must know of one linear."""

    name: str
    role: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class LayerPlan:
    """A rule made concrete for one layer: sizes are numbers now. `hadamard_block` 1 means no rotation."""

    rule: Rule
    group_size: int
    hadamard_block: int


# The weight format per X of wXaY.
WEIGHTS = {2: "int2", 3: "int3", 4: "int4", 6: "int6", 8: "int8"}

# What group_size = "auto" prefers. Narrow codes need small groups; a format not listed needs none.
AUTO_GROUP = {"int2": 32, "int3": 64, "int4": 64}


def from_bits(bits: str) -> Recipe:
    """Return the preset for `wXaY`, X in 2, 3, 4, 6, 8 and Y in 4, 6, 8, 16.

    The block linears get X and Y. Modulation (AdaLN) and embedder linears inside blocks see one row per image, so their
    activations cost nothing and stay 16 bit; what lies outside the blocks stays dense.

    Raises:
        ValueError: not of this form, or a width that is not offered; names the nearest that are.
    """
    known = [f"w{x}a{y}" for x in WEIGHTS for y in ACTIVATION_BITS]
    if bits not in known:
        raise ValueError(f"unknown bits {bits!r}{_near(bits, known, 0)}; known: {', '.join(known)}")
    x, y = (int(n) for n in re.findall(r"\d+", bits))
    side = WEIGHTS[max(x, 4)]
    return Recipe(
        bits,
        (
            Rule("role:outside", weight=DENSE, optional=True),
            Rule("role:modulation", weight=side, activation_bits=16, optional=True),
            Rule("role:embedder", weight=side, activation_bits=16, optional=True),
            Rule("*", weight=WEIGHTS[x], activation_bits=y),
        ),
    )


def from_toml(path: Path) -> Recipe:
    """Read a recipe file: `name = "..."` and `[[rule]]` tables with the fields of `Rule`.

    Raises:
        ValueError: unreadable TOML, an unknown key or value; the message names the rule and the near matches.
        OSError: the file cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
        ValueError: a rule that no layer is left for, or a group size or vector length that does not divide a layer's width.
    """
    plans: dict[str, LayerPlan] = {}
    used: set[int] = set()
    for layer in layers:
        for number, rule in enumerate(recipe.rules):
            if rule.matches(layer.name, layer.role):
                used.add(number)
                if rule.weight != DENSE:
                    plans[layer.name] = _plan(rule, number, layer, recipe)
                break
    for number, rule in enumerate(recipe.rules):
        if number not in used and not rule.optional:
            raise ValueError(_unused(recipe, number, layers))
    return plans


def _plan(rule: Rule, number: int, layer: Layer, recipe: Recipe) -> LayerPlan:
    width = layer.in_features
    f = FORMATS[rule.weight]
    where = f"recipe {recipe.name}, rule {number + 1} ({rule.match!r}): layer {layer.name} has {width} inputs, which"
    if width % f.dim:
        raise ValueError(f"{where} {f.name} cannot take {f.dim} at a time; give this layer a scalar format in an earlier rule")
    if isinstance(rule.group_size, int) and width % rule.group_size:
        raise ValueError(f'{where} group_size = {rule.group_size} does not divide; use group_size = "auto" or "channel"')
    block = hadamard.block_size(width) if rule.rotation == "hadamard" else 1
    return LayerPlan(rule, _group_size(rule, width), block)


def _group_size(rule: Rule, width: int) -> int:
    if isinstance(rule.group_size, int):
        return rule.group_size
    preferred = AUTO_GROUP.get(rule.weight, 0) if rule.group_size == "auto" else 0
    return next((g for g in reversed(GROUP_SIZES) if g <= preferred and width % g == 0), width)


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
            raise ValueError(f"{where}: unknown key {key!r}{_near(key, known)}; known: {', '.join(known)}")


def _near(value: object, known: tuple | list, fallback: int = 12) -> str:
    """Name the near matches, or the first `fallback` of what is known."""
    near = difflib.get_close_matches(str(value), [str(k) for k in known], n=3, cutoff=0.4)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known: {', '.join(str(k) for k in known[:fallback])}" if fallback else ""
