"""The gate: a report against a baseline, each measure within its margin or not."""
