"""How a kernel is started. A value that ops are given, so that the same calls can compile for a machine that is not
there (`compile_only`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": False}
"""Products and sums are never fused behind our back: whether they are would depend on what stands around them, and two
variants of a kernel (few rows, many rows) must round alike (promise P1)."""
HIP_OPTIONS: Mapping[str, Any] = {**OPTIONS, "matrix_instr_nonkdim": 16}
"""AMD's matrix unit has instructions of 16 x 16 and of 32 x 32, which add up different lengths of k at a time. Left to
itself Triton takes the larger where the tile has room, and so few rows and many would round differently."""


class Launch(Protocol):
    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
    ) -> None:
        """`kernel` over `grid` (1 to 3 numbers, none of them 0), with positional arguments and then constants."""
        ...


def run(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
) -> None:
    """On the device of the arguments."""
    options = OPTIONS if torch.version.hip is None else HIP_OPTIONS
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **options, **constexprs)
