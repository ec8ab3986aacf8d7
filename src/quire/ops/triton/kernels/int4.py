"""4-bit weights by 8-bit rows. Legend: f features of a tile, t rows, s spans of k that share a row's scale, g groups.

Whole numbers of both are multiplied as bfloat16, which holds them, and summed in float32, which holds the sums of a
span (at most 256 * 120 * 127): exactly, and without a shortest length of a sum, which products of bytes have.
"""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import dot
from quire.ops.triton.kernels.linear import add_parts, store_rows


@triton.jit
def int4_product(
    w,
    x,
    x_scale,
    scale,
    zero,
    multiplier,
    first,
    last,
    n,
    safe_f,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`[f, t]` over spans first..last-1, in float32. w `[f, 1]`, x `[1, t]` and x_scale `[t]` point to rows' first."""
    HALF: tl.constexpr = SPAN // 2
    PIECE: tl.constexpr = 64 if HALF > 64 else HALF
    GROUPS: tl.constexpr = 1 if SPAN == GROUP or 2 * PIECE <= GROUP else 2 * PIECE // GROUP
    total = tl.zeros((BLOCK_F, BLOCK_T), tl.float32)
    for span in range(first, last):
        exact = tl.zeros((BLOCK_F, BLOCK_T), tl.float32)
        for piece in tl.static_range(HALF // PIECE):
            j = piece * PIECE + tl.arange(0, PIECE)
            both = tl.load(w + span * HALF + j[None, :])
            low, high = (both & 15).to(tl.int8), (both >> 4).to(tl.int8)
            if ZEROS:
                origin = tl.load(zero + span * n + safe_f).to(tl.int8)[:, None]
                low, high = low - origin, high - origin
            else:
                low, high = low - 8, high - 8
            if SPAN != GROUP:
                group = span * (SPAN // GROUP) + piece * 2 * PIECE // GROUP + tl.arange(0, GROUPS)
                times = tl.load(multiplier + group[None, :] * n + safe_f[:, None])
                times = tl.broadcast_to(times[:, :, None], (BLOCK_F, GROUPS, PIECE // GROUPS))
                times = tl.reshape(times, (BLOCK_F, PIECE))
                low, high = low * times, high * times
            even = tl.load(x + span * SPAN + j[:, None])
            odd = tl.load(x + span * SPAN + HALF + j[:, None])
            exact = dot(low.to(tl.float32).to(tl.bfloat16), even, exact)
            exact = dot(high.to(tl.float32).to(tl.bfloat16), odd, exact)
        w_scale = tl.load(scale + span * n + safe_f)
        total += exact * w_scale[:, None] * tl.load(x_scale + span)[None, :]
    return total


@triton.jit(do_not_specialize=["t", "parts", "steps"])
def int4_kernel(
    x,
    x_scale,
    w,
    scale,
    zero,
    multiplier,
    bias,
    out,
    partials,
    tickets,
    t,
    k,
    n,
    parts,
    steps,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """x: what `quantize_rows_kernel` makes, spans in halves. scale `[s, n]`, zero and multiplier `[g, n]`; a group is
    a span where there are no multipliers. FORM, parts and steps (of spans) as in `linear_kernel`.
    """
    row_tiles = tl.cdiv(t, BLOCK_T)
    row_tile, job = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    tile, part = job, 0
    if FORM == "split":
        tile, part = job // parts, job % parts
    rows_t = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    features_f = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    safe_t = tl.minimum(rows_t, t - 1).to(tl.int64)
    safe_f = tl.minimum(features_f, n - 1)
    spans = k // SPAN
    w_f = w + safe_f.to(tl.int64)[:, None] * (k // 2)
    x_t, x_scale_t = x + safe_t[None, :] * k, x_scale + safe_t * spans
    total = tl.zeros((BLOCK_F, BLOCK_T), tl.float32)
    first_part, last_part = 0, parts
    if FORM == "split":
        first_part, last_part = part, part + 1
    for index in range(first_part, last_part):
        last = tl.minimum((index + 1) * steps, spans)
        total += int4_product(
            w_f,
            x_t,
            x_scale_t,
            scale,
            zero,
            multiplier,
            index * steps,
            last,
            n,
            safe_f,
            GROUP,
            SPAN,
            ZEROS,
            BLOCK_F,
            BLOCK_T,
        )
    if FORM == "split":
        i = tl.arange(0, BLOCK_F)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        slot = job * row_tiles + row_tile
        tl.store(partials + slot.to(tl.int64) * (BLOCK_F * BLOCK_T) + i, total)
        # As in `linear_kernel`.
        first = (job - part) * row_tiles + row_tile
        tl.debug_barrier()
        arrived = tl.atomic_add(tickets + first, 1, sem="acq_rel", scope="gpu")
        if arrived == parts - 1:
            tl.debug_barrier()
            total = add_parts(partials, first, row_tiles, parts, BLOCK_F, BLOCK_T)
            store_rows(total, rows_t, features_f, x_scale, scale, bias, out, t, n, n, 0, BIAS)
            tl.store(tickets + first, 0)
    else:
        store_rows(total, rows_t, features_f, x_scale, scale, bias, out, t, n, n, 0, BIAS)
