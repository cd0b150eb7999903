"""Recipes: what is accepted, who wins, and that every refusal names the rule and the fix."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laws import LAW
from quantdit.formats import FORMATS, QSpec
from quantdit.recipes.presets import from_bits, with_weight_format
from quantdit.recipes.resolve import resolve, without_data
from quantdit.recipes.rules import (
    LARGEST_RANK,
    ROTATIONS,
    SMOOTHINGS,
    TABLES,
    Layer,
    LayerPlan,
    Recipe,
    Rule,
    from_dict,
    from_toml,
)
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec, layer_fields

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
def toml(tmp_path: Path) -> Callable[[str], Recipe]:
    """Parse text as a recipe file called `mine.toml`."""

    def read(text: str) -> Recipe:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return from_toml(path)

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
    plans = resolve(from_bits(f"w{x}a{y}"), LAYERS)
    block = plans["blocks.0.attn.to_q"].rule
    weight = {2: "trellis2_l12", 3: "trellis3_l12", 8: "int8"}.get(x, f"table{x}")
    f = FORMATS[block.weight]
    assert (f.code_bits / f.dim, block.weight, block.activation_bits) == (x, weight, y)
    assert plans["blocks.0.ff.out"].rule == block
    # Bits per weight are those asked for in every layer of a block; one row per image: no gain in fewer activation bits.
    for side in ("blocks.0.norm.linear", "blocks.0.emb.linear"):
        assert (plans[side].rule.activation_bits, plans[side].rule.activation_format) == (16, "int")
        assert plans[side].rule.weight == weight
    assert "proj_out" not in plans
    plan = plans["blocks.0.attn.to_q"]
    assert (plan.rule.activation_format, plan.activation_group_size) == (("affine", 32) if y == 4 else ("int", 0))


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
    message = refusal(lambda: from_bits(bits))
    assert repr(bits) in message
    assert "wXaY, such as w4a8, with X one of 2 3 4 6 8 and Y one of 4 6 8 16; auto and autoaY choose X for each layer" in message
    assert "known: " not in message and len(message) < 200
    if near:
        assert near in message.split("did you mean")[1].split("?")[0]


NUMBERS = {"group_size": "64", "activation_bits": "8", "activation_group_size": "32", "edge_activation_bits": "16"}
NUMBERS |= {"edge_steps": "3", "low_rank": "16", "cd_passes": "2", "ars_threshold": "1.5"}


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_in_quotes_is_refused_with_how_to_write_it(key: str):
    message = refusal(lambda: from_dict({"rule": [{"match": "*", key: NUMBERS[key]}]}))
    assert f"{key} = {NUMBERS[key]!r}" in message and message.endswith(f"; write {key} = {NUMBERS[key]} without quotes")


def test_every_key_that_is_a_number_is_tried_in_quotes():
    numbers = {field.name for field in dataclasses.fields(Rule) if re.search("int|float", field.type)}
    assert numbers == set(NUMBERS)


def test_preset_quantizes_a_model_without_modulation_or_outside_layers():
    only = [Layer("blocks.0.attn.to_q", "attention", 64, 64)]
    assert list(resolve(from_bits("w4a8"), only)) == ["blocks.0.attn.to_q"]


def test_first_match_wins(toml):
    plans = resolve(
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
    assert plans["blocks.0.attn.to_k"] == LayerPlan(wanted, group_size=64, activation_group_size=0)
    assert "proj_out" not in plans
    assert {plans[name].rule.weight for name in plans if "attn" not in name} == {"int3"}
    assert {plan.group_size for plan in plans.values() if plan.rule.weight == "int3"} == {32}
    assert list(plans) == [layer.name for layer in LAYERS if layer.name in plans]


NAME = st.text("ab0_.", min_size=1, max_size=12)


@LAW
@given(NAME, NAME, st.data())
def test_a_pattern_is_a_name_with_holes(name: str, other: str, data: st.DataObject):
    """`*` stands for any part of a path, dots included, `?` for a letter; a name without them is that layer's alone."""
    first, last = sorted((data.draw(st.integers(0, len(name))), data.draw(st.integers(0, len(name)))))
    star, letters = (f"{name[:first]}{hole}{name[last:]}" for hole in ("*", "?" * (last - first)))
    for prefix, path, role in (("", name, other), ("role:", other, name)):
        for pattern in (name, star, letters):
            assert Rule(prefix + pattern).matches(path, role)
        assert not Rule(prefix + letters).matches(path + "a", role + "a")
    assert Rule(name).matches(other, "x") == (name == other)
    whole = other.startswith(name[:first]) and other[first:].endswith(name[last:]) and len(other) >= first + len(name) - last
    assert Rule(star).matches(other, "x") == whole


