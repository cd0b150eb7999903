"""Calibration: pure mathematics from weights and statistics to quantized weights, and the capture that feeds it."""
