"""Weights in MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss's checkpoints store them: written out when they are read.

Legend: n output features, g blocks of 32 input features, j bytes of a block (two values each, the lower nibble first).
"""

from __future__ import annotations

import torch
from torch import Tensor

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


def expand(blocks_ngj: Tensor, scales_ng: Tensor) -> Tensor:
    """`[n, 32 g]` in bfloat16, which holds every such value: a sign, one of eight magnitudes, a power of two."""
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float32)
    pairs = torch.stack((values[(blocks_ngj & 15).long()], values[(blocks_ngj >> 4).long()]), dim=-1)
    scaled = torch.ldexp(pairs.flatten(-2), scales_ng.to(torch.int32)[..., None] - _BIAS)
    return scaled.flatten(1).to(torch.bfloat16)
