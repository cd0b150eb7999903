"""Weights on disk: quantized folders, full-precision sources, models larger than memory."""