def test_role_patterns_are_patterns(toml):
    text = '[[rule]]\nmatch = "role:{}"\nweight = "int8"\n'
    assert list(resolve(toml(text.format("*e*d*")), LAYERS)) == [
        "blocks.0.ff.in",
        "blocks.0.ff.out",
        "blocks.0.emb.linear",
    ]
    assert list(resolve(toml(text.format("attention")), LAYERS)) == ["blocks.0.attn.to_q", "blocks.0.attn.to_k"]


def test_a_role_is_no_name_and_a_name_no_role(toml):
    layers = [*LAYERS, Layer("attention", "other", 64, 64)]
    plans = resolve(toml('[[rule]]\nmatch = "attention"\nweight = "int8"\n'), layers)
    assert list(plans) == ["attention"]


def test_unused_rule_names_itself_and_near_names(toml):
    message = refusal(lambda: resolve(toml('[[rule]]\nmatch = "*"\n[[rule]]\nmatch = "blocks.0.atn.to_q"\n'), LAYERS))
    assert "rule 2" in message and "'blocks.0.atn.to_q'" in message and "mine" in message
    assert "did you mean blocks.0.attn.to_q" in message
    message = refusal(lambda: resolve(toml('[[rule]]\nmatch = "role:atention"\n'), LAYERS))
    assert "rule 1" in message and "role:attention" in message


def test_shadowed_rule_is_told_from_an_unused_one(toml):
    text = '[[rule]]\nmatch = "*"\n[[rule]]\nmatch = "*.to_q"\nweight = "int8"\n'
    message = refusal(lambda: resolve(toml(text), LAYERS))
    assert "rule 2" in message and "'*.to_q'" in message and "earlier" in message and "move it up" in message


