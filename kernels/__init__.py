"""Compute: the ops every quantized layer is made of (ops.py), and what makes them fast on a given machine."""
