"""Measures of tensors. A new one is a function here, a row of table.py (label, unit, margin), a call in ../apply_metrics.py."""
