"""From a recipe and the layers of a model to a plan of each layer."""

from __future__ import annotations

from dataclasses import replace

from quantdit.formats import FORMATS
from quantdit.recipes.rules import (
    AUTO,
    DENSE,
    FIXED_ROTATIONS,
    FIXED_SMOOTHINGS,
    GROUP_SIZES,
    LEAST_OUTPUTS,
    WEIGHTS,
    Layer,
    LayerPlan,
    Recipe,
    Rule,
    near,
)

WORDS = 'match = "role:words", weight = "int8"'

# What group_size = "auto" prefers. Narrow codes need small groups; a format not listed needs none.
AUTO_GROUP = {"int2": 32, "int3": 64, "int4": 64}


def resolve(recipe: Recipe, layers: list[Layer]) -> dict[str, LayerPlan]:
    """Return the plan of every layer that some rule quantizes, by layer name, in the order of `layers`.

    Raises:
        ValueError: as `options`; or a layer whose weight is `auto`.
    """
    found = options(recipe, layers)
    for name, plans in found.items():
        if len(plans) > 1:
            raise ValueError(
                f'recipe {recipe.name}: layer {name} has weight = "auto", which a size budget or a largest error must settle'
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
                if rule.fallback and _refusal(rule.weight, layer):
                    rule = replace(rule, weight=rule.fallback, fallback="")
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
        raise ValueError(f'{where} {refusal}; name a scalar format for such layers, as in fallback = "table2"')
    if isinstance(rule.group_size, int) and width % rule.group_size:
        raise ValueError(
            f'{where} {width} inputs, which group_size = {rule.group_size} does not divide; use group_size = "auto" or "channel"'
        )
    wanted = rule.activation_group_size if isinstance(rule.activation_group_size, int) else 0  # of "token"
    return LayerPlan(rule, _group_size(rule, width), _largest_group(wanted, width, 0))


def _refusal(weight: str, layer: Layer) -> str:
    """Return why a format does not take a layer, or nothing."""
    f = FORMATS[weight]
    if layer.role == "words" and not f.by_row:
        return f"rows that are looked up one by one, which {f.name} does not store; give them a rule such as {WORDS}"
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


def _largest_group(wanted: int, width: int, default: int) -> int:
    return next((g for g in reversed(GROUP_SIZES) if g <= wanted and width % g == 0), default)


def _unused(recipe: Recipe, number: int, layers: list[Layer]) -> str:
    rule = recipe.rules[number]
    text = f"recipe {recipe.name}, rule {number + 1}: {rule.match!r}"
    if any(rule.matches(layer.name, layer.role) for layer in layers):
        return f"{text} matches only layers that earlier rules have taken; move it up or remove it"
    names = [layer.name for layer in layers]
    roles = sorted({f"role:{layer.role}" for layer in layers})
    return (
        f"{text} matches no layer{near(rule.match, names + roles)}; layers look like {names[0]!r}, roles are {', '.join(roles)}"
    )


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
        rules.append(replace(rule, method=method, act_order=False, cd_passes=0, bias_correction=False))
    components = {name: without_data(each, remedy, times_are_known) for name, each in recipe.components.items()}
    return replace(recipe, rules=tuple(rules), components=components)


def layer_without_data(plan: LayerPlan) -> LayerPlan:
    """Return the plan of a layer that calibration never reached, as near to the one given as weights alone allow."""
    rule = plan.rule
    fixed = replace(
        rule,
        method="hqq" if rule.method == "hqq" else "rtn",
        act_order=False,
        cd_passes=0,
        bias_correction=False,
        activation_scale="dynamic",
        smooth=rule.smooth if rule.smooth in FIXED_SMOOTHINGS else "auto",
        low_rank=0,
        rotation=rule.rotation if rule.rotation in FIXED_ROTATIONS else "hadamard",
    )
    return replace(plan, rule=fixed)