def test_optional_rule_may_match_nothing(toml):
    text = '[[rule]]\nmatch = "nothing"\noptional = true\n[[rule]]\nmatch = "*"\n'
    assert len(resolve(toml(text), LAYERS)) == len(LAYERS)


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
        ('table = "twin-log-papers"', ["table", "did you mean twin-log-paper"]),
        ('table = ""', ["table", "''", "lloyd-max"]),
        ('activation_format = "affin"', ["activation_format", "did you mean affine"]),
        ('activation_format = "fp4"', ["activation_format", "'fp4'", "fp8"]),
        ("activation_format = 8", ["activation_format", "8"]),
        ("activation_group_size = 16", ["activation_group_size", "16", "64"]),
        ("activation_group_size = 0", ["activation_group_size", "0", "token"]),
        ("activation_group_size = -32", ["activation_group_size", "-32"]),
        ("activation_group_size = 32.0", ["activation_group_size", "32.0"]),
        ("activation_group_size = true", ["activation_group_size", "True", "token"]),
        ('activation_group_size = "32"', ["activation_group_size", "'32'"]),
        ('activation_scale = "statik"', ["activation_scale", "did you mean static"]),
        ("activation_scale = false", ["activation_scale", "False", "dynamic"]),
        ('rotation = "arse"', ["rotation", "did you mean ars"]),
        ('rotation = "AUTO"', ["rotation", "'AUTO'", "auto"]),
        ("ars_threshold = 0", ["ars_threshold", "0", "positive"]),
        ("ars_threshold = -1.5", ["ars_threshold", "-1.5", "positive"]),
        ("ars_threshold = nan", ["ars_threshold", "nan", "positive"]),
        ("ars_threshold = true", ["ars_threshold", "True", "positive"]),
        ('ars_threshold = "1"', ["ars_threshold", "'1'", "positive"]),
        ("ars_threshold = [1.0]", ["ars_threshold", "[1.0]", "positive"]),
        ('smooth = "absmx"', ["smooth", "did you mean absmax"]),
        ("smooth = 0.5", ["smooth", "0.5", "none"]),
        ("smooth = true", ["smooth", "True", "none"]),
        ("low_rank = -1", ["low_rank", "-1", "whole number"]),
        ("low_rank = 513", ["low_rank", "513", "512"]),
        ("low_rank = 32.0", ["low_rank", "32.0", "whole number"]),
        ("low_rank = true", ["low_rank", "True", "whole number"]),
        ('low_rank = "32"', ["low_rank", "'32'", "whole number"]),
        ("low_rank = 99999999999999999999", ["low_rank", "512"]),
        ("cd_passes = -1", ["cd_passes", "-1", "whole number"]),
        ("cd_passes = 101", ["cd_passes", "101", "100"]),
        ("cd_passes = 0.5", ["cd_passes", "0.5", "whole number"]),
        ("cd_passes = false", ["cd_passes", "False", "whole number"]),
        ("act_order = 1", ["act_order", "1", "true or false"]),
        ('act_order = "yes"', ["act_order", "'yes'", "true or false"]),
        ("bias_correction = 0", ["bias_correction", "0", "true or false"]),
        ("bias_correction = []", ["bias_correction", "[]", "true or false"]),
        ('table_rows = "chanel"', ["table_rows", "did you mean channel"]),
        ("table_rows = 1", ["table_rows", "1", "layer"]),
        ("table_rows = { a = 1 }", ["table_rows", "layer"]),
    ],
)
def test_wrong_key_or_value_names_rule_and_remedy(toml, line: str, words: list[str]):
    message = refusal(lambda: toml(f'[[rule]]\nmatch = "*.to_q"\n\n[[rule]]\nmatch = "*.to_k"\n{line}\n'))
    assert "mine.toml, rule 2" in message and "*.to_k" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["activation_bits = 8", 'activation_format = "fp8"'], ["fp8", "e4m3", "int4"]),
        (['weight = "int8"', "activation_bits = 8", 'activation_format = "fp8"'], ["fp8", "e4m3", "int8"]),
        (['weight = "table4"', "activation_bits = 8", 'activation_format = "fp8"'], ["fp8", "table4_e4m3", "table4 "]),
        (['weight = "vq256x4"', "activation_bits = 8", 'activation_format = "fp8"'], ["fp8", "vq256x4"]),
        (['weight = "fp8_e4m3"', "activation_bits = 6", 'activation_format = "fp8"'], ["fp8", "8 bits"]),
        (['weight = "fp8_e4m3"', "activation_bits = 16", 'activation_format = "fp8"'], ["16 bits"]),
        (['weight = "fp8_e4m3"', 'activation_format = "fp8"', "activation_bits = 8", "activation_group_size = 32"], ["groups"]),
        (
            ['weight = "fp8_e4m3"', 'activation_format = "fp8"', "activation_bits = 8", 'activation_scale = "static"'],
            ["fp8", "static"],
        ),
        (["activation_bits = 8", "activation_group_size = 64"], ["groups", "8 bits"]),
        (["activation_bits = 8", 'activation_format = "affine"', "activation_group_size = 64"], ["groups", "8 bits"]),
        (["activation_bits = 4", 'activation_format = "affine"', 'activation_scale = "static"'], ["static", "symmetric"]),
        (["activation_group_size = 64"], ["16 bits", "groups"]),
        (['activation_format = "affine"'], ["16 bits", "format"]),
        (['activation_scale = "static"'], ["16 bits", "static"]),
        (['method = "hqq"', 'weight = "table4"'], ["hqq", "table4", "int2 to int6"]),
        (['method = "hqq"', 'weight = "int8"'], ["hqq", "int8", "int2 to int6"]),
        (['method = "hqq"', 'weight = "fp8_e4m3"'], ["hqq", "fp8_e4m3"]),
        (['method = "hqq"', 'weight = "vq64x2"'], ["hqq", "vq64x2"]),
        (['method = "hqq"', 'weight = "table4_e4m3"'], ["hqq", "table4_e4m3"]),
    ],
)
def test_what_cannot_go_together_names_rule_and_reason(toml, lines: list[str], words: list[str]):
    text = "\n".join(['[[rule]]\nmatch = "*.to_q"\n\n[[rule]]\nmatch = "*.to_k"', *lines])
    message = refusal(lambda: toml(text))
    assert "mine.toml, rule 2" in message and "*.to_k" in message
    for word in words:
        assert word in message


