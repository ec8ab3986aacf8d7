"""The work of a step in which some requests decode and others compute several rows, from lengths on the device."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tiles", "requests", "most_items", "most_tiles"])
def mixed_plan_kernel(
    query_start,
    context_lens,
    plan,
    tiles,
    window,
    requests,
    most_items,
    most_tiles,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Program i writes what concerns request i: `plan` as `plan_kernel` has it for those that decode, where the request
    of a row is -2 if there is none and the row is another's; `tiles` as `prefill_kernel` wants them for those of
    several rows, or of rows without a context, late tiles first. The last program empties the tiles that are left."""
    mine = tl.program_id(0)
    i = tl.arange(0, REQUESTS)
    there = i < requests
    contexts = tl.load(context_lens + i, mask=there, other=0)
    rows = tl.load(query_start + i, mask=there, other=0)
    lens = tl.load(query_start + i + 1, mask=there, other=0) - rows
    lens = tl.where(there, lens, 0)
    firsts = tl.zeros([REQUESTS], tl.int32)
    if WINDOW:
        firsts = tl.maximum(contexts - window, 0) // SPLIT
    decodes = (lens == 1) & (contexts > 0)
    counts = tl.where(decodes, (contexts + SPLIT - 1) // SPLIT - firsts, 0)
    is_whole = tl.sum(counts, axis=0) > most_items
    counts = tl.where(is_whole, decodes.to(tl.int32), counts)
    tile_counts = tl.where(decodes, 0, (lens + TOKENS - 1) // TOKENS)
    row = tl.sum(tl.where(i == mine, rows, 0), axis=0)
    length = tl.sum(tl.where(i == mine, lens, 0), axis=0)
    context = tl.sum(tl.where(i == mine, contexts, 0), axis=0)
    start, count = tl.sum(tl.where(i < mine, counts, 0), axis=0), tl.sum(tl.where(i == mine, counts, 0), axis=0)
    first = tl.sum(tl.where(i == mine, firsts, 0), axis=0)
    tl.store(plan + mine, row)
    tl.store(plan + requests + mine, context)
    tl.store(plan + 2 * requests + mine, tl.where(count > 0, mine, -2))
    tl.store(plan + 3 * requests + mine, start)
    if mine == requests - 1:
        tl.store(plan + 4 * requests, start + count)
        tl.store(plan + 4 * requests + 1 + 2 * most_items, is_whole.to(tl.int32))
    items = plan + 4 * requests + 1
    for done in range(0, count, 128):
        j = done + tl.arange(0, 128)
        tl.store(items + 2 * (start + j), tl.zeros([128], tl.int32) + mine, mask=j < count)
        tl.store(items + 2 * (start + j) + 1, first + j, mask=j < count)
    tile, num_tiles = (
        tl.sum(tl.where(i < mine, tile_counts, 0), axis=0),
        tl.sum(tl.where(i == mine, tile_counts, 0), axis=0),
    )
    for done in range(0, num_tiles, 128):
        j = done + tl.arange(0, 128)
        place, within = tiles + 5 * (tile + j), (j < num_tiles) & (tile + j < most_tiles)
        token = (num_tiles - 1 - j) * TOKENS
        tl.store(place, tl.zeros([128], tl.int32) + mine, mask=within)
        tl.store(place + 1, row + token, mask=within)
        tl.store(place + 2, tl.minimum(length - token, TOKENS), mask=within)
        tl.store(place + 3, context - length + token, mask=within)
        tl.store(place + 4, tl.zeros([128], tl.int32) + context, mask=within)
    if mine == requests - 1:
        for done in range(tile + num_tiles, most_tiles, 128):
            j = done + tl.arange(0, 128)
            for number in tl.static_range(5):
                tl.store(tiles + 5 * j + number, tl.zeros([128], tl.int32), mask=j < most_tiles)
