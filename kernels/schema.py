"""Ops whose signature is written once: as that of the function that defines them.

A dataclass among the parameters of a definition, such as a QTensor, stands for its fields in the op's schema. `flat` takes it
apart where an op is called; every implementation gets it whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

Output = tuple[Sequence[int], torch.dtype]
_FIELDS: dict[type, dict[str, Any]] = {}  # names and types of the fields of every dataclass that an op takes


def flat(part: object) -> list[Any]:
    """Return the fields of a dataclass as ops take them, those of a dataclass in it in its place."""
    found = []
    for name in _FIELDS[type(part)]:
        value = getattr(part, name)
        found += flat(value) if type(value) in _FIELDS else [value]
    return found


class Op:
    """An op of `torch.ops.quantdit` with the signature of its definition.

    `outputs` takes some of the definition's parameters, by name, checks them and returns shape and dtype of every output. It runs
    before each implementation, and alone for fake tensors.
    """

    def __init__(self, library: torch.library.Library, name: str, definition: Callable, outputs: Callable) -> None:
        self.name, self._library, self._outputs = name, library, outputs
        self._checked = tuple(inspect.signature(outputs).parameters)
        hints = get_type_hints(definition)
        self._parameters = {p: hints[p] for p in inspect.signature(definition).parameters}
        leaves: list[inspect.Parameter] = []
        for parameter in inspect.signature(definition).parameters.values():
            leaves += _leaves(parameter.replace(annotation=hints[parameter.name]))
        self._names = tuple(leaf.name for leaf in leaves)
        self._defaults = tuple(leaf.default for leaf in leaves)
        library.define(name + _schema(leaves, hints["return"]))
        self.implement(definition, "CompositeExplicitAutograd")
        torch.library.register_fake(f"quantdit::{name}", self._fake)

    def implement(self, function: Callable, key: str) -> None:
        """Let a function of the definition's parameters run on tensors of a dispatch key, such as `CUDA`."""
        torch.library.impl(self._library, self.name, key)(self.of_leaves(function))

    def of_leaves(self, function: Callable) -> Callable:
        """Return what torch calls in place of a function of the definition's parameters."""

        def run(*given: Any) -> Any:
            arguments = self._whole(given)
            self._outputs_of(arguments)
            return function(*arguments.values())

        return run

    def _whole(self, given: tuple) -> dict[str, Any]:
        leaves = iter((*given, *self._defaults[len(given) :]))  # torch leaves out what equals a default
        return {name: _built(kind, leaves) for name, kind in self._parameters.items()}

    def _outputs_of(self, arguments: dict[str, Any]) -> list[Output]:
        return self._outputs(*(arguments[name] for name in self._checked))

    def _fake(self, *given: Any) -> Any:
        """Return empty outputs: torch calls it for fake tensors, and as soon as one argument is on the meta device.

        Nobody ever writes to them, so with some arguments on the meta device and others in memory this raises RuntimeError.
        """
        tensors = {n: a for n, a in zip(self._names, given, strict=False) if isinstance(a, Tensor)}
        away = [n for n, tensor in tensors.items() if tensor.device.type == "meta"]
        if away and len(away) < len(tensors):
            there = next(n for n in tensors if n not in away)
            on_meta = " and ".join(away)
            raise RuntimeError(
                f"quantdit::{self.name}: {on_meta} on the meta device, {there} in memory; the layer is not loaded whole"
            )
        first = next(iter(tensors.values()))
        made = [first.new_empty(shape, dtype=dtype) for shape, dtype in self._outputs_of(self._whole(given))]
        return made[0] if len(made) == 1 else tuple(made)


def _leaves(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Return the parameters that stand for one of a definition."""
    part = parameter.annotation
    if not is_dataclass(part):
        return [parameter]
    assert isinstance(part, type)
    hints = get_type_hints(part)
    _FIELDS[part] = {field.name: hints[field.name] for field in fields(part)}
    found = []
    for name, kind in _FIELDS[part].items():
        found += _leaves(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind))
    return found


def _built(kind: Any, leaves: Iterator) -> Any:
    if kind not in _FIELDS:
        return next(leaves)
    return kind(**{name: _built(field, leaves) for name, field in _FIELDS[kind].items()})


def _schema(leaves: list[inspect.Parameter], result: Any) -> str:
    def prototype() -> None: ...

    prototype.__signature__ = inspect.Signature(leaves, return_annotation=result)  # pyright: ignore[reportFunctionMemberAccess]
    # Numbers are of a layer, not of a call: a compiled graph is of one layer's, none is symbolic.
    return torch.library.infer_schema(prototype, mutates_args=()).replace("SymInt", "int")
