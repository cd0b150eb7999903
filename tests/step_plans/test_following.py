"""A transformer that follows its plan: what is computed, what is forecast, when the plan is given up, what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn

import quantdit
import tiny_models
from quantdit.models.adapter import adapter_for
from quantdit.models.prediction import prediction_of, with_prediction
from quantdit.models.synthetic import synthetic_inputs
from quantdit.step_plans.following import carry, disable, enable, hook_of
from quantdit.step_plans.forecasts import placed, polynomial

TIMES = (1000.0, 800.0, 600.0, 400.0, 200.0)
COMPUTED = placed(5, 3)
PLAN = polynomial("taylor1", TIMES, COMPUTED)


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return tiny_models.tiny("WanTransformer3DModel")[0].eval()


@pytest.fixture
def model(wan: nn.Module) -> Iterator[nn.Module]:
    yield wan
    disable(wan)


def inputs(model: nn.Module, time: float, seed: int = 0) -> dict:
    size = tiny_models.tiny(type(model).__name__)[1]
    return synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(seed), time)


def run(model: nn.Module, times: tuple[float, ...] = TIMES, seeds: tuple[int, ...] = (0,), **options: object) -> list[Tensor]:
    """Call the model along a trajectory, at each time once for each seed; returns its predictions."""
    with torch.no_grad():
        return [prediction_of(model(**inputs(model, t, seed), **options)) for t in times for seed in seeds]


def warned(model: nn.Module, *args: object, **options: object) -> tuple[list[Tensor], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = run(model, *args, **options)
    return outputs, [str(w.message) for w in caught if "step plan" in str(w.message)]


def test_steps_are_computed_or_forecast_as_planned(model: nn.Module) -> None:
    whole = run(model)
    hook = enable(model, PLAN)
    made = run(model)
    assert hook.counted == {"computed": 3, "forecast": 2}
    for step in COMPUTED:
        assert torch.equal(made[step], whole[step])
    assert torch.allclose(made[1], whole[0])
    assert torch.allclose(made[3], whole[2] + (whole[2] - whole[0]) / 2, atol=1e-5)


def test_the_next_trajectory_begins_anew(model: nn.Module) -> None:
    hook = enable(model, PLAN)
    first, other = run(model), run(model, seeds=(1,))
    assert torch.equal(run(model)[3], first[3])
    assert not torch.equal(first[3], other[3])
    assert hook.counted == {"computed": 9, "forecast": 6}


def test_calls_with_and_without_the_prompt_are_streams_of_their_own(model: nn.Module) -> None:
    apart = [run(model, seeds=(seed,)) for seed in (0, 1)]
    enable(model, PLAN)
    both = run(model, seeds=(0, 1))
    for stream in (0, 1):
        found = both[stream::2]
        # Two calls at the first step may be of two runs; so the second step is computed.
        assert all(torch.equal(found[step], apart[stream][step]) for step in (0, 1, 2, 4))
        assert not torch.equal(found[3], apart[stream][3])


def test_contexts_tell_the_streams_at_once(model: nn.Module) -> None:
    hook = enable(model, PLAN)
    for time in TIMES:
        for name, seed in (("cond", 0), ("uncond", 1)):
            with model.cache_context(name):
                run(model, (time,), (seed,))
    assert hook.counted == {"computed": 6, "forecast": 4}


def test_an_interrupted_run_leaves_nothing_to_the_next(model: nn.Module) -> None:
    whole = run(model, seeds=(1,))
    for done in (1, 2, 3):
        enable(model, PLAN)
        run(model, TIMES[:done])  # of another prompt
        after = run(model, seeds=(1,))
        disable(model)
        # At the first step it may be taken for a stream of this run: then nothing is forecast.
        assert torch.equal(after[3], whole[3]) or torch.allclose(after[3], whole[2] + (whole[2] - whole[0]) / 2, atol=1e-5)
        assert torch.equal(after[1], whole[1]) or torch.allclose(after[1], whole[0])


@pytest.mark.parametrize("times", [(1000.0, 900.0, 800.0, 700.0), (1000.0, 800.0, 500.0, 100.0), (*TIMES, 100.0, 50.0)])
def test_other_times_are_computed_with_one_warning(model: nn.Module, times: tuple[float, ...]) -> None:
    whole = run(model, times)
    hook = enable(model, PLAN)
    made, said = warned(model, times)
    wrong = next(i for i, t in enumerate(times) if i >= len(TIMES) or t != TIMES[i])
    assert all(torch.equal(a, b) for a, b in zip(made[wrong:], whole[wrong:], strict=True))
    assert len(said) == 1 and "every step is computed" in said[0]
    assert warned(model, times)[1] == []
    hook.counted.clear()
    assert warned(model)[1] == [] and hook.counted == {"computed": 3, "forecast": 2}


def test_a_batch_of_another_size_is_computed(model: nn.Module) -> None:
    hook = enable(model, PLAN)
    run(model, TIMES[:1])
    larger = {k: torch.cat([v, v]) for k, v in inputs(model, TIMES[1]).items()}
    with torch.no_grad():
        assert len(prediction_of(model(**larger))) == 2 * len(inputs(model, TIMES[1])["hidden_states"])
    assert hook.counted["forecast"] == 0


def test_two_threads_have_trajectories_of_their_own(model: nn.Module) -> None:
    hook = enable(model, PLAN)
    alone = [run(model, seeds=(seed,)) for seed in (0, 1)]
    found, turn = {}, threading.Barrier(2)

    def sample(seed: int) -> None:
        found[seed] = []
        for time in TIMES:
            turn.wait(60)
            found[seed] += run(model, (time,), (seed,))

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for seed in (0, 1) for a, b in zip(found[seed], alone[seed], strict=True))
    assert hook.counted["forecast"] == 8


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_forecast_is_returned_in_the_form_of_the_output(model: nn.Module, return_dict: bool) -> None:
    enable(model, PLAN)
    with torch.no_grad():
        computed, forecast = (model(**inputs(model, t), return_dict=return_dict) for t in TIMES[:2])
    assert type(forecast) is type(computed)
    assert prediction_of(forecast).dtype == prediction_of(computed).dtype


def test_every_form_of_an_output_takes_another_prediction() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2, 3)
    assert with_prediction(x, y) is y
    assert with_prediction((x, None, 5), y) == (y, None, 5)
    assert with_prediction((None, x), y)[1] is y
    listed = with_prediction([x[0], x[1]], y)
    assert isinstance(listed, list) and torch.equal(torch.stack(listed), y)
    nested = with_prediction(([x[0], x[1]], {}), y)
    assert torch.equal(prediction_of(nested), y) and nested[1] == {}


def test_enable_cache_takes_the_plan_that_the_model_carries(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"--steps-plan 0\.5"):
        quantdit.step_plan(model)
    carry(model, PLAN)
    try:
        model.enable_cache(quantdit.step_plan(model))
        assert model.is_cache_enabled
        for second in (quantdit.step_plan(model), FirstBlockCacheConfig()):
            with pytest.raises(ValueError, match="is enabled on this"):
                model.enable_cache(second)
        model.disable_cache()
        assert hook_of(model) is None and not model.is_cache_enabled
        model.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(ValueError, match="disable it first"):
            model.enable_cache(quantdit.step_plan(model))
        model.disable_cache()
        model.enable_cache(quantdit.step_plan(model))
        twin = copy.deepcopy(model)
        twin.disable_cache()
        assert hook_of(twin) is None and hook_of(model) is not None
        model.disable_cache()
    finally:
        carry(model, None)
    with pytest.raises(ValueError, match="has no step plan"):
        quantdit.step_plan(model)


def test_a_compiled_model_follows_it(model: nn.Module) -> None:
    enable(model, PLAN)
    ours = run(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        found = [prediction_of(compiled(**inputs(model, time))) for time in TIMES]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, ours, strict=True))
    assert hook_of(model).counted == {"computed": 6, "forecast": 4}


def test_a_model_that_carries_a_plan_is_pickled() -> None:
    model = tiny_models.tiny("DiTTransformer2DModel")[0].eval()
    carry(model, PLAN)
    again = pickle.loads(pickle.dumps(model))
    again.enable_cache(quantdit.step_plan(again))
    run(again)
    assert hook_of(again).counted == {"computed": 3, "forecast": 2}
    assert hook_of(model) is None


def test_a_class_without_caches_gets_the_methods() -> None:
    model = tiny_models.tiny("DiTTransformer2DModel")[0].eval()
    assert not hasattr(model, "enable_cache")
    carry(model, PLAN)
    model.enable_cache(quantdit.step_plan(model))
    run(model)
    assert hook_of(model).counted == {"computed": 3, "forecast": 2}
    with pytest.raises(ValueError, match="is enabled on this"):
        model.enable_cache(quantdit.step_plan(model))
    model.disable_cache()
    with pytest.raises(ValueError, match="has no caches of diffusers"):
        model.enable_cache(FirstBlockCacheConfig())
