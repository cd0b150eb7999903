"""One linear from statistics to stored tensors: what must hold for every plan, measured on the layer that comes out."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from quantdit.calibration import choice
from quantdit.calibration import stats as statistics
from quantdit.calibration.activations import quantized_inputs, static_scales
from quantdit.calibration.errors import output_error
from quantdit.calibration.layer import Quantized, quantize_layer, quantize_layers
from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.calibration.stats import Stats
from quantdit.checkpoints import checkpoint
from quantdit.layers.quant_linear import QuantLinear, follow_timesteps
from quantdit.recipes.resolve import resolve
from quantdit.recipes.rules import ROTATIONS, SMOOTHINGS, Layer, LayerPlan, Recipe, Rule
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from quantdit.tensors.qtensor import QTensor

OUT, WIDTH, BUCKETS = 96, 64, 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_inputs(rows: int, width: int = WIDTH, seed: int = 0, mean: float = 0.5) -> torch.Tensor:
    """Correlated, off centre, two channels far stronger than the others."""
    x = random(rows, width, seed=seed) @ random(width, width, seed=99) / width**0.5 + mean * random(width, seed=98)
    x[:, 3] *= 20
    x[:, width // 2] *= 8
    return x


@cache
def seen(width: int = WIDTH, mean: float = 0.5) -> Stats:
    """Three timestep buckets of inputs, the later ones larger."""
    stats = statistics.init(width, BUCKETS)
    for i in range(9):
        bucket = i // 3
        stats = statistics.update(stats, heavy_inputs(150, width, seed=i, mean=mean) * (1 + bucket), bucket)
    return stats


@cache
def layer_weight(out: int = OUT, width: int = WIDTH) -> torch.Tensor:
    w = random(out, width, seed=50) * (0.5 + random(out, 1, seed=51).abs()) / width**0.5
    return w + 0.3 * random(out, 2, seed=52) @ random(2, width, seed=53) / width**0.5  # something for a low-rank branch


def plan_of(rule: Rule, out: int = OUT, width: int = WIDTH) -> LayerPlan:
    return resolve(Recipe("r", (rule,)), [Layer("x", "other", out, width)])["x"]


def made_by(seed: int = 0, bias: torch.Tensor | None = None, stats: Stats | None = None, **fields: object) -> Quantized:
    rule = Rule("*", **{"rotation": "none", "bias_correction": False, **fields})
    return quantize_layer(layer_weight(), bias, stats or seen(), plan_of(rule), seed)


def as_layer(made: Quantized) -> QuantLinear:
    return QuantLinear.from_tensors(made.spec, made.tensors, made.bias)


def by_buckets(layer: QuantLinear, x: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
    y = torch.empty(len(x), layer.out_features)
    for bucket in buckets.unique().tolist():
        layer.bucket = bucket
        y[buckets == bucket] = layer(x[buckets == bucket])
    return y


def real_error(made: Quantized, bias: torch.Tensor | None = None, stats: Stats | None = None, rows: slice = slice(None)) -> float:
    """Relative error of the layer's own output on sampled rows of calibration."""
    s = stats or seen()
    x, buckets = s.rows[rows], s.row_buckets[rows]
    expected = x @ layer_weight().T
    with torch.no_grad():
        y = by_buckets(as_layer(made), x, buckets) - (0 if bias is None else bias)
    return float((y - expected).norm() / expected.norm())


# ---- every combination can be stored

KINDS = {
    "a16": {},
    "a8": {"activation_bits": 8},
    "a6 token": {"activation_bits": 6},
    "a4 g32": {"activation_bits": 4, "activation_group_size": 32},
    "a4 affine g64": {"activation_bits": 4, "activation_format": "affine", "activation_group_size": 64},
    "a4 affine": {"activation_bits": 4, "activation_format": "affine"},
    "a8 static": {"activation_bits": 8, "activation_scale": "static"},
    "a4 static g32": {"activation_bits": 4, "activation_scale": "static", "activation_group_size": 32},
    "a8 fp8": {"activation_bits": 8, "activation_format": "fp8"},
}
WEIGHTS = {"gptq": ("int8", "fp8_e4m3"), "rtn": ("int8", "fp8_e4m3"), "hqq": ("int3", None)}


