"""Kernels that work row by row. Legend: t rows, d features of a row."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, residual, weight, out, total, d, eps, offset, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    """One row. `ADDS`: of x + residual, which goes to `total`."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < d
    value = tl.load(x + row * d + i, mask=inside, other=0.0)
    if ADDS:
        value = (value.to(tl.float32) + tl.load(residual + row * d + i, mask=inside, other=0.0).to(tl.float32)).to(
            x.dtype.element_ty
        )
        tl.store(total + row * d + i, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / d + eps)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if offset == 0.0:
        normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32) * w
    else:
        normed = wide * scale * (w + offset)
    tl.store(out + row * d + i, normed.to(x.dtype.element_ty), mask=inside)
