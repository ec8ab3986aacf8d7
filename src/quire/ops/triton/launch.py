"""How a kernel is started. A value that ops are given, so that the same calls can compile for a machine that is not
there (`compile_only`)."""

from __future__ import annotations

from typing import Any, Protocol


class Launch(Protocol):
    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
    ) -> None:
        """`kernel` over `grid` (1 to 3 numbers, none of them 0), with positional arguments and then constants."""
        ...


def run(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
) -> None:
    """On the device of the arguments.

    Products and sums are never fused behind our back: whether they are would depend on what stands around them, and
    two variants of a kernel (few rows, many rows) must round alike (promise P1).
    """
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **constexprs)