class Holder(nn.Module):
    """A model of linears that a checkpoint can hold: what write_transformer asks of a diffusers model."""

    def __init__(self, layers: dict[str, nn.Module], width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.config = {"names": list(layers), "width": width}

    @classmethod
    def from_config(cls, config: dict) -> Holder:
        width = config["width"]
        return cls({name: nn.Linear(width, OUT, bias="nobias" not in name) for name in config["names"]}, width)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> type[Holder]:
    """Make diffusers know the class Holder."""
    import diffusers

    monkeypatch.setattr(diffusers, "Holder", Holder, raising=False)
    return Holder


def roundtrip(model: Holder, folder: Path, edges: tuple[float, ...]) -> Holder:
    follow_timesteps(model, edges)
    checkpoint.write_transformer(model, folder, {"name": "test"}, {})
    return checkpoint.read_transformer(folder)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("method", WEIGHTS)
def test_every_combination_survives_its_checkpoint(
    holder: type[Holder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rotation: str, method: str
):
    """Saved, loaded, the same output to the bit in every bucket; the report is JSON; nothing is NaN.

    Every rotation with every smoothing, rank and method, the kinds of activations dealt out so that each meets all of them.
    """
    monkeypatch.setattr(choice, "ALPHAS", (0.5,))
    kinds = [k for k in KINDS if method != "hqq" or k != "a8 fp8"]
    place = list(ROTATIONS).index(rotation) * 3 + list(WEIGHTS).index(method)
    stats = few()
    layers = {}
    for number, (smooth, rank) in enumerate(itertools.product(SMOOTHINGS, (0, 8))):
        kind = kinds[(number + place * 2) % len(kinds)]
        fields = {"smooth": smooth, "low_rank": rank, "method": method, "cd_passes": number % 3, **KINDS[kind]}
        rule = Rule("*", WEIGHTS[method][kind == "a8 fp8"], rotation=rotation, **fields)
        bias = random(OUT, seed=number) if number % 4 > 1 else None
        made = quantize_layer(layer_weight(), bias, stats, plan_of(rule), number)
        json.dumps(made.report, allow_nan=False)
        layers[f"{number}_{'bias' if bias is not None else 'nobias'}"] = as_layer(made)
    loaded = roundtrip(holder(layers), tmp_path, tuple(float(b) for b in range(BUCKETS, 0, -1)))
    x = heavy_inputs(11, seed=77)
    for name, layer in layers.items():
        other = loaded.layers[name]
        assert other.layer_spec == layer.layer_spec, name
        for bucket in range(BUCKETS if layer.layer_spec.activation.buckets else 1):
            layer.bucket = other.bucket = bucket
            y = layer(x)
            assert bool(torch.isfinite(y).all()), name
            assert torch.equal(other(x), y), name


@cache
def few() -> Stats:
    """Rows in two of three buckets."""
    stats = statistics.init(WIDTH, BUCKETS)
    for bucket in (0, 2):
        stats = statistics.update(stats, heavy_inputs(100, seed=bucket), bucket)
    return stats


# ---- the same layer, the same bytes


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": "int8", "rotation": "auto", "smooth": "rms", "low_rank": 4, "activation_bits": 4, "method": "rtn"},
        {"weight": "vq64x2", "rotation": "outlier"},
        {"weight": "int4", "rotation": "hadamard", "activation_bits": 6, "activation_scale": "static"},
    ],
)
def test_the_seed_decides_and_nothing_else(fields: dict):
    torch.manual_seed(0)
    first = made_by(7, random(OUT, seed=1), **fields)
    torch.manual_seed(1)
    again, other = made_by(7, random(OUT, seed=1), **fields), made_by(8, random(OUT, seed=1), **fields)
    assert first.report == again.report and first.spec == again.spec
    assert first.tensors.keys() == again.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), again.tensors[name].contiguous().view(torch.uint8)), name
    assert torch.equal(first.bias, again.bias)
    assert any(t.shape != other.tensors[n].shape or not torch.equal(t, other.tensors[n]) for n, t in first.tensors.items())


def test_what_goes_in_is_left_alone():
    weight, bias, stats = layer_weight().clone(), random(OUT), seen()
    rows, gram = stats.rows.clone(), stats.gram.clone()
    rule = Rule("*", "int8", activation_bits=4, rotation="auto", smooth="absmax", low_rank=4, method="rtn")
    made = quantize_layer(weight, bias, stats, plan_of(rule), 0)
    assert torch.equal(weight, layer_weight()) and torch.equal(bias, random(OUT))
    assert torch.equal(stats.rows, rows) and torch.equal(stats.gram, gram)
    assert made.bias is not bias


# ---- relations between methods, on the layer's own output


