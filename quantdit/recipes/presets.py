"""From bits such as `w4a8` to a recipe and its fine-tuning, as today's presets or a paper's method have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from quantdit.formats import FORMATS
from quantdit.recipes.finetuning import FineTuning, chooses, trains
from quantdit.recipes.rules import AUTO, DENSE, WEIGHTS, Recipe, Rule, from_dict, from_toml, near
from quantdit.tensors.layer_spec import ACTIVATION_BITS

BEST = "best"

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

# Of coordinate descent after error feedback, where codes are trellises: two take half of a calibration's time at 3 bits, and
# change a layer's error by .2 % and the PSNR of fashion-dit by .03 +- .40 dB (64 images of each of 4 seeds).
TRELLIS_PASSES = 0

# Outliers are smoothed away, and what is left is rotated (reports/robust.md).
ROBUST: dict[str, Any] = {"rotation": "auto", "smooth": "auto"}

# Four bits spread over a whole token lose 3 dB to groups with an offset (reports/study); wider ones lose nothing.
ACTIVATIONS: dict[int, dict[str, Any]] = {4: {"activation_format": "affine", "activation_group_size": 32}}


def from_bits(bits: str, method: str = BEST) -> Recipe:
    """Return what a method of METHODS makes of `wXaY`: of X bits a weight and Y an activation.

    `best` has X in 2, 3, 4, 6, 8 and Y in 4, 6, 8, 16, and `autoaY`, where X is left open; `auto` is `autoa8`.

    Raises:
        ValueError: an unknown method, bits not of this form, or a width that the method does not have; names the nearest ones.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}{near(method, list(METHODS), 0)}; known: {', '.join(METHODS)}")
    known = METHODS[method].bits
    if bits not in known:
        elsewhere = method != BEST and bits in METHODS[BEST].bits
        other = f"; --method {BEST} has {bits}" if elsewhere else ""
        of = f" of method {method}" if method != BEST else ""
        widths = _rule_of_bits() if method == BEST else f"known: {', '.join(known)}"
        raise ValueError(f"unknown bits {bits!r}{of}{_near_bits(bits, list(known))}; {widths}{other}")
    return METHODS[method].recipe(bits)


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


def is_bits(given: object) -> TypeGuard[str]:
    """Return whether `from_any` takes it for bits such as `w4a8`: a text that is no TOML file's name."""
    return isinstance(given, str) and not given.endswith(".toml")


def finetuning_of(bits: object, method: str = BEST) -> FineTuning | None:
    """Return how a method of METHODS fine-tunes what it makes of bits; None for not at all, as of a whole recipe."""
    if not isinstance(bits, str) or bits not in METHODS[method].bits or bits.startswith(AUTO):
        return None
    return METHODS[method].finetuning.get(_widths(bits)[0])


def finetuning_for(recipe: Recipe, preset: FineTuning | None, with_data: bool = True, **given: Any) -> FineTuning | None:
    """Return how a recipe is fine-tuned: `preset` where there is something to train, with what was `given` changed in it.

    Args:
        recipe: whose layers are trained.
        preset: as `finetuning_of` says.
        with_data: there are calls to train on.
        given: fields of FineTuning; None for as it is, `steps` 0 for no fine-tuning.

    Raises:
        ValueError: values that FineTuning refuses, or that change what there is not.
    """
    given = {key: value for key, value in given.items() if value is not None}
    found = preset if with_data and any(map(trains, recipe.rules)) else None
    if given.get("steps") == 0:
        return None
    if found is None and given and "steps" not in given:
        raise ValueError(
            "--finetune-mode, --candidates and --initial-ratios go with --finetune-steps: without it nothing is fine-tuned"
        )
    if given.get("candidates", 1) > 1 and not any(map(chooses, recipe.rules)):
        raise ValueError(
            f"--candidates {given['candidates']}: no layer of {recipe.name} has a codebook to choose from (trellis codes stay as"
            " they are); take --weight-format vq or table, or leave it out"
        )
    return replace(found or FineTuning(), **given) if found or given else None


