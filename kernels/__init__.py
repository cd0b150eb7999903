"""Compute: the ops every quantized layer is made of (ops.py), and what makes them fast on a given machine."""

from __future__ import annotations

from quantdit.kernels.triton_ops import dispatch as _dispatch  # noqa: F401 - defines torch.ops.quantdit, on CUDA too
