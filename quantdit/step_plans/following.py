"""A transformer that follows a step plan: calls that the plan computes run, the others return a forecast.

The calls of a trajectory are told by their times (`models.call_view`). Calls of one time that follow one another, such as those
with and without the prompt, are streams of their own. A run whose times or calls are not the plan's is computed whole, with one
warning. Each thread has its own trajectory.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from quantdit.models.call_view import view
from quantdit.models.prediction import prediction_of, with_prediction
from quantdit.step_plans.step_plan import HISTORY, StepPlan
from quantdit.system.files import Advice

NAME = "quantdit_step_plan"
_eager: Any = torch.compiler.disable  # what a graph must not trace
CACHES = "diffusers.hooks."
# Modules of diffusers.hooks whose hooks skip computation.
SKIPPING = (
    "faster_cache",
    "first_block_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "text_kv_cache",
    "taylorseer_cache",
)


@dataclass(frozen=True)
class StepPlanConfig:
    """What `enable_cache` of a transformer takes to follow a plan."""

    plan: StepPlan


@dataclass
class _Stream:
    """Latest computed outputs of the calls that have one place among those of a step."""

    outputs: deque[Tensor] = field(default_factory=lambda: deque(maxlen=HISTORY))
    last: object = None  # as the model returned it


@dataclass
class _Trajectory:
    """Where the calls of one thread are, of those in one cache context."""

    plan: StepPlan
    step: int = -1
    time: float | None = None
    calls: int = 0  # of this step
    calls_a_step: int = 0
    wrong: str = ""  # why the plan is not followed
    streams: list[_Stream] = field(default_factory=list)

    def call(self, time: float | None) -> tuple[_Stream, tuple[float, ...]]:
        """Take note of a call; returns its stream, and the weights of its forecast, () if it is to be computed."""
        if time is None:
            self.wrong = self.wrong or "a call has no time"
        elif time != self.time:
            self._next_step(time)
        self.time = time
        self.calls += 1
        while len(self.streams) < self.calls:
            self.streams.append(_Stream())
        # Several calls at the first step may be of an interrupted run and of this one; the second step tells.
        is_unsure = self.step == 1 and self.calls_a_step > 1
        weights = () if self.wrong or is_unsure else self.plan.weights[self.step]
        return self.streams[self.calls - 1], weights

    def _next_step(self, time: float) -> None:
        if self.step == 0:
            self.calls_a_step = self.calls
        elif self.calls != self.calls_a_step and not self.wrong:
            self.wrong = f"step {self.step} has {self.calls} calls, the first has {self.calls_a_step}"
        follows = not self.wrong and self.step + 1 < len(self.plan.times) and self.plan.is_at(self.step + 1, time)
        self.calls = 0
        if follows:
            self.step += 1
        elif self.plan.is_at(0, time):
            self.step, self.wrong, self.streams = 0, "", []
        elif not self.wrong:
            ended = self.step + 1 == len(self.plan.times)
            expected = "none was left" if ended else f"expected {self.plan.times[self.step + 1]:g}"
            self.wrong = f"a call is at time {time:g}, {expected}"


class _PerThread(threading.local):
    """The trajectories of each thread, by cache context, and the context that it is in. Copies begin anew."""

    def __init__(self) -> None:
        self.context = ""
        self.trajectories: dict[str, _Trajectory] = {}

    def __reduce__(self) -> tuple:
        return _PerThread, ()

    def __deepcopy__(self, memo: dict) -> _PerThread:
        return _PerThread()


class _Contexts(StateManager):
    """What `cache_context` of a model tells its hooks."""

    def __init__(self, threads: _PerThread) -> None:
        super().__init__(BaseState)  # pyright: ignore[reportArgumentType] - it takes the class
        self._threads = threads

    def set_context(self, context: Any) -> None:
        """Take note of the context that this thread is in: an object with a name, of earlier versions the name."""
        self._threads.context = getattr(context, "name", context) or ""


class StepPlanHook(ModelHook):
    """Computes or forecasts; `counted` has how many calls were `computed` and `forecast`."""

    _is_stateful = True

    def __init__(self, plan: StepPlan) -> None:
        super().__init__()
        self.plan = plan
        self.counted: Counter[str] = Counter()
        self._threads = _PerThread()
        self._contexts = _Contexts(self._threads)  # found and told by diffusers
        self._has_warned = False

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget this thread's trajectory: its pipeline is done."""
        self._threads.trajectories.clear()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        """Stand in the place of the module's forward."""
        assert self.fn_ref is not None and self.fn_ref.original_forward is not None  # of a registered hook
        stream, weights = _eager(self._follow)(module, args, kwargs)
        if weights:
            return _eager(self._forecast)(stream, weights)
        output = self.fn_ref.original_forward(*args, **kwargs)
        _eager(self._keep)(stream, output)
        return output

    def _follow(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[_Stream, tuple[float, ...]]:
        """Return the stream of a call, and the weights of its forecast; () if it is to be computed."""
        called, threads = view(module, args, kwargs), self._threads
        trajectory = threads.trajectories.setdefault(threads.context, _Trajectory(self.plan))
        stream, weights = trajectory.call(called.time)
        if trajectory.wrong:
            self._warn(trajectory.wrong)
        has_outputs = len(stream.outputs) >= max(1, len(weights)) and len(stream.outputs[0]) == called.batch
        return stream, weights if has_outputs else ()

    def _keep(self, stream: _Stream, output: object) -> None:
        self.counted["computed"] += 1
        prediction = prediction_of(output)
        if prediction is None:
            return
        prediction = prediction.detach()
        if stream.outputs and stream.outputs[0].shape != prediction.shape:
            stream.outputs.clear()
        stream.outputs.appendleft(prediction)
        stream.last = output

    def _forecast(self, stream: _Stream, weights: tuple[float, ...]) -> object:
        self.counted["forecast"] += 1
        total = weights[0] * stream.outputs[0].float()
        for weight, output in zip(weights[1:], list(stream.outputs)[1:], strict=False):
            total += weight * output.float()
        return with_prediction(stream.last, total.to(stream.outputs[0].dtype))

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            text = f"the step plan is of {len(self.plan.times)} steps at other times: {why}; every step is computed"
            warnings.warn(Advice(text), stacklevel=2)


def enable(transformer: nn.Module, plan: StepPlan) -> StepPlanHook:
    """Have a transformer follow a plan; returns the hook, which counts.

    Raises:
        ValueError: it follows one, or another cache is enabled.
    """
    if found := cache_of(transformer):
        raise ValueError(f"{found} is enabled on this {type(transformer).__name__}; disable it first, or leave out the step plan")
    hook = StepPlanHook(plan)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, NAME)
    return hook


