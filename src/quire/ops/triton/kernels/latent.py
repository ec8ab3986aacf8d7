"""Attention over a paged cache of latents, which all query heads share. What is fixed by a position alone, and what
`plan` and `tiles` hold, is as in `kernels.attention`; here decodes and prompts have tiles of one size.

Legend: r rows (query heads of one token, or of several), c keys of a tile, i numbers of a part of a latent, j rotated
numbers of a key. A latent is in PARTS parts of PART numbers; a program computes one part of the result.
"""

import triton
import triton.language as tl

from quire.ops.triton.kernels.attention import finish, fold, quantized
from quire.ops.triton.kernels.common import dot

_HIDDEN = tl.constexpr(float("-inf"))


@triton.jit
def load_part(
    cache, place, scale_c, start, width, there, PART: tl.constexpr, QUANTIZED: tl.constexpr, TYPE: tl.constexpr
):
    """`[c, i]`: numbers `start` to `start` + PART of rows at `place` `[c]`, up to `width`."""
    i = start + tl.arange(0, PART)
    x = tl.load(cache + place[:, None] + i[None, :], mask=there[:, None] & (i < width)[None, :], other=0.0)
    if QUANTIZED:
        x = x.to(tl.float32) * scale_c[:, None]
    return x.to(TYPE)


@triton.jit
def load_queries(q, q_place, start, width, real, PART: tl.constexpr, TYPE: tl.constexpr):
    i = start + tl.arange(0, PART)
    return tl.load(q + q_place[:, None] + i[None, :], mask=real[:, None] & (i < width)[None, :], other=0.0).to(TYPE)


