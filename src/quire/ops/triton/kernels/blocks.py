"""Copies of KV blocks. Legend: m pairs, n blocks, w words of a block."""

import triton
import triton.language as tl


@triton.jit
def copy_blocks_kernel(
    source,
    destination,
    pairs,
    parts,
    heads,
    source_n,
    destination_n,
    w,
    source_layer_stride,
    source_part_stride,
    source_head_stride,
    source_block_stride,
    destination_layer_stride,
    destination_part_stride,
    destination_head_stride,
    destination_block_stride,
    BLOCK: tl.constexpr,
):
    """A piece of one head's block of a pair. A pair whose blocks are not there is passed over."""
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    layer, part, head = row // (parts * heads), row // heads % parts, row % heads
    from_block = tl.load(pairs + 2 * pair).to(tl.int64)
    to_block = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    words = tl.where(from_block >= 0, w, 0)
    words = tl.where(from_block < source_n, words, 0)
    words = tl.where(to_block >= 0, words, 0)
    words = tl.where(to_block < destination_n, words, 0)
    source += layer * source_layer_stride + part * source_part_stride + head * source_head_stride
    destination += layer * destination_layer_stride + part * destination_part_stride + head * destination_head_stride
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + from_block * source_block_stride + i, mask=i < words, other=0)
    tl.store(destination + to_block * destination_block_stride + i, value, mask=i < words)
