"""What runs on the device. Triton's own language: mypy sees no types here."""
