"""Kernels that work row by row. Legend: t rows, h heads, d features of a row or a head, v rows of a table."""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import rounded


@triton.jit
def _sigmoid_share(x, y):
    """x * sigmoid(y). The exponential function does not overflow: beyond 87 the result is as good as zero."""
    return x / (tl.exp(tl.minimum(-y, 87.0)) + 1.0)


@triton.jit
def activated(x, NAME: tl.constexpr):
    """One of `ops.activation.ACTIVATIONS`, of float32."""
    if NAME == "silu":
        return _sigmoid_share(x, x)
    elif NAME == "quick_gelu":
        return _sigmoid_share(x, x * 1.702)
    elif NAME == "gelu":
        return x * 0.5 * (tl.erf(x * 0.7071067811865476) + 1.0)
    elif NAME == "gelu_tanh":  # (tanh(y) + 1) / 2 is sigmoid(2y), which does not cancel
        return _sigmoid_share(x, 1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(NAME == "relu2")
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive


@triton.jit
def activation_kernel(x, up, out, d, x_stride, up_stride, NAME: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of a row. The activation is rounded before it is multiplied."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < d
    value = tl.load(x + row * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    result = rounded(activated(value, NAME), x.dtype.element_ty)
    if GATED:
        factor = tl.load(up + row * up_stride + i, mask=inside, other=0.0).to(tl.float32)
        result = rounded(result.to(tl.float32) * factor, x.dtype.element_ty)
    tl.store(out + row * d + i, result, mask=inside)


@triton.jit
def embedding_kernel(ids, table, out, v, d, table_stride, BLOCK: tl.constexpr):
    """A piece of a row; zeros for an id that is none, such as that of a row that could not be sampled."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + row).to(tl.int64)
    known = (token >= 0) & (token < v)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(table + tl.where(known, token, 0) * table_stride + i, mask=i < d, other=0.0)
    tl.store(out + row * d + i, tl.where(known, value, 0.0).to(table.dtype.element_ty), mask=i < d)


@triton.jit
def rotated(first, second, cos, sin):
    """Both halves of pairs in float32, turned by an angle."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rope_kernel(
    x,
    cos,
    sin,
    out,
    h,
    d,
    row_stride,
    head_stride,
    cos_stride,
    sin_stride,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Some heads of a row. `HALF` is r/2, `REST` what is not turned."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (head < h) & (i < HALF)
    c = tl.load(cos + row * cos_stride + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + row * sin_stride + i, mask=i < HALF, other=0.0)
    x_at = x + row * row_stride + head * head_stride
    out_at = out + row * (h * d) + head * d
    first = tl.load(x_at + i, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_at + HALF + i, mask=inside, other=0.0).to(tl.float32)
    first, second = rotated(first, second, c, s)
    tl.store(out_at + i, rounded(first, x.dtype.element_ty), mask=inside)
    tl.store(out_at + HALF + i, rounded(second, x.dtype.element_ty), mask=inside)
    if REST > 0:
        j = tl.arange(0, REST_BLOCK)[None, :]
        passed = (head < h) & (j < REST)
        tl.store(out_at + 2 * HALF + j, tl.load(x_at + 2 * HALF + j, mask=passed, other=0.0), mask=passed)
