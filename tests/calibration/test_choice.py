"""How the smoothing and rotation of a layer's inputs are chosen: cheaply where one way is known to do, else by measuring."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quantdit.calibration import choice, smooth
from quantdit.calibration import stats as statistics
from quantdit.calibration.activations import quantized_inputs, relative_noise
from quantdit.recipes.rules import Rule
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import ActivationSpec
from quantdit.tensors.transform import Transform

OUT, WIDTH = 48, 128
EIGHT, FOUR = ActivationSpec(8), ActivationSpec(4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@dataclass(frozen=True)
class Made:
    error: float
    activation_error: float
    noise: float
    kind: str


def name_of(t: Transform) -> str:
    return f"{t.kind}{' smoothed' if t.smoothed else ''}"


def chosen(errors: dict[str, float], rule: Rule, noise: float = 1.0, activation: ActivationSpec = EIGHT, share: float = 0.9):
    """Return the choice where quantizing with a transform gives these errors, and the transforms that were tried.

    `share` of a squared error is that of the inputs.
    """
    tried: list[str] = []
    x = random(64, WIDTH) * torch.linspace(0.5, 4, WIDTH)

    def attempt(t: Transform) -> Made:
        tried.append(name_of(t))
        return Made(errors[name_of(t)], errors[name_of(t)] * share**0.5, noise, name_of(t))

    found = choice.choose(
        rule,
        random(OUT, WIDTH, seed=1),
        statistics.update(statistics.init(WIDTH, 1), x, 0),
        x[::2],
        activation,
        attempt,
        lambda t: errors[name_of(t)] * share**0.5,
        0,
    )
    assert found.made.kind == name_of(found.transform)
    return found, tried


OPEN = Rule("*", rotation="auto", smooth="auto", activation_bits=8)
FLAT = {"hadamard smoothed": 0.1, "hadamard": 0.1, "none smoothed": 0.1, "none": 0.1, "outlier smoothed": 0.1, "outlier": 0.1}


def test_even_tokens_cost_no_measuring():
    """Tokens that are quantized as well as Gaussian ones cannot gain from another rotation; 16-bit ones need none."""
    x = random(512, WIDTH, seed=5)
    noise = relative_noise(quantized_inputs(x, EIGHT, None, torch.zeros(512)), x)
    better = FLAT | {"outlier smoothed": 0.01}
    assert chosen(better, OPEN, noise)[1] == ["hadamard smoothed"]
    assert chosen(better, OPEN, 1.0, ActivationSpec(16))[1] == ["hadamard smoothed"]
    assert chosen(better, OPEN, 2 * noise)[0].transform.kind == "outlier"


@pytest.mark.parametrize("best", FLAT)
def test_uneven_tokens_get_what_measures_best(best: str):
    found, tried = chosen(FLAT | {best: 0.05}, OPEN)
    assert name_of(found.transform) == best
    assert len(tried) <= 2, "what cannot win is not measured"
    report = found.report
    assert report["rotation"]["asked"] == "auto" and report["rotation"]["chosen"] == found.transform.kind
    assert (report["smoothing"]["alpha"] is not None) == found.transform.smoothed


def test_a_tie_goes_to_the_usual_way():
    assert name_of(chosen({kind: e * 0.99 for kind, e in FLAT.items()} | {"hadamard smoothed": 0.1}, OPEN)[0].transform) == (
        "hadamard smoothed"
    )


def test_what_the_inputs_cannot_mend_is_not_measured():
    """A rotation changes the error of the inputs; where the weight makes nearly all of it there is nothing to gain."""
    better = FLAT | {"outlier smoothed": 0.09}
    assert chosen(better, OPEN, share=0.05)[1] == ["hadamard smoothed"]


def test_only_what_the_rule_leaves_open_is_tried():
    fixed = Rule("*", rotation="hadamard", smooth="auto", activation_bits=8)
    assert name_of(chosen(FLAT | {"outlier": 0.01, "hadamard": 0.05}, fixed)[0].transform) == "hadamard"
    plain = Rule("*", rotation="auto", smooth="none", activation_bits=8)
    found, _ = chosen(FLAT | {"hadamard smoothed": 0.01, "none": 0.05}, plain)
    assert name_of(found.transform) == "none" and "smoothing" not in found.report
    assert chosen(FLAT, Rule("*", rotation="none", activation_bits=8))[1] == ["none"]


def test_no_finite_error_is_refused():
    nan = dict.fromkeys(FLAT, float("nan"))
    with pytest.raises(ValueError, match="finite output error, tried 6"):
        chosen(nan, OPEN)
    assert name_of(chosen(nan | {"none": 0.1}, OPEN)[0].transform) == "none"


@pytest.mark.parametrize("activation", [EIGHT, FOUR, ActivationSpec(4, "affine", 32)], ids=str)
def test_gaussian_tokens_are_tame_and_peaky_ones_are_not(activation: ActivationSpec):
    def noise(x: Tensor) -> float:
        return relative_noise(quantized_inputs(x, activation, None, torch.zeros(len(x))), x)

    x = random(256, WIDTH, seed=3)
    assert choice.is_tame(noise(x), activation, WIDTH)
    peaky = x.clone()
    peaky[:, ::32] *= 20
    assert not choice.is_tame(noise(peaky), activation, WIDTH)
    rotated = transform.apply(Transform(premultiplier=random(WIDTH).sign().to(torch.int8), block=WIDTH), peaky)
    assert choice.is_tame(noise(rotated), activation, WIDTH)


def test_balanced_smoothing_evens_out_both_sides():
    """Half and half is where |X'| |W'| is least; either end evens out its own side."""
    rms, weight = random(WIDTH).exp(), random(OUT, WIDTH, seed=1) * random(1, WIDTH, seed=2).exp()
    norm = (weight / weight.norm(dim=1, keepdim=True)).norm(dim=0)

    def product(alpha: float) -> float:
        s = smooth.balanced(rms, weight, alpha)
        return float((rms / s).norm() * (norm * s).norm())

    assert product(0.5) == pytest.approx(float((rms * norm).sum()), rel=1e-5)
    assert all(product(alpha) > product(0.5) for alpha in (0.0, 0.25, 0.75, 1.0))
    assert float((norm * smooth.balanced(rms, weight, 0.0)).std()) < 1e-4
    assert float((rms / smooth.balanced(rms, weight, 1.0)).std()) < 1e-4
    assert torch.equal(
        smooth.balanced(rms, weight * random(OUT, 1).sign() * 2.0 ** (torch.arange(OUT)[:, None] % 20), 0.5),
        smooth.balanced(rms, weight, 0.5),
    )
    assert smooth.usual_alpha(4) > smooth.usual_alpha(8) == smooth.usual_alpha(16)


def test_ars_follows_j():
    """LRQ-DiT section 4.2: the outlier rotation from a root mean square of the threshold on."""
    rms = float((random(64, WIDTH) * torch.linspace(0.5, 4, WIDTH)).square().mean().sqrt())
    for threshold, kind in ((rms * 1.01, "hadamard"), (rms * 0.99, "outlier")):
        rule = Rule("*", rotation="ars", ars_threshold=threshold, activation_bits=8)
        found, tried = chosen(FLAT, rule)
        assert tried == [kind] == [found.report["rotation"]["chosen"]] and found.report["rotation"]["asked"] == "ars"
