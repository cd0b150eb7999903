"""`CallView`: the sample, the time and the batch of one call of a transformer, whatever its class names its arguments.

Classes differ in the place of the time (argument 2 of Wan, 3 of CogVideoX, 4 of Flux), in its name (`timestep`, `timesteps`,
`t`), in its direction (most fall from noise to data; Lumina 2, Mochi and Z-Image rise) and in how they take the sample (a tensor,
or a list with a tensor for each image). Everything that looks at a call asks here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantdit.models.adapter import ADAPTERS, Input

# Names of classes that have no adapter, the likeliest first.
LATENTS = ("hidden_states", "x", "sample", "latents")
TIMES = ("timestep", "timesteps", "t")
TIME_KINDS = ("timestep", "reversed_timestep")


@dataclass(frozen=True)
class CallView:
    """What one call says.

    Attributes:
        latent: the noisy sample, `[batch, ...]`; a list of tensors of one shape is stacked. None if the call has none.
        time: in the class's own units; the noisiest one if the call has several. None if the call has none.
        batch: number of rows of the sample; 0 if the call has none.
        channels: the axis of the latent's channels where the class is known, else None.
    """

    latent: Tensor | None = None
    time: float | None = None
    batch: int = 0
    channels: int | None = None


@dataclass(frozen=True)
class Arguments:
    """Names of the arguments of a class's `forward`.

    Attributes:
        signature: of `forward`.
        latent: name of the noisy sample.
        time: name of the time; None if `forward` takes none.
        rises: the time rises from noise to data; None for a class without an adapter that names its time.
        channels: axis of the latent's channels; None if unknown.
        rest: name of what takes all other keywords; None if nothing does.
    """

    signature: inspect.Signature
    latent: str
    time: str | None
    rises: bool | None
    channels: int | None
    rest: str | None


def view(transformer: nn.Module, args: tuple, kwargs: dict) -> CallView:
    """Return what a call `transformer(*args, **kwargs)` says; an empty CallView if `forward` does not take these arguments."""
    known = arguments_of(type(transformer))
    try:
        given = known.signature.bind_partial(transformer, *args, **kwargs).arguments
    except TypeError:
        return CallView()  # forward itself says what is wrong
    given = given if known.rest is None else {**given, **given.get(known.rest, {})}
    latent = _stacked(given.get(known.latent))
    time = None if known.time is None else _noisiest(given.get(known.time), known.rises)
    return CallView(latent, time, 0 if latent is None else len(latent), known.channels)


def time_argument(transformer: nn.Module) -> str | None:
    """Return the name of the time among the arguments of the transformer's `forward`; None if it takes none."""
    return arguments_of(type(transformer)).time


def times_rise(transformer: nn.Module) -> bool | None:
    """Return whether the time rises from noise to data, as the class's adapter says; None if it says nothing."""
    return arguments_of(type(transformer)).rises


# By class. A dictionary: torch.compile warns of functools.lru_cache, and a compiled model's hook comes through here.
_KNOWN: dict[type, Arguments] = {}


def arguments_of(cls: type) -> Arguments:
    """Return which arguments of a transformer class are which, from its adapter or by their names."""
    if cls not in _KNOWN:
        _KNOWN[cls] = _found(cls)
    return _KNOWN[cls]


def _found(cls: type) -> Arguments:
    signature = inspect.signature(cls.forward)
    parameters = list(signature.parameters.values())
    names = [p.name for p in parameters[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # A subclass of a known class (as FSDP makes one) is called as that one.
    adapter = next((ADAPTERS[base.__name__] for base in cls.__mro__ if base.__name__ in ADAPTERS), None)
    inputs = () if adapter is None else adapter.inputs
    latent: Input | None = next((spec for spec in inputs if spec.kind == "latent"), None)
    time: Input | None = next((spec for spec in inputs if spec.kind in TIME_KINDS), None)
    return Arguments(
        signature,
        latent.name if latent is not None else _first(LATENTS, names) or next(iter(names), ""),
        time.name if time is not None else _first(TIMES, names) or _ending(names),
        None if time is None else time.kind == "reversed_timestep",
        latent.shape.index("in_channels") if latent is not None and "in_channels" in latent.shape else None,
        next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None),
    )


def _first(wanted: Iterable[str], names: list[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _ending(names: list[str]) -> str | None:
    """Return a name such as `vision_timesteps`."""
    return next((name for name in names if name.endswith(("timestep", "timesteps", "_time"))), None)


def _stacked(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.ndim else None  # a number has no rows
    if not isinstance(value, list | tuple) or not all(isinstance(v, Tensor) for v in value):
        return None
    return torch.stack(list(value)) if len({v.shape for v in value}) == 1 else None


def _noisiest(value: object, rises: bool | None) -> float | None:
    extreme = min if rises else max
    if isinstance(value, Tensor):
        return float(value.min() if rises else value.max()) if value.numel() else None
    if isinstance(value, list | tuple):
        found = [time for time in (_noisiest(v, rises) for v in value) if time is not None]
        return extreme(found) if found else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