def disable(transformer: nn.Module) -> None:
    """Have a transformer compute every call again."""
    HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(NAME, recurse=False)


def hook_of(transformer: nn.Module) -> StepPlanHook | None:
    """Return the hook of a transformer that follows a plan, None of another."""
    registry = getattr(transformer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(NAME)


def cache_of(transformer: nn.Module) -> str | None:
    """Return the name of a hook that skips computation in a transformer, ours or one of diffusers; None if there is none."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            kind = type(hook)
            if isinstance(hook, StepPlanHook) or (
                kind.__module__.startswith(CACHES) and kind.__module__.removeprefix(CACHES) in SKIPPING
            ):
                return kind.__name__
    return None


def carry(transformer: nn.Module, plan: StepPlan | None) -> None:
    """Let a transformer carry a plan, which `step_plan` returns and its checkpoint stores; None takes it away.

    Its `enable_cache` takes the plan then, and `disable_cache` ends it, whether its class has diffusers' CacheMixin or not.
    """
    transformer.step_plan = plan  # pyright: ignore[reportArgumentType] - neither tensor nor module
    for method in (_enable_cache, _disable_cache):
        name = method.__name__.removeprefix("_")
        if plan is None:
            vars(transformer).pop(name, None)
        else:
            vars(transformer)[name] = partial(method, transformer)  # which pickles and copies, as a bound method does not


def step_plan(transformer: nn.Module) -> StepPlanConfig:
    """Return what `transformer.enable_cache` takes to follow the step plan of a quantized transformer.

    Args:
        transformer: quantized with `--steps-plan`, as loaded by diffusers or by `quantdit.load`.

    Raises:
        ValueError: it has no plan.
    """
    model = getattr(transformer, "_orig_mod", transformer)  # of torch.compile
    plan = getattr(model, "step_plan", None)
    if not isinstance(plan, StepPlan):
        raise ValueError(
            f"this {type(model).__name__} has no step plan; quantdit calibrate --steps-plan 0.5 makes one, of half the steps"
        )
    return StepPlanConfig(plan)


def _enable_cache(self: nn.Module, config: object) -> None:
    """Enable a step plan, or a cache of diffusers as its own `enable_cache` does."""
    if isinstance(config, StepPlanConfig):
        enable(self, config.plan)
        self._cache_config = config  # pyright: ignore[reportArgumentType] - what CacheMixin's `is_cache_enabled` looks at
        return
    if hook_of(self) is not None:
        raise ValueError("a step plan is enabled on this transformer; disable it first, by disable_cache()")
    theirs = getattr(type(self), "enable_cache", None)
    if theirs is None:
        raise ValueError(f"{type(self).__name__} has no caches of diffusers, got {type(config).__name__}; its step plan it takes")
    theirs(self, config)


def _disable_cache(self: nn.Module) -> None:
    """Disable the step plan, or a cache of diffusers as its own `disable_cache` does."""
    if hook_of(self) is not None:
        disable(self)
        self._cache_config = None  # pyright: ignore[reportArgumentType]
    elif (theirs := getattr(type(self), "disable_cache", None)) is not None:
        theirs(self)