def test_a_file_may_say_everything(toml):
    read = toml("""
        [[rule]]
        match = "role:attention"
        weight = "table4_e4m3"
        group_size = "channel"
        activation_bits = 8
        activation_format = "fp8"
        rotation = "auto"
        ars_threshold = 2.5
        smooth = "salience"
        low_rank = 16
        method = "rtn"
        act_order = false
        cd_passes = 0
        bias_correction = false
        table = "gaussian"
        table_rows = "channel"

        [[rule]]
        match = "role:feed_forward"
        weight = "int4"
        activation_bits = 4
        activation_group_size = 64
        activation_scale = "static"
        rotation = "ars"
        ars_threshold = 2
        smooth = "rms"
        method = "hqq"

        [[rule]]
        match = "*"
        weight = "dense"
        """)
    assert read.rules[0] == Rule(
        "role:attention",
        "table4_e4m3",
        "channel",
        activation_bits=8,
        activation_format="fp8",
        rotation="auto",
        ars_threshold=2.5,
        smooth="salience",
        low_rank=16,
        method="rtn",
        act_order=False,
        cd_passes=0,
        bias_correction=False,
        table="gaussian",
        table_rows="channel",
    )
    assert from_dict(json.loads(json.dumps(read.to_dict()))) == read
    plans = resolve(read, LAYERS)
    out = plans["blocks.0.ff.out"]
    assert out.rule.activation(out.activation_group_size, 7) == ActivationSpec(4, "int", 64, 7)
    q = plans["blocks.0.attn.to_q"]
    assert q.rule.activation(q.activation_group_size, 7) == ActivationSpec(8, "fp8", 0, 0)


def test_an_infinite_threshold_is_refused(toml):
    refusal(lambda: toml('[[rule]]\nmatch = "*"\nars_threshold = inf\n'))


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
    message = refusal(lambda: from_toml(path))
    assert str(path) in message and ("not valid TOML" in message or "not UTF-8 text" in message)


def test_group_that_does_not_divide_names_rule_layer_and_fix(toml):
    layers = [Layer("blocks.0.attn.to_q", "attention", 64, 96)]
    message = refusal(lambda: resolve(toml('[[rule]]\nmatch = "*.to_q"\ngroup_size = 64\n'), layers))
    for word in ("mine", "rule 1", "'*.to_q'", "blocks.0.attn.to_q", "96", "group_size = 64", '"auto"', '"channel"'):
        assert word in message


def test_vector_that_does_not_divide_names_rule_layer_and_fix(toml):
    layers = [Layer("blocks.0.attn.to_q", "attention", 64, 66)]
    text = '[[rule]]\nmatch = "*"\nweight = "{}"\n'
    message = refusal(lambda: resolve(toml(text.format("vq256x4")), layers))
    for word in ("mine", "rule 1", "'*'", "blocks.0.attn.to_q", "66", "vq256x4", "4", "fallback"):
        assert word in message
    assert resolve(toml(text.format("vq64x2")), layers)["blocks.0.attn.to_q"].rule.weight == "vq64x2"


@pytest.mark.parametrize(
    ("weight", "width", "group"),
    [
        *[("int4", width, group) for width, group in ((256, 64), (96, 32), (64, 64), (1152, 64), (44, 44), (33, 33), (1, 1))],
        *[("int3", 96, 32), ("int2", 256, 32), ("int2", 44, 44), ("int6", 256, 256), ("int8", 256, 256), ("table4", 256, 256)],
    ],
)
def test_auto_group_takes_any_width(weight: str, width: int, group: int):
    only = Recipe("r", (Rule("*", weight),))
    assert resolve(only, [Layer("blocks.0.x", "other", 8, width)])["blocks.0.x"].group_size == group


@pytest.mark.parametrize("wanted", [32, 64, 128, "token"])
@pytest.mark.parametrize(
    ("width", "largest"), [(1152, 128), (256, 128), (64, 64), (192, 64), (96, 32), (32, 32), (44, 0), (33, 0), (1, 0)]
)
def test_activation_groups_fall_back_to_smaller_ones(wanted: int | str, width: int, largest: int):
    """A recipe speaks of many widths: what does not divide one becomes the next smaller group that does, else the token."""
    only = Recipe("r", (Rule("*", activation_bits=4, activation_group_size=wanted),))
    plan = resolve(only, [Layer("x", "other", 8, width)])["x"]
    assert plan.activation_group_size == (0 if wanted == "token" else min(wanted, largest))


