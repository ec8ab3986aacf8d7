"""Changes to logits before temperature, as `ops/logits_processing.py` defines them, to a copy of the rows."""

import triton
import triton.language as tl

NEVER = tl.constexpr(float("-inf"))
FIELDS = tl.constexpr(8)


@triton.jit
def ids_of(words, begin, start, count, v, TILE: tl.constexpr):
    """(token ids, which of them there are) of a list: those outside of the vocabulary are passed over."""
    i = start + tl.arange(0, TILE)
    token = tl.load(words + begin + i, mask=i < count, other=-1)
    return token, (token >= 0) & (token < v)


@triton.jit
def add(edited, words, begin, count, v, TILE: tl.constexpr):
    """Adds to distinct tokens what stands behind their list."""
    tl.debug_barrier()
    for start in range(0, count, TILE):
        token, there = ids_of(words, begin, start, count, v, TILE)
        amount = tl.load(words + begin + count + start + tl.arange(0, TILE), mask=there, other=0)
        x = tl.load(edited + token, mask=there, other=0.0)
        tl.store(edited + token, x + amount.to(tl.float32, bitcast=True), mask=there)


@triton.jit
def edit_kernel(logits, stride, edited, v, heads, words, TILE: tl.constexpr):
    """One changed row of `edited`, a copy of `logits`. `heads` has `FIELDS` numbers for it: which row; where its lists
    begin in `words`, one behind the other; how long they are: allowed (-1: all are), forbidden, biased, repeated; the
    bits of the penalty for repetition; how many ids the output has. Behind the biased and the output: what is added."""
    heads += tl.program_id(0) * FIELDS
    row = tl.load(heads).to(tl.int64)
    logits += row * stride
    edited += row * v
    begin, count = tl.load(heads + 1), tl.load(heads + 2)
    if count >= 0:
        for start in range(0, v, TILE):
            token = start + tl.arange(0, TILE)
            tl.store(edited + token, tl.full([TILE], NEVER, tl.float32), mask=token < v)
        tl.debug_barrier()
        for start in range(0, count, TILE):
            token, there = ids_of(words, begin, start, count, v, TILE)
            tl.store(edited + token, tl.load(logits + token, mask=there, other=0.0), mask=there)
        tl.debug_barrier()
    begin += tl.maximum(count, 0)
    count = tl.load(heads + 3)
    for start in range(0, count, TILE):
        token, there = ids_of(words, begin, start, count, v, TILE)
        tl.store(edited + token, tl.full([TILE], NEVER, tl.float32), mask=there)
    begin += count
    count = tl.load(heads + 4)
    add(edited, words, begin, count, v, TILE)
    begin += 2 * count
    count = tl.load(heads + 5)
    penalty = tl.load(heads + 6).to(tl.float32, bitcast=True)
    tl.debug_barrier()
    for start in range(0, count, TILE):
        token, there = ids_of(words, begin, start, count, v, TILE)
        x = tl.load(edited + token, mask=there, other=0.0)
        tl.store(edited + token, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), mask=there)
    begin += count
    add(edited, words, begin, tl.load(heads + 7), v, TILE)
