"""A writer of ONNX nodes in the name of a module: readable names, constants shared by content, weights read when written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Nodes:
    """Nodes and initializers that stand for one module of the model, in the order in which they run.

    Attributes:
        path: of the module; every name begins with it.
        call: number of the call, for modules that the model calls several times.
        made: the nodes so far.
        shared: initializers of the whole graph: constants by content, weights by name.
    """

    def __init__(self, path: str, shared: dict[tuple, ir.Value], call: int = 0) -> None:
        self.path = path
        self.prefix = f"{path}~{call}" if call else path
        self.made: list[ir.Node] = []
        self.shared = shared
        self._counts: dict[str, int] = {}

    def op(self, kind: str, inputs: Sequence[ir.Value | None], *, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node of one output; `attributes` are numbers, texts, lists of numbers, data types."""
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + 1
        name = f"{self.prefix}/{kind}" if not number else f"{self.prefix}/{kind}_{number}"
        plain = {key: int(v) if isinstance(v, ir.DataType) else v for key, v in attributes.items()}
        node = ir.node(kind, inputs, plain, domain=domain, name=name)
        node.outputs[0].name = name
        self.made.append(node)
        return node.outputs[0]

    def constant(self, kind: str, array: np.ndarray) -> ir.Value:
        """Return an initializer of this content, one for the whole graph; `kind` says what it is."""
        array = np.ascontiguousarray(array)
        key = (kind, str(array.dtype), array.shape, array.tobytes())
        if key not in self.shared:
            number = sum(1 for other in self.shared if other[0] == kind)
            name = f"{kind}.{number}"
            self.shared[key] = _initializer(name, ir.Tensor(array, name=name))
        return self.shared[key]

    def lazy(self, field: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray]) -> ir.Value:
        """Return the initializer `<path>.<field>` that `make` returns when the file is written."""
        name = f"{self.path}.{field}"

        def tensor() -> ir.Tensor:
            return ir.Tensor(make(), dtype=dtype, shape=ir.Shape(shape), name=name)

        if (name,) not in self.shared:
            lazy = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)
            self.shared[(name,)] = _initializer(name, lazy)
        return self.shared[(name,)]

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Return x in another shape; 0 keeps the dimension at that place."""
        return self.op("Reshape", [x, self.constant("shape", np.array(shape, np.int64))])

    def scalar(self, number: float) -> ir.Value:
        """Return a float32 constant."""
        return self.constant("number", np.array(number, np.float32))


def _initializer(name: str, tensor: ir.Tensor | ir.LazyTensor) -> ir.Value:
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
