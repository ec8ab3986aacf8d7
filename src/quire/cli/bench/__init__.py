"""Benchmarks: one file for each command, and the workload, the statistics and the report that they share."""
