"""Write a checkpoint in a form that other programs read."""

from quantdit.exporters.onnx_session import session

__all__ = ["session"]