@pytest.mark.parametrize("bits", [f"w{x}a{y}" for x in (2, 3, 4, 6, 8) for y in (4, 6, 8, 16)])
@pytest.mark.parametrize("width", [64, 44, 33])
def test_every_preset_makes_a_layer_that_can_be_stored(bits: str, width: int):
    plan = resolve(from_bits(bits), [Layer("x", "attention", 8, width)])["x"]
    spec = QSpec(plan.rule.weight, 8, width, plan.group_size)
    layer_fields(LayerSpec(spec, plan.rule.activation(plan.activation_group_size, 10)))


def test_channel_group_is_the_whole_width(toml):
    plans = resolve(toml('[[rule]]\nmatch = "*"\ngroup_size = "channel"\n'), LAYERS)
    assert {name: plan.group_size for name, plan in plans.items()} == {layer.name: layer.in_features for layer in LAYERS}


def test_layers_that_codewords_do_not_divide_take_what_the_rule_says_otherwise():
    layers = [Layer("even", "attention", 8, 32), Layer("odd", "attention", 8, 33)]
    plans = resolve(with_weight_format(from_bits("w2a16"), "vq"), layers)
    assert [plans[name].rule.weight for name in ("even", "odd")] == ["vq256x4", "table2"]
    with pytest.raises(ValueError, match=r'layer odd has 33 inputs, which vq256x4 .* fallback = "table2"'):
        resolve(Recipe("mine", (Rule("*", weight="vq256x4"),)), layers)
    with pytest.raises(ValueError, match="goes with a format, not with 'dense'"):
        Rule("*", weight="dense", fallback="table2")


def test_weight_formats_replace_each_other():
    vq, table = (with_weight_format(from_bits("w2a16"), kind) for kind in ("vq", "table"))
    assert with_weight_format(table, "vq") == vq and {rule.weight for rule in vq.rules} == {"vq256x4", "dense"}
    assert with_weight_format(vq, "trellis") == from_bits("w2a16")
    assert {rule.weight for rule in table.rules} == {"table2", "dense"} and {rule.fallback for rule in table.rules} == {""}
    assert {rule.weight for rule in with_weight_format(from_bits("w3a8"), "vq").rules} == {"vq64x2", "dense"}
    assert {rule.weight for rule in with_weight_format(vq, "ssvq").rules} == {"ssvq256x8", "dense"}
    for bits in ("w2a16", "w3a8", "w4a8"):
        weights = {rule.weight for rule in with_weight_format(from_bits(bits), "trellis").rules}
        assert weights == {f"trellis{bits[1]}_l12", "dense"}
    with pytest.raises(ValueError, match="w4a8: weight format ssvq has no weights of this width; use w2 or w3"):
        with_weight_format(from_bits("w4a8"), "ssvq")


def test_presets_descend_where_it_gains_something():
    def passes(recipe: Recipe) -> set[int]:
        return {rule.cd_passes for rule in recipe.rules if rule.weight != "dense"}

    for recipe in (from_bits("w2a16"), from_bits("w3a8"), with_weight_format(from_bits("w4a8"), "trellis")):
        assert passes(recipe) == {0}
    assert passes(from_bits("w4a8")) == passes(with_weight_format(from_bits("w3a8"), "table")) == {Rule.cd_passes} == {2}


@pytest.mark.parametrize("of", ["auto", "autoa16"])
def test_weight_formats_go_with_fixed_bits(of: str):
    with pytest.raises(ValueError, match=r"weight format trellis goes with fixed bits.*level tables"):
        with_weight_format(from_bits(of), "trellis")


@pytest.mark.parametrize(
    ("weight", "keys", "words"),
    [
        ("trellis3_l12", {"group_size": 64}, "group_size = 64 goes with int2 to int6"),
        ("table4", {"group_size": 128}, "group_size = 128 goes with int2 to int6"),
        ("trellis3_l12", {"table": "twin-log"}, "table = 'twin-log' goes with table2 to table6"),
        ("int4", {"table_rows": "channel"}, "table_rows = 'channel' goes with table2 to table6"),
    ],
)
def test_a_key_that_would_mean_nothing_is_refused(weight: str, keys: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Rule("*", weight=weight, **keys)
    Rule("*", weight=weight, fallback={"group_size": "int2"}.get(next(iter(keys)), "table2"), **keys)


@pytest.mark.parametrize(
    "keys",
    [{"rotation": "ars"}, {"rotation": "outlier"}, {"smooth": "rms"}, {"low_rank": 4}],
    ids=lambda keys: "-".join(map(str, *keys.items())),
)
def test_what_only_data_can_give_is_refused_without(keys: dict):
    (key, value), *_ = keys.items()
    with pytest.raises(ValueError, match=rf"{key} = \W?{value}\W? needs calibration data"):
        without_data(Recipe("mine", (Rule("*", **keys),)))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=20)
