"""y^T = W x^T. Legend: f features of a tile (rows of W), t rows of x, k features in; a job is a tile's part of k.

The weight is the matrix unit's left operand, so that its 64 or 128 features fill the unit however few rows there are,
and a result is made by the same instructions, in the same order of k, for one row as for thousands (promise P1).

A float sum over k may be cut into parts, each summed from zero and the sums then added from left to right: by one
program after the other parts where rows are many, by one program per part where they are few. The rounding is the same.
"""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import INTERPRETED, dot

MOST_PARTS = tl.constexpr(8)
"""Of a sum over k."""


@triton.jit
def multiply_add(w_fk, x_kt, acc_ft):
    """acc + w @ x. Whole numbers are summed exactly; an 8-bit float is widened to what x is.

    Both may be 8-bit floats. Libraries' products of these choose their order of sums by the number of rows, which
    breaks promise P1; here the feature tile is the left operand in every call, and k goes in steps of 128.
    """
    if acc_ft.dtype == tl.int32:
        if INTERPRETED:
            return acc_ft + tl.dot(w_fk.to(tl.float64), x_kt.to(tl.float64), out_dtype=tl.float64).to(tl.int32)
        else:
            return tl.dot(w_fk, x_kt, acc_ft, out_dtype=tl.int32)
    elif x_kt.dtype == tl.float8e4nv:
        if INTERPRETED:
            return dot(w_fk.to(tl.float32), x_kt.to(tl.float32), acc_ft)
        else:
            # The matrix unit of sm_90 adds up 8-bit floats in fewer bits than float32 has: only these few.
            return tl.dot(w_fk, x_kt, acc_ft, max_num_imprecise_acc=128)
    else:
        return dot(w_fk.to(x_kt.dtype), x_kt, acc_ft)


@triton.jit
def product(
    w, x, first, last, k, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):
    """`[f, t]` over steps first..last-1 of BLOCK_K features; w `[f, 1]` and x `[1, t]` point to the rows' first."""
    i = tl.arange(0, BLOCK_K)
    w_ptrs = w + (first * BLOCK_K + i)[None, :]
    x_ptrs = x + (first * BLOCK_K + i)[:, None]
    if x.dtype.element_ty == tl.int8:
        acc = tl.zeros((BLOCK_F, BLOCK_T), tl.int32)
    else:
        acc = tl.zeros((BLOCK_F, BLOCK_T), tl.float32)
    for step in range(first, last):
        if EVEN_K:
            w_fk, x_kt = tl.load(w_ptrs), tl.load(x_ptrs)
        else:
            inside = step * BLOCK_K + i < k
            w_fk = tl.load(w_ptrs, mask=inside[None, :], other=0.0)
            x_kt = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
        acc = multiply_add(w_fk, x_kt, acc)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def store_rows(
    acc_ft, rows_t, features_f, x_scale, w_scale, bias, out, t, n, out_stride, SCALES: tl.constexpr, BIAS: tl.constexpr
):
    """Scales, bias, one rounding. SCALES: 0 none, 1 one per feature, 2 one per row as well."""
    # A sum of zeros may have either sign, by how it came about; this makes it positive.
    y = acc_ft.to(tl.float32) + 0.0
    safe_f = tl.minimum(features_f, n - 1)
    if SCALES > 0:
        y *= tl.load(w_scale + safe_f)[:, None]
    if SCALES > 1:
        y *= tl.load(x_scale + tl.minimum(rows_t, t - 1))[None, :]
    if BIAS:
        y += tl.load(bias + safe_f).to(tl.float32)[:, None]
    places = out + rows_t.to(tl.int64)[None, :] * out_stride + features_f[:, None]
    tl.store(places, y.to(out.dtype.element_ty), mask=(rows_t < t)[None, :] & (features_f < n)[:, None])


@triton.jit
def add_parts(partials, first, stride, parts, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr):
    """The sums of a tile's parts, which lie at first, first + stride ..., from left to right."""
    i = tl.arange(0, BLOCK_F)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    start = partials + first.to(tl.int64) * (BLOCK_F * BLOCK_T) + i
    total = tl.zeros((BLOCK_F, BLOCK_T), partials.dtype.element_ty)
    if BLOCK_T <= 32:  # All under way at once. A zero more changes nothing: no sum is a negative zero.
        for part in tl.static_range(MOST_PARTS):
            here = start + (part * stride).to(tl.int64) * (BLOCK_F * BLOCK_T)
            total += tl.load(
                here, mask=tl.full((BLOCK_F, BLOCK_T), part, tl.int32) < parts, other=0, cache_modifier=".cg"
            )
    else:
        for part in range(parts):
            here = start + (part * stride).to(tl.int64) * (BLOCK_F * BLOCK_T)
            total += tl.load(here, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["t", "parts0", "parts1", "parts2", "steps0", "steps1", "steps2"])
