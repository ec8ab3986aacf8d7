"""Norms. Legend: d features of a row.

A program has `ROWS` rows, each at once. Row r lies at (r // inner) * outer_stride + (r % inner) * inner_stride: heads
that are a part of a wider row need not be copied.
"""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import rounded, row_sum


@triton.jit
def root_mean_square_scale(wide, d, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What each row of `[ROWS, BLOCK]` is multiplied by; float32 `[ROWS]`. Beyond d there are zeros."""
    mean = tl.div_rn(_sum(wide * wide, ROWS, BLOCK), tl.zeros([ROWS], tl.float32) + d)
    return tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def scaled(wide, scale, weight, offset, TYPE: tl.constexpr, OFFSETS: tl.constexpr):
    """As `ops.norm` rounds; all but TYPE in float32."""
    if OFFSETS:
        return rounded(wide * scale * (weight + offset), TYPE)
    else:
        return rounded(rounded(wide * scale, TYPE).to(tl.float32) * weight, TYPE)


@triton.jit
def _sum(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    if BLOCK <= 512:
        return row_sum(x, ROWS, BLOCK)
    else:
        return tl.sum(x, axis=1)


@triton.jit
def _load_sum(x, x_at, residual, total, dense_at, inside, ADDS: tl.constexpr):
    """x, or x + residual, which goes to `total`; in float32."""
    value = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(residual + dense_at, mask=inside, other=0.0).to(tl.float32)
        stored = rounded(value + added, x.dtype.element_ty)
        tl.store(total + dense_at, stored, mask=inside)
        value = stored.to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    rows,
    inner,
    outer_stride,
    inner_stride,
    d,
    eps,
    offset,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """All but x lie row after row."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (i < d)
    x_at = row // inner * outer_stride + row % inner * inner_stride + i
    dense_at = row * d + i
    wide = _load_sum(x, x_at, residual, total, dense_at, inside, ADDS)
    w = tl.load(weight + i, mask=i < d, other=0.0).to(tl.float32)
    scale = root_mean_square_scale(wide, d, eps, ROWS, BLOCK)[:, None]
    tl.store(out + dense_at, scaled(wide, scale, w, offset, x.dtype.element_ty, OFFSETS), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    rows,
    inner,
    outer_stride,
    inner_stride,
    d,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """All but x lie row after row."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (i < d)
    x_at = row // inner * outer_stride + row % inner * inner_stride + i
    dense_at = row * d + i
    wide = _load_sum(x, x_at, residual, total, dense_at, inside, ADDS)
    w = tl.load(weight + i, mask=i < d, other=0.0).to(tl.float32)
    mean = tl.div_rn(_sum(wide, ROWS, BLOCK), tl.zeros([ROWS], tl.float32) + d)
    centered = tl.where(inside, wide - mean[:, None], 0.0)
    normed = centered * root_mean_square_scale(centered, d, eps, ROWS, BLOCK)[:, None] * w
    if BIASED:
        normed += tl.load(bias + i, mask=i < d, other=0.0).to(tl.float32)
    tl.store(out + dense_at, rounded(normed, x.dtype.element_ty), mask=inside)
