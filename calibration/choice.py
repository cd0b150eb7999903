"""Which smoothing and rotation the inputs of some layers get: of a few candidates the least measured output error.

The first candidate, smoothing and then a Hadamard rotation, leaves nearly Gaussian tokens in almost every layer, and no rotation
quantizes tokens much better than Gaussian ones. So it is kept wherever its tokens are quantized as well as those, and only other
layers pay for measuring more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from quantdit.calibration import rotate, smooth
from quantdit.calibration.activations import quantized_inputs, relative_noise
from quantdit.calibration.stats import Stats
from quantdit.recipes.rules import Rule
from quantdit.tensors.layer_spec import ActivationSpec
from quantdit.tensors.transform import Transform

AUTO = "auto"
KINDS = ("hadamard", "none", "outlier")  # of rotation = "auto", in the order they are tried
ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)  # searched where a rule names what the smoothing is made of
TAME = 1.1  # times the noise of Gaussian tokens: up to there nothing else is tried
GAIN = 0.97  # of the least error so far: what a candidate may at best reach to be measured, and must reach to be taken
GAUSSIAN_ROWS = 256


class Measured(Protocol):
    """What quantizing the layers with one transform gave.

    Attributes:
        error: rel_rmse of their outputs on held-out rows, all of them together.
        activation_error: the part of it that the inputs' quantization alone makes.
        noise: mean over those rows of the activations' squared quantization error, in parts of the row's square.
    """

    @property
    def error(self) -> float: ...
    @property
    def activation_error(self) -> float: ...
    @property
    def noise(self) -> float: ...


T = TypeVar("T", bound=Measured)


@dataclass(frozen=True)
class Candidate:
    """One way to prepare inputs.

    Attributes:
        alpha: strength of the smoothing, None for none.
        rotation: a name of rotate.BUILT.
        build: makes the transform, which takes time where a rotation is fitted.
        searched: errors of the strengths that were searched.
    """

    alpha: float | None
    rotation: str
    build: Callable[[], Transform]
    searched: dict[float | None, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RotationChoice(Generic[T]):
    """The candidate chosen, its transform, what quantizing with it gave, and what the report says of the choice."""

    candidate: Candidate
    transform: Transform
    made: T
    report: dict


def choose(
    rule: Rule,
    weight: Tensor,
    stats: Stats,
    fitted: Tensor,
    activation: ActivationSpec,
    attempt: Callable[[Transform], T],
    activation_error: Callable[[Transform], float],
    seed: int,
) -> RotationChoice[T]:
    """Return the smoothing and rotation of layers that share an input.

    Args:
        rule: asks for `smooth` and `rotation`; `auto` leaves either open.
        weight: of all the layers, one below the other, `[sum of out, k]`.
        stats: of their input.
        fitted: `[r, k]` rows of it that outlier rotations are fitted to.
        activation: how inputs are quantized.
        attempt: quantizes the layers with a transform.
        activation_error: `Measured.activation_error` with a transform; cheap.
        seed: of signs and greedy rotations.

    Raises:
        ValueError: see `rotate.build` and `smooth`; or no candidate has a finite error.
    """
    first, *others = candidates(rule, weight, stats, fitted, lambda t: attempt(t).error, seed)
    t = first.build()
    best = RotationChoice(first, t, attempt(t), {})
    measured = [(first, best.made.error)]
    if others and not is_tame(best.made.noise, activation, weight.shape[1]):
        # A candidate can mend the part of the error that the inputs make.
        rest = max(0.0, best.made.error**2 - best.made.activation_error**2)
        built = [(candidate, candidate.build()) for candidate in others]
        bounds = [math.hypot(rest**0.5, activation_error(t)) for _, t in built]
        for number in sorted(range(len(built)), key=bounds.__getitem__):
            candidate, t = built[number]
            if bounds[number] > GAIN * best.made.error:
                continue
            made = attempt(t)
            measured.append((candidate, made.error))
            if made.error < GAIN * best.made.error or not math.isfinite(best.made.error):
                best = RotationChoice(candidate, t, made, {})
    if not math.isfinite(best.made.error):
        raise ValueError(f"no smoothing and rotation gives a finite output error, tried {len(measured)}; the layer is broken")
    return replace(best, report=_report(rule, best, measured))


def candidates(
    rule: Rule, weight: Tensor, stats: Stats, fitted: Tensor, error: Callable[[Transform], float], seed: int
) -> list[Candidate]:
    """Return what there is to choose from, the usual best first; see `choose`.

    `error`: the output error with a transform, by which the strength of a smoothing that the rule names is searched.
    """
    kinds = KINDS if rule.rotation == AUTO else (rotate.ars(stats.rms, rule.ars_threshold),)
    kinds = kinds if rule.rotation in (AUTO, "ars") else (rule.rotation,)

    def candidate(kind: str, alpha: float | None, factor: Tensor | None, searched: dict) -> Candidate:
        return Candidate(alpha, kind, lambda: rotate.build(kind, fitted, seed, factor), searched)

    factors, searched = {None: None}, {}
    rms = smooth.channel_rms(stats.gram, stats.count)
    if rule.smooth == AUTO:
        alpha = smooth.usual_alpha(rule.activation_bits)
        factors = {alpha: smooth.balanced(rms, weight, alpha), None: None}
    elif rule.smooth != "none":
        activation = {
            "rms": lambda: rms,
            "absmax": lambda: stats.absmax.amax(dim=0),
            "salience": lambda: smooth.salience(stats.absmax, weight),
        }[rule.smooth]()
        base = "hadamard" if kinds[0] == "outlier" else kinds[0]  # fitting one for each strength would take long
        found = smooth.choose(activation, weight, error, rotate.build(base, fitted, seed), ALPHAS)
        factors, searched = {found.alpha: found.factor}, found.errors
    return [candidate(kind, alpha, factor, searched) for alpha, factor in factors.items() for kind in kinds]


def is_tame(noise: float, activation: ActivationSpec, width: int) -> bool:
    """Return whether tokens `[k]` of this quantization noise (Measured.noise) are quantized about as well as Gaussian ones."""
    return activation.bits == 16 or noise <= TAME**2 * _gaussian_noise(activation, width)


@cache
def _gaussian_noise(activation: ActivationSpec, width: int) -> float:
    x = torch.randn(GAUSSIAN_ROWS, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return relative_noise(quantized_inputs(x, replace(activation.between, buckets=0), None, x.new_zeros(len(x))), x)


def _report(rule: Rule, best: RotationChoice, measured: list[tuple[Candidate, float]]) -> dict:
    """Return what the report says: what was asked and chosen, and the errors of what was compared with it, one thing varied."""
    taken, compared = best.candidate, len(measured) > 1
    rotations = {c.rotation: error for c, error in measured if c.alpha == taken.alpha and compared}
    strengths = {c.alpha: error for c, error in measured if c.rotation == taken.rotation and compared}
    report = {"rotation": {"asked": rule.rotation, "chosen": best.transform.kind, "errors": _six(rotations)}}
    if rule.smooth != "none":
        report["smoothing"] = {"alpha": taken.alpha, "errors": _six(taken.searched or strengths)}
    return report


def _six(errors: Mapping[Any, float]) -> dict[str, float]:
    return {str(name): float(f"{error:.6g}") for name, error in errors.items()}