def linear_kernel(
    x,
    x_scale,
    w0,
    w1,
    w2,
    scale0,
    scale1,
    scale2,
    bias0,
    bias1,
    bias2,
    out,
    partials,
    tickets,
    t,
    k,
    x_stride,
    out_stride,
    n0,
    n1,
    n2,
    parts0,
    parts1,
    parts2,
    steps0,
    steps1,
    steps2,
    COUNT: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    FORM: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """COUNT weights `[n, k]` over the same rows, their results side by side in `out`.

    FORM "one": every sum over k is in one part. "loop": a program goes through all parts of a tile. "split": a program
    per part; the last of a tile's to arrive adds the parts up, always in the same order. `steps`: of BLOCK_K, in a
    part. `tickets`: zero before and after.
    """
    row_tiles = tl.cdiv(t, BLOCK_T)
    jobs0, jobs1, jobs2 = tl.cdiv(n0, BLOCK_F), tl.cdiv(n1, BLOCK_F), tl.cdiv(n2, BLOCK_F)
    if FORM == "split":
        jobs0, jobs1, jobs2 = jobs0 * parts0, jobs1 * parts1, jobs2 * parts2
    jobs = jobs0
    if COUNT > 1:
        jobs += jobs1
    if COUNT > 2:
        jobs += jobs2
    # Programs that run together share a few tiles of rows and of the weight, which then are read from the cache.
    width = GROUP_T * jobs
    first_tile = tl.program_id(0) // width * GROUP_T
    tiles_here = tl.minimum(row_tiles - first_tile, GROUP_T)
    row_tile = first_tile + tl.program_id(0) % width % tiles_here
    job = tl.program_id(0) % width // tiles_here

    w, w_scale, bias, n, parts, steps, local = w0, scale0, bias0, n0, parts0, steps0, job
    if COUNT > 1:
        if job >= jobs0:
            w, w_scale, bias, n, parts, steps, local = w1, scale1, bias1, n1, parts1, steps1, job - jobs0
        out += tl.where(job >= jobs0, n0, 0)
    if COUNT > 2:
        if job >= jobs0 + jobs1:
            w, w_scale, bias, n, parts, steps, local = w2, scale2, bias2, n2, parts2, steps2, job - jobs0 - jobs1
        out += tl.where(job >= jobs0 + jobs1, n1, 0)
    tile, part = local, 0
    if FORM == "split":
        tile, part = local // parts, local % parts
    rows_t = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    features_f = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    # Past the end the last row and feature are read again, and not stored.
    x_t = x + tl.minimum(rows_t, t - 1).to(tl.int64)[None, :] * x_stride
    w_f = w + tl.minimum(features_f, n - 1).to(tl.int64)[:, None] * k
    all_steps = tl.cdiv(k, BLOCK_K)
    if FORM == "one":
        total = product(w_f, x_t, 0, all_steps, k, BLOCK_F, BLOCK_T, BLOCK_K, EVEN_K)
        store_rows(total, rows_t, features_f, x_scale, w_scale, bias, out, t, n, out_stride, SCALES, BIAS)
    elif FORM == "loop":
        total = tl.zeros((BLOCK_F, BLOCK_T), partials.dtype.element_ty)
        for index in range(parts):
            last = tl.minimum((index + 1) * steps, all_steps)
            total += product(w_f, x_t, index * steps, last, k, BLOCK_F, BLOCK_T, BLOCK_K, EVEN_K)
        store_rows(total, rows_t, features_f, x_scale, w_scale, bias, out, t, n, out_stride, SCALES, BIAS)
    else:
        last = tl.minimum((part + 1) * steps, all_steps)
        own = product(w_f, x_t, part * steps, last, k, BLOCK_F, BLOCK_T, BLOCK_K, EVEN_K)
        slot = job * row_tiles + row_tile
        i = tl.arange(0, BLOCK_F)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        tl.store(partials + slot.to(tl.int64) * (BLOCK_F * BLOCK_T) + i, own)
        # All threads' stores, then one thread's ticket, which releases them and acquires the other programs'.
        first = (job - part) * row_tiles + row_tile
        tl.debug_barrier()
        arrived = tl.atomic_add(tickets + first, 1, sem="acq_rel", scope="gpu")
        if arrived == parts - 1:
            tl.debug_barrier()
            total = add_parts(partials, first, row_tiles, parts, BLOCK_F, BLOCK_T)
            store_rows(total, rows_t, features_f, x_scale, w_scale, bias, out, t, n, out_stride, SCALES, BIAS)
            tl.store(tickets + first, 0)