@pytest.mark.parametrize("weight", ["table3", "int4", "fp8_e4m3"])
def test_error_feedback_moves_weights_further_and_outputs_less(weight: str):
    fed, nearest = made_by(weight=weight), made_by(weight=weight, method="rtn")
    distance = [float((as_layer(m).weight - layer_weight()).norm()) for m in (fed, nearest)]
    assert distance[0] > distance[1]
    assert real_error(fed) < real_error(nearest)
    assert fed.report["weight_only_rel_rmse"] < nearest.report["weight_only_rel_rmse"]


@pytest.mark.parametrize("weight", ["table2", "table3", "int4", "int8"])
@pytest.mark.parametrize("act_order", [False, True])
def test_descent_is_never_worse_on_the_objective(weight: str, act_order: bool):
    """More passes, less `tr(D G D^T)`: a column takes the best of its levels, all others held. Scales are refitted after."""
    errors = []
    for passes in (0, 1, 2, 8):
        options = WeightOptions(act_order=act_order, cd_passes=passes)
        q = quantize_weight(layer_weight(), seen().gram, weight, 32 if weight == "int4" else WIDTH, options=options)
        errors.append(output_error(q.dequantize() - layer_weight(), layer_weight(), seen().gram))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


@pytest.mark.parametrize("weight", ["int4", "table3", "table4"])
def test_act_order_helps_where_few_inputs_have_the_power(weight: str):
    """Inputs of a tail: the strong ones rounded first, while all others can make up for them. Better in the mean of 8 layers."""
    errors = {False: 0.0, True: 0.0}
    for seed in range(8):
        x = random(400, WIDTH, seed=seed) @ random(WIDTH, WIDTH, seed=seed + 20) / 8
        gram = (x * torch.logspace(1.5, -1, WIDTH).flip(0)).T @ (x * torch.logspace(1.5, -1, WIDTH).flip(0))
        w = random(48, WIDTH, seed=seed + 40)
        for order in errors:
            q = quantize_weight(w, gram, weight, 32 if weight == "int4" else WIDTH, options=WeightOptions(act_order=order))
            errors[order] += output_error(q.dequantize() - w, w, gram)
    assert errors[True] < errors[False]


