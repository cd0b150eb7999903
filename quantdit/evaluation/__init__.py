"""Drift of a quantized model from its reference, in numbers and pictures."""
