"""Rows in 8 bits. Legend: t rows, k features, g groups of features that share a scale."""

import triton
import triton.language as tl

from quire.ops.triton.kernels.kv_numbers import stored


@triton.jit
def quantize_rows_kernel(
    x,
    values,
    scales,
    k,
    x_stride,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HALVES: tl.constexpr,
    FLOATS: tl.constexpr,
):
    """One row's group of GROUP (or all k, where GROUP is 0) features, as whole numbers. FLOATS: as bytes of e4m3.

    HALVES: within a group, features of even number come first and then the odd ones, as 4-bit weights' nibbles do.
    """
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, BLOCK)
    if GROUP == 0:
        size, place_j = k, j
    else:
        size, place_j = GROUP, j
    if HALVES:
        place_j = j // 2 + j % 2 * (size // 2)
    inside = j < size
    wide = tl.load(x + row * x_stride + group * size + j, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), axis=0)
    most: tl.constexpr = 448.0 if FLOATS else 127.0
    inverse = tl.where(largest > 0, tl.div_rn(1.0, tl.where(largest > 0, largest, 1.0)) * most, 0.0)
    scaled = tl.minimum(tl.maximum(wide * inverse, -most), most)
    if FLOATS:
        # As `values` are the bytes of e4m3: what is no number stays none, so that its row shows it.
        number = stored(scaled, 1.0, "fp8", tl.int8)
        rounded = tl.where(wide == wide, number, tl.full((BLOCK,), 127, tl.int8))
    else:
        # Adding 1.5 * 2^23 leaves no room for a fraction: it is rounded off, ties to even.
        rounded = ((scaled + 12582912.0) - 12582912.0).to(values.dtype.element_ty)
    tl.store(values + row * k + group * size + place_j, rounded, mask=inside)
    tl.store(scales + row * tl.num_programs(1) + group, largest * (1.0 / most))
