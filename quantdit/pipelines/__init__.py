"""Pipelines: loaded, sampled."""
