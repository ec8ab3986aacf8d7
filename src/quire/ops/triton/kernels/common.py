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


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """Float32 x in TYPE, to nearest, ties to even. The interpreter's own conversion to bfloat16 cuts off."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, bits >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def row_sum(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`[ROWS, BLOCK]` to `[ROWS]`: neighbours are added, then neighbouring sums, and so on.

    The order of `tl.sum` depends on how a tile lies in registers, and so on what else a kernel does. This one is the
    same in every kernel.
    """
    tl.static_assert(BLOCK <= 512)
    x = x.reshape(ROWS * BLOCK)
    for _ in tl.static_range(9):
        if x.shape[0] > ROWS:
            x = tl.sum(x.reshape(x.shape[0] // 2, 2), axis=1)
    return x