@pytest.mark.parametrize("rotation", ["hadamard", "outlier"])
@pytest.mark.parametrize("smooth", ["none", "absmax"])
def test_transforms_leave_the_output_unchanged(rotation: str, smooth: str):
    """To 1e-5: a weight that is whole numbers after the transform is stored exactly, so that nothing else is left."""
    made = made_by(weight="int8", rotation=rotation, smooth=smooth, method="rtn")
    t = as_layer(made).transform
    integers = torch.randint(-127, 128, (OUT, WIDTH), generator=torch.Generator().manual_seed(3))
    integers[:, 0] = 127
    dense = transform.weight_back(t, integers.float() / 64)
    q = QTensor(made.spec.weight, integers.to(torch.int8), torch.full((OUT,), 1 / 64))
    layer = QuantLinear.from_tensors(made.spec, q.tensors() | transform.tensors(t), None)
    x = heavy_inputs(50)
    expected = x.double() @ dense.double().T
    assert float((layer(x).double() - expected).norm() / expected.norm()) < 1e-5
    assert float((layer.weight - dense).norm() / dense.norm()) < 1e-5


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_more_bits_are_never_worse(method: str, rotation: str):
    for family in (("table2", "table3", "table4", "table6"), ("int2", "int3", "int4", "int6", "int8")):
        errors = [real_error(made_by(weight=w, method=method, rotation=rotation)) for w in family]
        assert errors == sorted(errors, reverse=True), family
    errors = [real_error(made_by(weight="int8", activation_bits=b, method=method, rotation=rotation)) for b in (4, 6, 8, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("bits", "part"), [(4, 0.8), (8, 0.98), (16, 0.98)])
def test_automatic_smoothing_and_rotation_pay(bits: int, part: float):
    """On inputs with two large channels they leave this part of a Hadamard's error, on the rows they are compared on."""
    common = {"weight": "int4", "activation_bits": bits}
    auto, fixed = (made_by(**choice, **common) for choice in ({"rotation": "auto", "smooth": "auto"}, {"rotation": "hadamard"}))
    held = slice(1, None, 2)
    assert real_error(auto, rows=held) < part * real_error(fixed, rows=held)


def test_layers_of_one_input_share_their_preparation():
    """q, k and v are quantized as one, whichever of them is asked; alone each would be smoothed in its own way."""
    parts = {name: (layer_weight() * random(1, WIDTH, seed=n).exp(), random(OUT)) for n, name in enumerate("qkv")}
    plan = plan_of(Rule("*", "int4", activation_bits=8, rotation="auto", smooth="auto"))
    together = quantize_layers(parts, seen(), plan, 0)
    alone = quantize_layer(*parts["q"], seen(), plan, 0)
    signs = [made.tensors["premultiplier"] for made in together.values()]
    assert torch.equal(signs[0], signs[1]) and torch.equal(signs[0], signs[2])
    assert len({s.data_ptr() for s in signs}) == 3, "a file takes each tensor once"
    assert not torch.equal(signs[0], alone.tensors["premultiplier"])
    for name, (weight, bias) in parts.items():
        x = heavy_inputs(64, seed=77)
        y = as_layer(together[name])(x)
        assert float((y - (x @ weight.T + bias)).norm() / (x @ weight.T).norm()) < 0.1, name


@pytest.mark.parametrize("smooth", ["rms", "absmax", "salience"])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_smoothing_is_never_worse_than_none(smooth: str, rotation: str):
    """On the rows it compares by, reported and real; on these inputs without a rotation it is much better."""
    common = {"weight": "int4", "activation_bits": 6, "rotation": rotation, "method": "rtn"}
    made, plain = made_by(smooth=smooth, **common), made_by(**common)
    report = made.report["smoothing"]
    assert report["errors"][str(report["alpha"])] == min(report["errors"].values()) <= report["errors"]["None"]
    held = slice(1, None, 2)
    assert real_error(plain, rows=held) == pytest.approx(report["errors"]["None"], rel=1e-3)
    assert real_error(made, rows=held) == pytest.approx(report["errors"][str(report["alpha"])], rel=1e-3)
    assert real_error(made, rows=held) <= real_error(plain, rows=held) * (1 + 1e-3)
    assert made.spec.smoothed == (report["alpha"] is not None)
    if rotation == "none":
        assert real_error(made, rows=held) < 0.8 * real_error(plain, rows=held)


def test_ars_follows_j():
    """LRQ-DiT's rule: Hadamard where the RMS of the inputs is below the threshold, else the outlier rotation."""
    rms = seen().rms
    for threshold, kind in ((rms * 1.01, "hadamard"), (rms * 0.99, "outlier")):
        made = made_by(rotation="ars", ars_threshold=threshold, weight="int8", method="rtn")
        assert made.spec.rotation == made.report["rotation"]["chosen"] == kind
        assert made.report["rotation"]["asked"] == "ars"
        assert made.report["rms"] == pytest.approx(rms)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_low_rank_branch_is_never_worse_than_none(bits: int, method: str):
    common = {"weight": "int3", "activation_bits": bits, "rotation": "hadamard", "method": method}
    plain, made = made_by(**common), made_by(low_rank=8, **common)
    told = made.report["low_rank"]
    if told is None:
        assert made.spec.rank == 0 and "up" not in made.tensors
        assert real_error(made) == real_error(plain)
        return
    assert told["error"] < told["error_without"] and made.spec.rank == told["rank"] == 8
    assert real_error(made) <= real_error(plain) * 1.02  # measured on a sample, chosen by the Gram matrix of all
    assert method == "gptq" or real_error(made) < 0.95 * real_error(plain)


# ---- bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fields", [{"weight": "int3"}, {"weight": "table2", "rotation": "hadamard", "low_rank": 4}])
def test_the_bias_takes_up_the_mean_of_the_error(fields: dict, dtype: torch.dtype):
    """The mean output error of weights alone is gone, up to the rounding of the bias to what it was stored in."""
    bias = random(OUT, seed=2).to(dtype).float()
    stats = seen(mean=3.0)
    made = made_by(0, bias, stats, bias_correction=True, method="rtn", **fields)
    assert made.bias.dtype == torch.float32
    kept = {torch.float32: torch.float32, torch.float16: torch.float16, torch.bfloat16: torch.float16}[dtype]
    assert torch.equal(made.bias.to(kept).float(), made.bias)  # these bfloat16 numbers are float16 numbers too
    mean = stats.mean
    layer = as_layer(made)
    off = layer(mean[None])[0] - (layer_weight() @ mean + bias)
    unit = {torch.float32: 2.0**-22, torch.float16: 2.0**-11}[kept]
    assert bool((off.abs() <= unit * made.bias.abs() + 2e-5 * (layer_weight().abs() @ mean.abs())).all())
    plain = made_by(0, bias, stats, bias_correction=False, method="rtn", **fields)
    assert torch.equal(plain.bias, bias)
    assert float(off.norm()) < 0.1 * float((as_layer(plain)(mean[None])[0] - (layer_weight() @ mean + bias)).norm())


def test_bias_correction_lowers_the_output_error():
    bias = random(OUT, seed=2)
    stats = seen(mean=3.0)
    errors = [
        real_error(made_by(0, bias, stats, bias_correction=c, weight="table2", method=m), bias, stats)
        for m in ("rtn", "gptq")
        for c in (True, False)
    ]
    assert errors[0] < errors[1] and errors[2] < errors[3] * 1.001


def test_a_layer_without_a_bias_keeps_none():
    for correction in (True, False):
        made = made_by(weight="int8", bias_correction=correction, method="rtn", low_rank=4, activation_bits=4)
        assert made.bias is None and as_layer(made).bias is None
    assert as_layer(made)(heavy_inputs(3)).shape == (3, OUT)


# ---- hostile statistics and weights


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fields", [{}, {"rotation": "outlier", "smooth": "rms", "low_rank": 4}, {"weight": "vq64x2"}])
def test_weights_that_are_not_finite_are_refused(bad: float, fields: dict):
    weight = layer_weight().clone()
    weight[3, 5] = bad
    rule = Rule("*", **{"weight": "int4", "method": "rtn", **fields})
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_layer(weight, None, seen(), plan_of(rule), 0)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_a_dead_layer_stays_dead(rotation: str):
    """Weights of zeros, as a fresh adaLN-zero model has: output zero, report finite."""
    rule = Rule("*", "int4", activation_bits=8, rotation=rotation, smooth="rms", low_rank=4, method="rtn")
    made = quantize_layer(torch.zeros(OUT, WIDTH), random(OUT), seen(), plan_of(rule), 0)
    json.dumps(made.report, allow_nan=False)
    assert torch.equal(as_layer(made)(heavy_inputs(5)), random(OUT).expand(5, OUT))


@pytest.mark.parametrize("rotation", ["hadamard", "auto"])
@pytest.mark.parametrize("fields", [{"activation_bits": 8}, {"activation_bits": 4, "activation_scale": "static"}])
def test_inputs_of_zeros(rotation: str, fields: dict):
    """A branch of the model that is switched off: nothing to calibrate on, the weight is rounded as it is."""
    stats = statistics.update(statistics.init(WIDTH, BUCKETS), torch.zeros(50, WIDTH), 1)
    rule = Rule("*", "int8", rotation=rotation, smooth="absmax", low_rank=4, method="rtn", **fields)
    made = quantize_layer(layer_weight(), None, stats, plan_of(rule), 0)
    json.dumps(made.report, allow_nan=False)
    assert float((as_layer(made).weight - layer_weight()).norm()) < 0.02 * float(layer_weight().norm())


@pytest.mark.parametrize("rows", [1, 4])
def test_inputs_that_never_vary(rows: int):
    """As at a timestep embedder sampled at one step: the bias takes up everything, and error feedback has nothing to do."""
    x = heavy_inputs(1).expand(rows, WIDTH) + 3
    stats = statistics.init(WIDTH, 1)
    for _ in range(3):
        stats = statistics.update(stats, x, 0)
    made = quantize_layer(layer_weight(), random(OUT), stats, plan_of(Rule("*", "int4")), 0)
    assert float((as_layer(made)(x[:1]) - (x[:1] @ layer_weight().T + random(OUT))).abs().max()) < 1e-2


# ---- static scales


def test_static_scales_are_of_their_bucket():
    """Inputs grow with the bucket, so do the scales; a bucket that saw nothing takes a neighbour's; all are positive."""
    activation = ActivationSpec(8, buckets=5)
    x, buckets = seen().rows, seen().row_buckets
    scales = static_scales(x, buckets, activation)
    assert scales.shape == (5,) and scales.dtype == torch.float32 and bool((scales > 0).all())
    assert scales[0] < scales[1] < scales[2] == scales[3] == scales[4]
    peaks = torch.stack([x[buckets == b].abs().max() for b in range(3)]) / 127
    assert bool((scales[:3] <= peaks * (1 + 1e-6)).all())
    assert static_scales(x[:0], buckets[:0], activation).tolist() == [1.0] * 5
    assert static_scales(x, buckets, ActivationSpec(8)) is None


@pytest.mark.parametrize(
    "activation",
    [
        ActivationSpec(16),
        ActivationSpec(8),
        ActivationSpec(4, "affine", 32),
        ActivationSpec(8, "fp8"),
        ActivationSpec(6, buckets=3),
        ActivationSpec(8, buckets=3, edge_bits=16, last_bucket=2),
        ActivationSpec(4, "affine", 32, edge_bits=8, last_bucket=2),
    ],
    ids=str,
)
def test_quantized_inputs_are_what_the_layer_sees(activation: ActivationSpec):
    """Through a layer whose weight is the identity."""
    fp8 = activation.format == "fp8"
    q = quantize_weight(torch.eye(WIDTH), torch.eye(WIDTH), "fp8_e4m3" if fp8 else "int8", WIDTH, "rtn")
    x, buckets = seen().rows[:90], seen().row_buckets[:90]
    scales = static_scales(x, buckets, activation)
    tensors = q.tensors() | ({} if scales is None else {"static_scale": scales})
    layer = QuantLinear.from_tensors(LayerSpec(q.spec, activation), tensors, None)
    torch.testing.assert_close(by_buckets(layer, x, buckets), quantized_inputs(x, activation, scales, buckets), rtol=1e-6, atol=0)


def test_a_call_tells_its_layers_the_bucket_of_its_timestep():
    """By keyword or by position, a number or a tensor, the largest of several; none at all means the last bucket."""

    class Model(nn.Module):
        def __init__(self, layer: QuantLinear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, timestep: object = None) -> torch.Tensor:
            return self.layer(x)

    made = made_by(weight="int8", activation_bits=4, activation_scale="static", method="rtn")
    layer = as_layer(made)
    model = Model(layer)
    follow_timesteps(model, (600.0, 300.0, 100.0))
    x = heavy_inputs(8)
    for timestep, bucket in ((999, 0), (600, 0), (599.9, 1), (300, 1), (299, 2), (100, 2), (0, 2)):
        assert torch.equal(model(x, timestep), model(x, timestep=torch.tensor([timestep, 0.0])))
        assert layer.bucket == bucket
        codes, scale = torch.ops.quantdit.quantize_tokens(x, 4, 0, False, made.tensors["static_scale"][bucket : bucket + 1])
        expected = (codes.float() * scale[:, None]) @ layer.weight.T
        torch.testing.assert_close(model(x, torch.tensor(timestep)), expected, rtol=1e-4, atol=1e-4)
    model(x)
    assert layer.bucket == 2
    outputs = [model(x, t) for t in (999, 400, 50)]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


FEW = (
    Rule("*", "int8", activation_bits=8, activation_scale="static"),
    Rule("*", "table4", activation_bits=8, rotation="auto", smooth="salience"),
    Rule("*", "int4", low_rank=8, activation_bits=4, activation_format="affine", activation_group_size=32),
    Rule("*", "trellis2_l12"),
    Rule("*", "vq256x4", activation_bits=8),
    Rule("*", "ssvq256x8"),
)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", FEW, ids=lambda rule: rule.weight)
def test_few_tokens_are_enough(rule: Rule, rows: int):
    """What an expert gets that the router hardly ever chooses: a Gram matrix of rank one."""
    linear = nn.Linear(WIDTH, OUT, bias=False)
    x = heavy_inputs(rows)
    made = quantize_layer(linear.weight, None, statistics.update(statistics.init(WIDTH, 1), x, 0), plan_of(rule), 0)
    with torch.no_grad():
        got, wanted = QuantLinear.from_tensors(made.spec, made.tensors, None)(x), linear(x)
    assert float((got - wanted).norm() / wanted.norm()) < 0.5


@pytest.mark.parametrize("weight", ["int4", "table4", "vq256x4", "trellis3_l12"])
def test_bytes_do_not_depend_on_the_number_of_threads(weight: str):
    """Wide enough for the Cholesky factor to differ between one thread and two."""
    width = 512
    linear, x = nn.Linear(width, OUT), heavy_inputs(700, width)
    stats = statistics.update(statistics.init(width, 1), x, 0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made = quantize_layer(linear.weight, linear.bias, stats, plan_of(Rule("*", weight, activation_bits=8), OUT, width), 0)
            assert torch.get_num_threads() == threads
            found.append(made)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(t, found[1].tensors[name]) for name, t in found[0].tensors.items())
    assert torch.equal(found[0].bias, found[1].bias) and json.dumps(found[0].report) == json.dumps(found[1].report)
