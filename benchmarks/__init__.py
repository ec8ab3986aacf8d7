"""Measurements. Run from the root of the repository, with `python -m benchmarks.NAME` or as scripts."""
