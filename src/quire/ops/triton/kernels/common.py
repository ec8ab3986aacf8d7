"""What all kernels share."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, in float32. Float32 operands are not shortened to tf32.

    The interpreter reads bfloat16 as whole numbers, and its sums are numpy's, which depend on the tile's shape; in
    float64 they hardly do.
    """
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")