def with_auto(recipe: Recipe) -> Recipe:
    """Return the recipe with the weight of every rule that quantizes left open: `auto`."""
    return replace(recipe, rules=tuple(r if r.weight == DENSE else replace(r, weight=AUTO, fallback="") for r in recipe.rules))


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
                " --size-budget, --max-output-error) weights are level tables"
            )
        if rule.weight != DENSE:
            x = bits.get(rule.weight)
            if x not in offered:
                widths = " or ".join(f"w{x}" for x in offered)
                raise ValueError(f"{recipe.name}: weight format {kind} has no weights of this width; use {widths}")
            fallback = "" if kind == "table" else WEIGHT_FORMATS["table"][x]
            passes = _passes(offered[x]) if rule.method == "gptq" else rule.cd_passes
            rule = replace(rule, weight=offered[x], fallback=fallback, cd_passes=passes)
        rules.append(rule)
    return replace(recipe, rules=tuple(rules))


def _rule_of_bits() -> str:
    x, y = (" ".join(map(str, widths)) for widths in (WEIGHTS, ACTIVATION_BITS))
    return f"bits are wXaY, such as w4a8, with X one of {x} and Y one of {y}; {AUTO} and {AUTO}aY choose X for each layer"


def _preset(bits: str) -> Recipe:
    """Return today's preset.

    The block linears get X and Y. Modulation (AdaLN) and embedder linears inside blocks see one row per image, so their
    activations cost nothing and stay 16 bit; what lies outside the blocks stays dense.
    """
    if bits.startswith(AUTO):
        return with_auto(replace(_preset(f"w4{bits.removeprefix(AUTO) or 'a8'}"), name=bits))
    x, y = _widths(bits)
    side = PRESETS[x]
    weights = {"weight": side, "fallback": "" if side == WEIGHTS[x] else WEIGHTS[x], "cd_passes": _passes(side), **ROBUST}
    return Recipe(
        bits,
        (
            Rule("role:outside", weight=DENSE, optional=True),
            Rule("role:modulation", activation_bits=16, optional=True, **weights),
            Rule("role:embedder", activation_bits=16, optional=True, **weights),
            Rule("*", activation_bits=y, **weights, **ACTIVATIONS.get(y, {})),
        ),
    )


def _passes(weight: str) -> int:
    return TRELLIS_PASSES if FORMATS[weight].state_bits else Rule.cd_passes


# What text encoders can be quantized to. Inputs of 16 bits cost them nothing: they run once a prompt.
ENCODER_BITS = ("w8a16", "w4a16", "w4a8", "w3a16")
# Their default, by the transformer's bits a weight.
ENCODER_DEFAULTS = {2: "w3a16", 3: "w3a16", 4: "w4a16", 6: "w8a16", 8: "w8a16"}


def encoder_preset(bits: str) -> Recipe:
    """Return the recipe of a text encoder: the linears of its blocks as a transformer's, its table of words by rows.

    Raises:
        ValueError: bits that are none of ENCODER_BITS.
    """
    if bits not in ENCODER_BITS:
        raise ValueError(
            f"unknown bits {bits!r} of a text encoder{near(bits, ENCODER_BITS, 0)}; known: {', '.join(ENCODER_BITS)}"
        )
    return with_words(_preset(bits))


def with_words(recipe: Recipe) -> Recipe:
    """Return a preset that has a rule for a text encoder's table of words, too: 8 bits where linears have as many, else 6."""
    # Four bits for words would double the error of MiniLM's states at w4a16, .037 to .064; six add a tenth.
    weight = "int8" if recipe.rules[-1].weight == WEIGHTS[8] else "int6"
    words = Rule("role:words", weight=weight, rotation="none", optional=True, **PLAIN)
    return replace(recipe, rules=(words, *recipe.rules))


