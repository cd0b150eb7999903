"""The knapsack: what brute force and an integer program find on small and large instances, budgets kept, more never worse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from quantdit.calibration.allocate import (
    ATTEMPTS,
    Option,
    allocate,
    finest,
    smallest,
    total_bytes,
    total_error,
    within,
)

WIDTHS = (2, 3, 4, 6, 8)
Options = dict[str, tuple[Option, ...]]


def instance(layers: int, seed: int, widths: tuple[int, ...] = WIDTHS) -> Options:
    """Layers of the shapes of a small DiT, with errors that fall by 6 dB a bit, give or take 1."""
    rng = np.random.default_rng(seed)
    shapes = [(192, 256), (1152, 192), (192, 192), (192, 192), (768, 192), (192, 768)]
    result = {}
    for i in range(layers):
        out, width = shapes[i % len(shapes)]
        power = math.exp(rng.normal(0, 1.5)) * out * width
        errors = [math.sqrt(power * 4.0**-w * math.exp(rng.normal(0, 0.25))) for w in widths]
        result[f"layer {i}"] = tuple(
            Option(f"table{w}", out * width * w // 8 + 4 * out + 2**w, e) for w, e in zip(widths, errors, strict=True)
        )
    return result


def brute_force(options: Options, budget: float) -> float:
    """Return the least error of all allocations within the budget."""
    found = math.inf
    for chosen in itertools.product(*options.values()):
        if sum(o.bytes for o in chosen) <= budget:
            found = min(found, math.sqrt(sum(o.error**2 for o in chosen)))
    return found


def integer_program(options: Options, budget: float) -> float:
    names = list(options)
    size = np.array([[o.bytes for o in options[n]] for n in names], dtype=float)
    cost = np.array([[o.error**2 for o in options[n]] for n in names])
    one = np.kron(np.eye(len(names)), np.ones(size.shape[1]))
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(size.reshape(1, -1) / budget, -np.inf, 1)]
    solved = milp(
        cost.ravel() / cost.max(), integrality=np.ones(cost.size), bounds=Bounds(0, 1), constraints=constraints,
        options={"mip_rel_gap": 1e-6},
    )  # fmt: skip
    return math.sqrt(float(cost.ravel() @ solved.x.round()))


def budgets(options: Options, count: int) -> list[int]:
    least = sum(min(o.bytes for o in layer) for layer in options.values())
    most = sum(max(o.bytes for o in layer) for layer in options.values())
    return [int(b) for b in np.linspace(least, most * 1.05, count)]


@pytest.mark.parametrize("seed", range(8))
def test_no_worse_than_brute_force_by_more_than_one_step(seed: int):
    """Greedy on hulls misses the optimum by less than the squared error one step saves, and nearly always not at all."""
    options = instance(5, seed, (2, 3, 4, 8))
    # Of the steps on the hulls the last one taken is the worst bargain; the largest bounds it.
    largest = max(a.error**2 - b.error**2 for layer in options.values() for a, b in itertools.pairwise(layer))
    exact = 0
    for budget in budgets(options, 25):
        chosen, best = allocate(options, budget), brute_force(options, budget)
        assert total_bytes(chosen) <= budget
        assert best**2 * (1 - 1e-9) <= total_error(chosen) ** 2 <= best**2 + largest
        exact += math.isclose(total_error(chosen), best, rel_tol=1e-9)
    assert exact >= 15


@pytest.mark.parametrize("layers", [54, 300])
def test_within_half_a_percent_of_an_integer_program(layers: int):
    options = instance(layers, 1)
    for budget in budgets(options, 9)[1:6:2]:
        assert total_error(allocate(options, budget)) <= 1.005 * integer_program(options, budget)


def test_more_budget_is_never_worse_and_never_exceeded():
    options = instance(54, 2)
    errors = []
    for budget in budgets(options, 300):
        chosen = allocate(options, budget)
        assert chosen.keys() == options.keys() and all(o in options[n] for n, o in chosen.items())
        assert total_bytes(chosen) <= budget
        errors.append(total_error(chosen))
    assert errors == sorted(errors, reverse=True)
    assert allocate(options, budgets(options, 2)[0]) == {n: layer[0] for n, layer in options.items()}
    assert allocate(options, budgets(options, 2)[1]) == finest(options)


def test_fewest_bytes_mirror_the_least_error():
    options = instance(30, 3)
    for budget in budgets(options, 40):
        error = total_error(allocate(options, budget))
        found = smallest(options, error)
        assert found is not None and total_error(found) <= error * (1 + 1e-9) and total_bytes(found) <= budget
    best = total_error(finest(options))
    assert smallest(options, best * 0.999) is None
    assert total_bytes(smallest(options, math.inf)) == budgets(options, 2)[0]


def test_one_option_is_kept_and_options_off_the_hull_are_not_needed():
    fixed = {"fixed": (Option("int4", 100, 0.3),), "open": (Option("a", 10, 1.0), Option("b", 20, 0.99), Option("c", 21, 0.1))}
    assert [o.weight for o in allocate(fixed, 121).values()] == ["int4", "c"]
    assert [o.weight for o in allocate(fixed, 120).values()] == ["int4", "b"], "the last gap is filled by what fits"
    assert [o.weight for o in allocate(fixed, 119).values()] == ["int4", "a"]


def test_ties_go_to_the_smaller_and_the_first():
    same = {n: (Option("a", 10, 1.0), Option("b", 20, 0.5), Option("c", 30, 0.5)) for n in "xyz"}
    assert [o.weight for o in allocate(same, 1000).values()] == ["b", "b", "b"]
    assert [o.weight for o in allocate(same, 45).values()] == ["b", "a", "a"]
    assert allocate(same, 45) == allocate(dict(same), 45)


@pytest.mark.parametrize("budget", [0, -5, float("nan"), 10])
def test_budget_below_the_smallest_size_says_both(budget: float):
    with pytest.raises(ValueError, match=r"too small: these 2 layers need 30"):
        allocate({"x": (Option("a", 10, 1.0), Option("b", 40, 0.1)), "y": (Option("a", 20, 1.0),)}, budget)


@pytest.mark.parametrize("option", [None, Option("a", -1, 1.0), Option("a", 1, -1.0), Option("a", 1, float("nan"))])
def test_options_that_are_none_name_the_layer(option: Option | None):
    with pytest.raises(ValueError, match="layer bad"):
        allocate({"good": (Option("a", 1, 1.0),), "bad": () if option is None else (option,)}, 100)


@pytest.mark.parametrize("truth", [0.4, 0.8, 1.0, 1.3, 2.5])
@pytest.mark.parametrize("bound", [2.0, 8.0, 40.0])
def test_a_bound_is_kept_by_measured_errors_with_little_to_spare(truth: float, bound: float):
    """The prediction is off by a factor, and by a little noise of its own."""
    options = instance(54, 4)
    unit = total_error(finest(options))

    def measure(chosen: dict[str, Option]) -> float:
        return truth * total_error(chosen) * (1 + 0.02 * math.sin(total_bytes(chosen)))

    bound *= unit * truth
    attempts = within(options, bound, measure)
    kept = [a for a in attempts if a.measured <= bound]
    assert len(attempts) <= ATTEMPTS and kept
    best = min(kept, key=lambda a: total_bytes(a.chosen))
    assert best.measured >= 0.85 * bound
    for attempt in attempts:
        assert attempt.measured == measure(attempt.chosen) and attempt.predicted == total_error(attempt.chosen)


def test_a_bound_that_is_out_of_reach_says_what_is_to_be_had():
    options = instance(10, 5)
    tried = []

    def measure(chosen: dict[str, Option]) -> float:
        tried.append(chosen)
        return 0.25

    with pytest.raises(ValueError, match=r"even the widest weights give 0\.25"):
        within(options, 0.2, measure)
    assert tried[-1] == finest(options) and len(tried) <= ATTEMPTS + 1


def test_a_bound_that_anything_keeps_is_tried_once():
    options = instance(10, 6)
    (attempt,) = within(options, 1e9, lambda chosen: 1.0)
    assert total_bytes(attempt.chosen) == budgets(options, 2)[0]
