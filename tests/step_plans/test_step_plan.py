"""Plans as data: what is refused, which steps are computed, and the weights of forecasts."""

from __future__ import annotations

import json
import math

import pytest
import torch

from quantdit.step_plans.forecasts import fit, placed, polynomial
from quantdit.step_plans.step_plan import StepPlan

TIMES = tuple(float(t) for t in range(1000, 0, -100))


def test_a_plan_comes_back_from_json_whole() -> None:
    plan = polynomial("taylor2", TIMES, placed(10, 5))
    assert StepPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert str(plan) == "5 of 10 steps computed, the others forecast (taylor2)"
    assert plan.share == 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spec": 2}, "update quantdit"),
        ({"forecast": "magic"}, "expected one of reuse"),
        ({"forecast": ["fit"]}, "expected one of reuse"),
        ({"times": [1.0]}, "rows of weights"),
        ({"times": "abc"}, "list of numbers"),
        ({"times": [math.nan] * 4}, "finite"),
        ({"times": [10**400, 3, 2, 1]}, "list of numbers"),
        ({"weights": [[1.0], [], [], []]}, "always computed"),
        ({"weights": [[], [], [], [1.0]]}, "always computed"),
        ({"weights": [[], [1.0, 1.0], [], []]}, "2 weights, and 1 outputs"),
        ({"weights": [[], [math.inf], [], []]}, "no number within"),
        ({"weights": [[], [math.nan], [], []]}, "no number within"),
        ({"weights": [[], 1, [], []]}, "list of lists"),
        ({"weights": [[], [True], [], []]}, "list of lists"),
        ({"more": 1}, "expected a table"),
    ],
)
def test_a_hostile_plan_is_refused_in_one_line(change: dict, says: str) -> None:
    good = {"spec": 1, "forecast": "reuse", "times": [4.0, 3.0, 2.0, 1.0], "weights": [[], [1.0], [1.0], []]}
    StepPlan.from_dict(good)
    with pytest.raises(ValueError, match=says) as error:
        StepPlan.from_dict(good | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, [], "plan", 3])
def test_what_is_no_table_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="expected a table"):
        StepPlan.from_dict(content)


def test_steps_are_placed_from_the_first_to_the_last() -> None:
    assert placed(20, 10) == (0, 2, 4, 6, 8, 11, 13, 15, 17, 19)
    assert placed(5, 9) == (0, 1, 2, 3, 4)
    assert placed(20, 10, 0.75) == (0, 1, 3, 5, 8, 11, 14, 16, 18, 19)
    assert placed(20, 7, 0.75, 0.85) == (0, 3, 7, 11, 15, 18, 19)
    for computed in range(3, 20):
        for ends, lean in ((0.0, 1.0), (0.75, 0.85), (0.75, 1.15), (1.0, 1.0)):
            found = placed(20, computed, ends, lean)
            assert len(found) == computed
            assert (found[0], found[-1]) == (0, 19)
            assert list(found) == sorted(set(found))
    with pytest.raises(ValueError, match="too few"):
        placed(20, 2)


@pytest.mark.parametrize(("name", "order"), [("reuse", 0), ("taylor1", 1), ("taylor2", 2)])
def test_a_polynomial_of_its_order_is_forecast_exactly(name: str, order: int) -> None:
    plan = polynomial(name, TIMES, (0, 1, 3, 5, 9))
    values = [float(step) ** order for step in range(10)]
    for step, row in enumerate(plan.weights):
        if len(row) == order + 1:
            newest = [values[point] for point in reversed([p for p in plan.computed if p < step])]
            assert math.isclose(sum(w * v for w, v in zip(row, newest, strict=False)), values[step], abs_tol=1e-9)


def test_least_squares_find_what_combines_the_outputs() -> None:
    torch.manual_seed(0)
    trajectory = [torch.randn(4, 30) for _ in range(10)]
    trajectory[4] = 0.5 * trajectory[3] - 0.25 * trajectory[1] + 2 * trajectory[0]
    plan = fit(TIMES, (0, 1, 3, 5, 9), [trajectory])
    assert plan.weights[4] == pytest.approx((0.5, -0.25, 2), abs=1e-4)


def test_forecasts_are_led_to_another_trajectory() -> None:
    torch.manual_seed(0)
    wanted, known = ([torch.randn(4, 30) for _ in range(10)] for _ in range(2))
    wanted[4] = 0.5 * known[3] - 0.25 * known[1] + 2 * known[0]
    assert fit(TIMES, (0, 1, 3, 5, 9), [wanted], [known]).weights[4] == pytest.approx((0.5, -0.25, 2), abs=1e-4)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
def test_a_time_is_known_in_the_dtypes_that_pipelines_keep_it_in(kept: torch.dtype) -> None:
    times = (997.0, 989.3, 981.2, 3.3)
    plan = StepPlan("reuse", times, ((), (1.0,), (), ()))
    for step, time in enumerate(times):
        assert plan.is_at(step, float(torch.tensor(time, dtype=kept)))
    assert not plan.is_at(1, 985.0)