ACTIVATIONS = ({}, {"activation_bits": 8}, {"activation_bits": 6, "activation_scale": "static"})
ACTIVATIONS += ({"activation_bits": 4, "activation_format": "affine", "activation_group_size": 32},)
ACTIVATIONS += ({"activation_bits": 4, "edge_activation_bits": 8, "edge_steps": 3},)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """Any pattern, weight, activation and way to calibrate that go together."""
    values = draw(st.fixed_dictionaries({
        "match": TEXT,
        "weight": st.sampled_from(["dense", "auto", *FORMATS]),
        "rotation": st.sampled_from(ROTATIONS),
        "ars_threshold": st.floats(0, exclude_min=True, allow_infinity=False) | st.integers(1, 9),
        "smooth": st.sampled_from(SMOOTHINGS),
        "low_rank": st.integers(0, LARGEST_RANK),
        "method": st.sampled_from(["gptq", "rtn"]),
        "cd_passes": st.integers(0, 100),
        **dict.fromkeys(("act_order", "bias_correction", "optional"), st.booleans()),
    }))  # fmt: skip
    if values["weight"] in FORMATS:
        values["fallback"] = draw(st.sampled_from(["", *FORMATS]))
    if values["weight"].startswith("int") and values["weight"] != "int8":
        values["group_size"] = draw(st.sampled_from(["auto", "channel", 32, 64, 128]))
    if values["weight"].startswith("table"):
        values |= {"table": draw(st.sampled_from(TABLES)), "table_rows": draw(st.sampled_from(["layer", "channel"]))}
    return Rule(**values, **draw(st.sampled_from(ACTIVATIONS)))


def as_toml(value: dict) -> str:
    return "\n".join(f"{key} = {json.dumps(v, ensure_ascii=False)}" for key, v in value.items() if key != "rule")


@LAW
@given(TEXT, st.lists(rules(), min_size=1, max_size=2))
def test_a_recipe_comes_back_from_its_dictionary_and_from_a_file(tmp_path_factory, name: str, made: list[Rule]):
    whole = Recipe(name, tuple(made))
    assert from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    path = tmp_path_factory.mktemp("recipes") / "mine.toml"
    tables = [as_toml(rule) for rule in whole.to_dict()["rule"]]
    path.write_text("\n[[rule]]\n".join([as_toml(whole.to_dict()), *tables]), encoding="utf-8")
    assert from_toml(path) == whole


def test_a_file_without_a_name_has_that_of_the_file(toml):
    assert toml('[[rule]]\nmatch = "*"\n').name == "mine"


def test_rules_checked_when_built_in_python_too():
    rule = Rule("*", "int4")
    for wrong in ({"weight": "int5"}, {"group_size": 63}, {"activation_bits": 9}, {"rotation": "yes"}, {"method": "awq"}):
        assert "'*'" in refusal(lambda wrong=wrong: replace(rule, **wrong))


def test_a_trellis_needs_outputs_to_go_round():
    """Of fewer than 32 the layer is refused by name, or takes what the rule has for it otherwise."""
    layers = [Layer("a", "attention", 32, 20), Layer("b", "attention", 31, 20)]
    rule = Rule("*", weight="trellis4_l12")
    with pytest.raises(ValueError, match=r"layer b has 31 outputs, and trellis4_l12 needs 32; name a scalar format"):
        resolve(Recipe("r", (rule,)), layers)
    plans = resolve(Recipe("r", (replace(rule, fallback="table4"),)), layers)
    assert [plan.rule.weight for plan in plans.values()] == ["trellis4_l12", "table4"]


def test_former_keys_are_read_and_written_as_todays(toml):
    """Recipes, and checkpoints, of earlier versions say descent and otherwise."""
    read = toml('[[rule]]\nmatch = "*"\nweight = "vq256x4"\ndescent = 1\notherwise = "table2"\n')
    assert read.rules == (Rule("*", "vq256x4", cd_passes=1, fallback="table2"),)
    assert {"cd_passes", "fallback"} <= read.to_dict()["rule"][0].keys()
    assert "descent is the former name of cd_passes" in refusal(lambda: toml('[[rule]]\nmatch = "*"\ndescent = 1\ncd_passes = 1'))
