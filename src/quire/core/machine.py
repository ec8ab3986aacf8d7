"""What can be told of the machine by looking at its files."""

from __future__ import annotations

from pathlib import Path

_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
"""There where a driver for NVIDIA's or AMD's GPUs is loaded."""


def has_gpu_driver() -> bool:
    """Whether a GPU may be found here."""
    return any(Path(path).exists() for path in _GPU_FILES)