def encoder_bits_of(bits: str) -> str:
    """Return what text encoders are quantized to beside a transformer of these bits; X that are left open count as 4."""
    return ENCODER_DEFAULTS[4 if bits.startswith(AUTO) else _widths(bits)[0]]


def with_encoders(recipe: Recipe, encoders: Sequence[str], bits: str | None = None) -> Recipe:
    """Return a recipe that says, too, how each of some text encoders is quantized: as it says, else to `bits`.

    Raises:
        ValueError: bits that are none of ENCODER_BITS, or None where the recipe does not say; a section of a component that is
            none of these encoders.
    """
    if other := next((name for name in recipe.components if name not in encoders), None):
        raise ValueError(f"recipe {recipe.name} has a section of {other}, which is not among the components to be quantized")
    missing = [name for name in encoders if name not in recipe.components]
    if not missing:
        return recipe
    if bits is None:
        raise ValueError(
            f"recipe {recipe.name} does not say how {missing[0]} is quantized; give --encoder-bits w4a16, or"
            f" [[component.{missing[0]}.rule]] tables"
        )
    return replace(recipe, components={**recipe.components, **dict.fromkeys(missing, encoder_preset(bits))})


# Rounded to nearest, biases as they are: what papers without error feedback do.
PLAIN: dict[str, Any] = {"method": "rtn", "act_order": False, "cd_passes": 0, "bias_correction": False}


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
            Rule("*", weight=WEIGHT_FORMATS["vq"][x], fallback=WEIGHTS[x], rotation="none", **PLAIN),
        ),
    )


def _widths(bits: str) -> tuple[int, int]:
    """Return X and Y of `wXaY`."""
    x, y = re.findall(r"\d+", bits)
    return int(x), int(y)


def _near_bits(bits: str, known: list[str]) -> str:
    """Name the bits that were meant: `4`, `w4`, `int4`, `4bit` speak of weights alone."""
    width = re.fullmatch(r"[a-z]*[ _-]?(\d+)[ _-]?(bits?)?", bits.strip().lower())
    if width is not None and f"w{width[1]}a16" in known:
        return f" (did you mean w{width[1]}a16, weights alone, or w{width[1]}a8, activations too?)"
    return f" (did you mean {bits.lower()}?)" if bits.lower() in known else near(bits, known, 0)


@dataclass(frozen=True)
class Method:
    """How bits become a recipe, and how its codes are then trained.

    Attributes:
        about: what it is, for the help: of a paper its title.
        bits: that it has.
        recipe: of bits.
        arxiv: the paper's number; "" for the presets.
        finetuning: by X of wXaY; widths that are not listed have none.
    """

    about: str
    bits: tuple[str, ...]
    recipe: Callable[[str], Recipe]
    arxiv: str = ""
    finetuning: Mapping[int, FineTuning] = field(default_factory=dict)


# One candidate: after error feedback, steps spent on the choice among two gain less than as many on codebooks (reports/study).
SCALES_AND_CODEBOOKS = FineTuning(candidates=1)
VQ4DIT = FineTuning(500, candidates=2, distance="weight", optimizer="rmsprop", logit_rate=5e-2, codebook_rate=1e-4)

# LRQ-DiT's tables and generated results have weights of 3 and 4 bits; VQ4DiT quantizes weights alone. What the released code of
# either does otherwise than its paper is not copied: see calibration/rotate.py, twinlog.py, quantdit/compiling/finetune.py.
METHODS = {
    BEST: Method(
        "today's presets: what measures best on the embedded models",
        (*(f"w{x}a{y}" for x in WEIGHTS for y in ACTIVATION_BITS), AUTO, *(f"{AUTO}a{y}" for y in ACTIVATION_BITS)),
        _preset,
        finetuning={2: SCALES_AND_CODEBOOKS},
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
        {2: VQ4DIT, 3: VQ4DIT},
    ),
}
