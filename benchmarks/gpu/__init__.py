"""Engines on one GPU: what they take for a step, beside what the machine's memory and arithmetic allow."""
