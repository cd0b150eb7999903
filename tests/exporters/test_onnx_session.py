"""Names of the inputs of a graph: where a tensor or a number lies in the nested arguments of a call."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxruntime")

from quantdit.exporters.onnx_session import leaves


def test_leaves_are_named_by_where_they_lie():
    x = torch.zeros(2)
    arguments = {"hidden_states": x, "added": {"resolution": x, "sizes": [(1, 2), 3]}, "empty": {}, "flag": None}
    expected = [("hidden_states", x), ("added.resolution", x)]
    expected += [("added.sizes.0.0", 1), ("added.sizes.0.1", 2), ("added.sizes.1", 3), ("flag", None)]
    found = leaves(arguments)
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert all(a is b or a == b for (_, a), (_, b) in zip(found, expected, strict=True))
