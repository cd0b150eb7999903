"""Recipes: what is accepted, who wins, and that every refusal names the rule and the fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantdit import recipe
from quantdit.formats import FORMATS
from quantdit.recipe import Layer, Rule

LAYERS = [
    Layer("blocks.0.norm.linear", "modulation", 384, 64),
    Layer("blocks.0.attn.to_q", "attention", 64, 64),
    Layer("blocks.0.attn.to_k", "attention", 64, 64),
    Layer("blocks.0.ff.in", "feed_forward", 256, 64),
    Layer("blocks.0.ff.out", "feed_forward", 64, 256),
    Layer("blocks.0.emb.linear", "embedder", 64, 256),
    Layer("proj_out", "outside", 4, 64),
]


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], recipe.Recipe]:
    """Parse text as a recipe file called `mine.toml`."""

    def read(text: str) -> recipe.Recipe:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return recipe.from_toml(path)

    return read


def refusal(act: Callable[[], object]) -> str:
    """Return the one line with which `act` is refused."""
    with pytest.raises(ValueError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


@pytest.mark.parametrize("x", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("y", [4, 6, 8, 16])
def test_grammar_offers_every_combination(x: int, y: int):
    plans = recipe.resolve(recipe.from_bits(f"w{x}a{y}"), LAYERS)
    block = plans["blocks.0.attn.to_q"].rule
    assert (FORMATS[block.weight].code_bits, block.weight, block.activation_bits) == (x, f"int{x}", y)
    assert plans["blocks.0.ff.out"].rule == block
    # One row per image: no gain in fewer activation bits, and codes of less than 4 bits would hurt every token at once.
    for side in ("blocks.0.norm.linear", "blocks.0.emb.linear"):
        assert plans[side].rule.activation_bits == 16
        assert plans[side].rule.weight == f"int{max(x, 4)}"
    assert "proj_out" not in plans


@pytest.mark.parametrize(
    ("bits", "near"),
    [
        ("w5a8", "w4a8"),
        ("w4a88", "w4a8"),
        ("W4A8", "w4a8"),
        ("w4-a8", "w4a8"),
        ("w4a8 ", "w4a8"),
        ("4a8", "w4a8"),
        ("w4", "w4a8"),
        ("w16a16", "w6a16"),
        ("w٤a8", None),
        ("", None),
        ("fp8", None),
    ],
)
def test_other_bits_are_refused_with_what_is_known(bits: str, near: str | None):
    message = refusal(lambda: recipe.from_bits(bits))
    assert repr(bits) in message
    assert "w3a16" in message and "w8a8" in message
    assert message.count("known: ") == 1
    if near:
        assert near in message.split("did you mean")[1].split("?")[0]


def test_preset_quantizes_a_model_without_modulation_or_outside_layers():
    only = [Layer("blocks.0.attn.to_q", "attention", 64, 64)]
    assert list(recipe.resolve(recipe.from_bits("w4a8"), only)) == ["blocks.0.attn.to_q"]


def test_first_match_wins(toml):
    plans = recipe.resolve(
        toml("""
        [[rule]]
        match = "*.to_q"
        weight = "int8"
        [[rule]]
        match = "role:attention"
        weight = "table4"
        table = "twin-log"
        method = "rtn"
        rotation = "none"
        activation_bits = 6
        [[rule]]
        match = "proj_out"
        weight = "dense"
        [[rule]]
        match = "*"
        weight = "int3"
        group_size = 32
        """),
        LAYERS,
    )
    assert plans["blocks.0.attn.to_q"].rule.weight == "int8"
    wanted = Rule("role:attention", "table4", activation_bits=6, rotation="none", method="rtn", table="twin-log")
    assert plans["blocks.0.attn.to_k"] == recipe.LayerPlan(wanted, group_size=64, hadamard_block=1)
    assert "proj_out" not in plans
    assert {plans[name].rule.weight for name in plans if "attn" not in name} == {"int3"}
    assert {plan.group_size for plan in plans.values() if plan.rule.weight == "int3"} == {32}
    assert list(plans) == [layer.name for layer in LAYERS if layer.name in plans]


def test_role_patterns_are_patterns(toml):
    text = '[[rule]]\nmatch = "role:{}"\nweight = "int8"\n'
    assert list(recipe.resolve(toml(text.format("*e*d*")), LAYERS)) == [
        "blocks.0.ff.in",
        "blocks.0.ff.out",
        "blocks.0.emb.linear",
    ]
    assert list(recipe.resolve(toml(text.format("attention")), LAYERS)) == ["blocks.0.attn.to_q", "blocks.0.attn.to_k"]


def test_a_role_is_no_name_and_a_name_no_role(toml):
    layers = [*LAYERS, Layer("attention", "other", 64, 64)]
    plans = recipe.resolve(toml('[[rule]]\nmatch = "attention"\nweight = "int8"\n'), layers)
    assert list(plans) == ["attention"]


def test_unused_rule_names_itself_and_near_names(toml):
    message = refusal(lambda: recipe.resolve(toml('[[rule]]\nmatch = "*"\n[[rule]]\nmatch = "blocks.0.atn.to_q"\n'), LAYERS))
    assert "rule 2" in message and "'blocks.0.atn.to_q'" in message and "mine" in message
    assert "did you mean blocks.0.attn.to_q" in message
    message = refusal(lambda: recipe.resolve(toml('[[rule]]\nmatch = "role:atention"\n'), LAYERS))
    assert "rule 1" in message and "role:attention" in message


def test_shadowed_rule_is_told_from_an_unused_one(toml):
    text = '[[rule]]\nmatch = "*"\n[[rule]]\nmatch = "*.to_q"\nweight = "int8"\n'
    message = refusal(lambda: recipe.resolve(toml(text), LAYERS))
    assert "rule 2" in message and "'*.to_q'" in message and "earlier" in message and "move it up" in message


def test_optional_rule_may_match_nothing(toml):
    text = '[[rule]]\nmatch = "nothing"\noptional = true\n[[rule]]\nmatch = "*"\n'
    assert len(recipe.resolve(toml(text), LAYERS)) == len(LAYERS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('wieght = "int8"', ["'wieght'", "did you mean weight"]),
        ("groupsize = 64", ["'groupsize'", "did you mean group_size"]),
        ('weight = "int5"', ["'int5'", "int4"]),
        ('weight = "INT4"', ["'INT4'", "int4"]),
        ('weight = ["int4"]', ["weight", "int4"]),
        ("weight = 4", ["weight", "4"]),
        ("group_size = 48", ["group_size", "48", "64"]),
        ("group_size = -64", ["group_size", "-64", "64"]),
        ('group_size = "64"', ["group_size", "'64'", "64"]),
        ("group_size = true", ["group_size", "True", "auto"]),
        ("group_size = 64.0", ["group_size", "64.0"]),
        ("activation_bits = 5", ["activation_bits", "5", "4"]),
        ("activation_bits = 8.0", ["activation_bits", "8.0"]),
        ("activation_bits = true", ["activation_bits", "True"]),
        ('activation_bits = "8"', ["activation_bits", "'8'"]),
        ('rotation = "hadamart"', ["rotation", "did you mean hadamard"]),
        ("rotation = true", ["rotation", "True", "hadamard"]),
        ('method = "gtpq"', ["method", "did you mean gptq"]),
        ('table = "twinlog"', ["table", "did you mean twin-log"]),
        ('optional = "no"', ["optional", "'no'"]),
    ],
)
def test_wrong_key_or_value_names_rule_and_remedy(toml, line: str, words: list[str]):
    message = refusal(lambda: toml(f'[[rule]]\nmatch = "*.to_q"\n\n[[rule]]\nmatch = "*.to_k"\n{line}\n'))
    assert "mine.toml, rule 2" in message and "*.to_k" in message
    for word in words:
        assert word in message


def test_unknown_key_of_the_file(toml):
    message = refusal(lambda: toml('[[rules]]\nmatch = "*"\n'))
    assert "mine.toml" in message and "'rules'" in message and "did you mean rule" in message


@pytest.mark.parametrize(
    "text",
    ["", 'name = "x"', "rule = []", "rule = 3", '[rule]\nmatch = "*"', 'rule = ["*"]', "[[rule]]\nmatch = 3", "[[rule]]\n"],
)
def test_recipe_without_a_usable_rule(toml, text: str):
    message = refusal(lambda: toml(text))
    assert "mine.toml" in message and "match = " in message


@pytest.mark.parametrize("content", [b"[[rule]\nmatch", b"\xff\xfe\x00", b'[[rule]]\nmatch = "*"\nmatch = "*"\n'])
def test_unreadable_toml_names_the_file(tmp_path: Path, content: bytes):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    message = refusal(lambda: recipe.from_toml(path))
    assert str(path) in message and "TOML" in message


def test_group_that_does_not_divide_names_rule_layer_and_fix(toml):
    layers = [Layer("blocks.0.attn.to_q", "attention", 64, 96)]
    message = refusal(lambda: recipe.resolve(toml('[[rule]]\nmatch = "*.to_q"\ngroup_size = 64\n'), layers))
    for word in ("mine", "rule 1", "'*.to_q'", "blocks.0.attn.to_q", "96", "group_size = 64", '"auto"', '"channel"'):
        assert word in message


def test_vector_that_does_not_divide_names_rule_layer_and_fix(toml):
    layers = [Layer("blocks.0.attn.to_q", "attention", 64, 66)]
    text = '[[rule]]\nmatch = "*"\nweight = "{}"\n'
    message = refusal(lambda: recipe.resolve(toml(text.format("vq256x4")), layers))
    for word in ("mine", "rule 1", "'*'", "blocks.0.attn.to_q", "66", "vq256x4", "4", "earlier rule"):
        assert word in message
    assert recipe.resolve(toml(text.format("vq64x2")), layers)["blocks.0.attn.to_q"].rule.weight == "vq64x2"


@pytest.mark.parametrize(
    ("width", "group", "block"),
    [(256, 64, 128), (96, 32, 32), (64, 64, 64), (1152, 64, 128), (44, 44, 4), (33, 33, 1), (1, 1, 1)],
)
def test_auto_group_and_rotation_take_any_width(width: int, group: int, block: int):
    plan = recipe.resolve(recipe.from_bits("w4a8"), [Layer("blocks.0.x", "other", 8, width)])["blocks.0.x"]
    assert (plan.group_size, plan.hadamard_block) == (group, block)


def test_channel_group_is_the_whole_width(toml):
    plans = recipe.resolve(toml('[[rule]]\nmatch = "*"\ngroup_size = "channel"\n'), LAYERS)
    assert {name: plan.group_size for name, plan in plans.items()} == {layer.name: layer.in_features for layer in LAYERS}


@pytest.mark.parametrize("bits", ["w4a8", "w2a16", "w8a4"])
def test_dictionary_form_round_trips_through_json(bits: str):
    preset = recipe.from_bits(bits)
    assert recipe.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


def test_toml_and_dictionary_mean_the_same(toml):
    read = toml('name = "x"\n[[rule]]\nmatch = "role:attention"\nweight = "table3"\n[[rule]]\nmatch = "*"\ngroup_size = 32\n')
    assert read.name == "x"
    assert recipe.from_dict(read.to_dict()) == read
    assert toml('[[rule]]\nmatch = "*"\n').name == "mine"


def test_rules_checked_when_built_in_python_too():
    rule = Rule("*", "int4")
    for wrong in ({"weight": "int5"}, {"group_size": 63}, {"activation_bits": 9}, {"rotation": "yes"}, {"method": "awq"}):
        assert "'*'" in refusal(lambda wrong=wrong: replace(rule, **wrong))
