"""The conformance matrix: every architecture against `transformers`, on tiny random checkpoints."""
