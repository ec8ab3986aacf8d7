"""Small tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, there. A GPU's work goes on meanwhile: out of memory that is not pinned, torch would first
    wait until all that was launched is done."""
    if device.type == "cuda":
        # Dense: of a view torch would make a copy that is not pinned, and wait.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        return pinned.to(device, non_blocking=True)
    return tensor.to(device)