@triton.jit
def attend_latents(
    q_first, q_second, q_rope, first, stop, limit, cache, scales, block_stride, scale_stride, table, scale, part,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    ROPE_PADDED: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, QUANTIZED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Softmax of the keys from `first` to before `stop`: highest scores `[r]`, sums of weights `[r]`, and the weighted
    sums `[r, i]` of the latents' part. A row sees the keys before its `limit`. Splits are folded left to right."""
    ROWS: tl.constexpr = q_first.shape[0]
    stored_latent: tl.constexpr = LATENT + LATENT % 2
    stored_rope: tl.constexpr = ROPE + ROPE % 2
    # Behind a block's latents are their scales, if there are any, and then the rotated keys with theirs.
    key_start: tl.constexpr = BLOCK_SIZE * (stored_latent + 4 * QUANTIZED)
    key_scale_start: tl.constexpr = (key_start + BLOCK_SIZE * stored_rope) // 4
    all_top = tl.full([ROWS], _HIDDEN, tl.float32)
    all_total = tl.zeros([ROWS, 16], tl.float32)
    all_weighted = tl.zeros([ROWS, PART], tl.float32)
    top, total, weighted = all_top, all_total, all_weighted
    for tile in range(first, stop, TILE):
        i_c = tile + tl.arange(0, TILE)
        there = i_c < stop
        block = tl.load(table + i_c // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        offset = i_c % BLOCK_SIZE
        latent_scale, key_scale = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        if QUANTIZED:
            at = scales + block * scale_stride + offset
            latent_scale = tl.load(at + BLOCK_SIZE * stored_latent // 4, mask=there, other=0.0)
            key_scale = tl.load(at + key_scale_start, mask=there, other=0.0)
        place = block * block_stride + offset * stored_latent
        key_place = block * block_stride + key_start + offset * stored_rope
        k = load_part(cache, place, latent_scale, 0, LATENT, there, PART, QUANTIZED, TYPE)
        scores = dot(q_first, tl.trans(k), tl.zeros([ROWS, TILE], tl.float32))
        if PARTS > 1:
            k = load_part(cache, place, latent_scale, PART, LATENT, there, PART, QUANTIZED, TYPE)
            scores = dot(q_second, tl.trans(k), scores)
        k = load_part(cache, key_place, key_scale, 0, ROPE, there, ROPE_PADDED, QUANTIZED, TYPE)
        scores = dot(q_rope, tl.trans(k), scores) * scale
        scores = tl.where(i_c[None, :] < limit[:, None], scores, _HIDDEN)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == _HIDDEN, 0.0, new_top)
        weights = tl.exp2(scores - base[:, None]).to(TYPE)
        decay = tl.exp2(top - base)
        v = load_part(cache, place, latent_scale, part * PART, LATENT, there, PART, QUANTIZED, TYPE)
        total = dot(weights, tl.full([TILE, 16], 1.0, TYPE), total * decay[:, None])
        weighted = dot(weights, v, weighted * decay[:, None])
        top = new_top
        if ((tile + TILE) % SPLIT == 0) | (tile + TILE >= stop):
            all_top, all_total, all_weighted = fold(all_top, all_total, all_weighted, top, total, weighted)
            top = tl.full([ROWS], _HIDDEN, tl.float32)
            total = tl.zeros([ROWS, 16], tl.float32)
            weighted = tl.zeros([ROWS, PART], tl.float32)
    # All sixteen columns are alike.
    return all_top, tl.max(all_total, axis=1), all_weighted


@triton.jit(do_not_specialize=["table_stride", "requests", "most_items", "programs"])
def latent_decode_kernel(
    q, out, partial, tops, totals, plan, cache, scales, block_stride, scale_stride, table, table_stride, scale,
    requests, most_items, programs,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, ROWS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, ROPE_PADDED: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, QUANTIZED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """As `decode_kernel`: an item for some of the heads and one part of the result."""
    HEAD_BLOCKS: tl.constexpr = (HEADS + HEADS_HERE - 1) // HEADS_HERE
    is_whole = tl.load(plan + 4 * requests + 1 + 2 * most_items) != 0
    items = plan + 4 * requests + 1
    work = tl.load(plan + 3 * requests + requests) * (HEAD_BLOCKS * PARTS)
    i_r, i_i = tl.arange(0, ROWS), tl.arange(0, PART)
    for number in range(tl.program_id(0), work, programs):
        item, part = number // (HEAD_BLOCKS * PARTS), number % PARTS
        head = number // PARTS % HEAD_BLOCKS * HEADS_HERE + i_r
        real = (i_r < HEADS_HERE) & (head < HEADS)
        request, split = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
        context = tl.load(plan + requests + request)
        row = tl.load(plan + request).to(tl.int64) * HEADS + head
        q_place = row * (LATENT + ROPE)
        q_first = load_queries(q, q_place, 0, LATENT, real, PART, TYPE)
        q_second = q_first
        if PARTS > 1:
            q_second = load_queries(q, q_place, PART, LATENT, real, PART, TYPE)
        q_rope = load_queries(q, q_place + LATENT, 0, ROPE, real, ROPE_PADDED, TYPE)
        limit = tl.where(real, context, 0)
        top, total, weighted = attend_latents(
            q_first, q_second, q_rope, tl.where(is_whole, 0, split * SPLIT),
            tl.where(is_whole, context, tl.minimum(split * SPLIT + SPLIT, context)), limit, cache, scales, block_stride,
            scale_stride, table + request.to(tl.int64) * table_stride, scale, part, LATENT, ROPE, BLOCK_SIZE, PART,
            PARTS, ROPE_PADDED, TILE, SPLIT, QUANTIZED, TYPE,
        )  # fmt: skip
        i = part * PART + i_i
        inside = real[:, None] & (i < LATENT)[None, :]
        if is_whole:
            result = finish(top, total, weighted, q, head, real, False)
            # An empty request may have no row of its own.
            written = inside & (limit > 0)[:, None]
            tl.store(out + row[:, None] * LATENT + i[None, :], result.to(out.dtype.element_ty), mask=written)
        else:
            place = (tl.full([], 0, tl.int64) + item) * HEADS + head
            tl.store(tops + place, top, mask=real)  # the same from every part
            tl.store(totals + place, total, mask=real)
            tl.store(partial + place[:, None] * (PARTS * PART) + i[None, :], weighted, mask=real[:, None])


@triton.jit(do_not_specialize=["tiles", "table_stride"])
def latent_prefill_kernel(
    q, out, tiles, cache, scales, block_stride, scale_stride, table, table_stride, scale,
    HEADS: tl.constexpr, HEADS_HERE: tl.constexpr, ROWS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, ROPE_PADDED: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, QUANTIZED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """As `prefill_kernel`: a tile of a request's tokens with some of the heads, for one part of the result."""
    mine = tiles + 5 * tl.program_id(0)
    request, first_row, tokens = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    first_position = tl.load(mine + 3)
    part = tl.program_id(1) % PARTS
    i_r = tl.arange(0, ROWS)
    token = i_r // HEADS_HERE
    head = tl.program_id(1) // PARTS * HEADS_HERE + i_r % HEADS_HERE
    real = (token < tokens) & (head < HEADS)
    row = (first_row + token).to(tl.int64) * HEADS + head
    q_place = row * (LATENT + ROPE)
    q_first = load_queries(q, q_place, 0, LATENT, real, PART, TYPE)
    q_second = q_first
    if PARTS > 1:
        q_second = load_queries(q, q_place, PART, LATENT, real, PART, TYPE)
    q_rope = load_queries(q, q_place + LATENT, 0, ROPE, real, ROPE_PADDED, TYPE)
    limit = tl.where(real, first_position + token + 1, 0)
    top, total, weighted = attend_latents(
        q_first, q_second, q_rope, 0, first_position + tokens, limit, cache, scales, block_stride, scale_stride,
        table + request.to(tl.int64) * table_stride, scale, part, LATENT, ROPE, BLOCK_SIZE, PART, PARTS, ROPE_PADDED,
        TILE, SPLIT, QUANTIZED, TYPE,
    )  # fmt: skip
    result = finish(top, total, weighted, q, head, real, False)
    i = part * PART + tl.arange(0, PART)
    inside = real[:, None] & (i < LATENT)[None, :]
    tl.store(out + row[:, None] * LATENT + i[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def latent_write_kernel(
    latents, keys, cache, scales, slots, latent_stride, key_stride, block_stride, scale_stride, largest,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, LATENT_PADDED: tl.constexpr,
    ROPE_PADDED: tl.constexpr, QUANTIZED: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """One token's row. A latent that is not finite becomes zeros, and its key NaN."""
    token = tl.program_id(0).to(tl.int64)
    stored_latent: tl.constexpr = LATENT + LATENT % 2
    stored_rope: tl.constexpr = ROPE + ROPE % 2
    key_start: tl.constexpr = BLOCK_SIZE * (stored_latent + 4 * QUANTIZED)
    i, j = tl.arange(0, LATENT_PADDED)[None, :], tl.arange(0, ROPE_PADDED)[None, :]
    slot = tl.load(slots + token).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    latent = tl.load(latents + token * latent_stride + i, mask=i < LATENT, other=0.0)
    key = tl.load(keys + token * key_stride + j, mask=j < ROPE, other=0.0)
    finite = tl.abs(latent.to(tl.float32)) < float("inf")
    sound = tl.min(finite.to(tl.int32)) == 1
    latent = tl.where(sound, latent, 0.0)
    key = tl.where(sound, key, float("nan"))
    if QUANTIZED:
        latent, latent_scale = quantized(latent.to(tl.float32), largest, ROUNDED)
        key, key_scale = quantized(tl.where(j < ROPE, key.to(tl.float32), 0.0), largest, ROUNDED)
        at = scales + block * scale_stride + offset + tl.arange(0, 1)
        tl.store(at + BLOCK_SIZE * stored_latent // 4, latent_scale)
        tl.store(at + (key_start + BLOCK_SIZE * stored_rope) // 4, key_scale)
    place = cache + block * block_stride
    tl.store(place + offset * stored_latent + i, latent.to(cache.dtype.element_ty), mask=i < LATENT)
    tl.store(place + key_start + offset * stored_rope + j, key.to(cache.dtype.element_ty), mask=j < ROPE)
