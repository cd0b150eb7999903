"""Compiled columns against those of torch: the same codes, whatever the format, the groups, the order and the shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdit.calibration import gptq as error_feedback
from quantdit.calibration.grids import GRIDS
from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.formats import FORMATS
from quantdit.formats.trellis import TRELLIS

pytest.importorskip("numba")
SCALAR = sorted(name for name in GRIDS if name not in TRELLIS and name != "fp8_e4m3")


@given(
    format=st.sampled_from(SCALAR),
    act_order=st.booleans(),
    passes=st.integers(0, 2),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([16, 32, 96]),
    out=st.sampled_from([1, 7, 256, 300]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_codes_are_those_of_torch(
    format: str, act_order: bool, passes: int, groups: int, group_size: int, out: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = groups * group_size
    x = torch.randn(width + 3, width, generator=generator) @ torch.randn(width, width, generator=generator)
    W, H = torch.randn(out, width, generator=generator), x.T @ x
    grouped = group_size if FORMATS[format].kind == "affine" else width
    options = WeightOptions(act_order=act_order, cd_passes=passes)
    made = []
    for is_compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(error_feedback, "numba_is_installed", lambda is_compiled=is_compiled: is_compiled)
            made.append(quantize_weight(W, H, format, grouped, "gptq", options).tensors())
    compiled, plain = made
    assert compiled.keys() == plain.keys()
    assert all(torch.equal(compiled[key].view(torch.uint8), plain[key].view(torch.uint8)) for key in plain)


def test_compiled_code_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would compare torch with torch."""

    def refused(*args: object) -> None:
        raise AssertionError("a column was visited by itself")

    monkeypatch.setattr(error_feedback, "one_by_one", refused)
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for format in SCALAR:
        quantize_weight(
            W, torch.eye(64), format, 32 if FORMATS[format].kind == "affine" else 64, "gptq", WeightOptions(cd_passes=1)
        )
