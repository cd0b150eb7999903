"""The public functions list their options: those of what they pass them on to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from typing import get_args, get_overloads, get_type_hints

import pytest

from quantdit.api import SamplingOptions, export, generate
from quantdit.cli import options
from quantdit.exporters.to_comfyui import to_comfyui
from quantdit.exporters.to_dense import to_dense
from quantdit.exporters.to_onnx import to_onnx
from quantdit.pipelines.generate import Sampling

EXPORTERS = {"dense": to_dense, "comfyui": to_comfyui, "onnx": to_onnx}


def test_options_of_sampling_are_complete():
    known = {field.name for field in fields(Sampling)}
    assert SamplingOptions.__annotations__.keys() | (signature(generate).parameters.keys() & known) == known
    assert {*options.SAMPLING, "prompts"} == known


@pytest.mark.parametrize("form", get_overloads(export), ids=lambda form: get_args(get_type_hints(form)["to"])[0])
def test_export_has_the_options_of_each_exporter(form: Callable):
    exporter = EXPORTERS[get_args(get_type_hints(form)["to"])[0]]
    given, expected = (
        {name: p.default for name, p in signature(function).parameters.items() if p.default is not p.empty}
        for function in (form, exporter)
    )
    assert given == expected
