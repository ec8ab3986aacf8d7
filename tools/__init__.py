"""What is used beside the package: checkpoints for benchmarks and tests, the built-in model, conformance."""
