"""How many rows a decode is padded to: as few as have the bits of a prefill's on this device.

A tile of 16 rows and one of 64 are multiplied by different instructions on some devices. Whether both round alike is
found out by trying, once for each head shape, when nothing is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.triton.attention_plan import Tiling

if TYPE_CHECKING:
    from quire.ops.triton.attention import TritonAttention

_BLOCK_SIZE = 16
_CONTEXTS = (3, 130, 777, 2049)
_WARP_GROUP_ROWS = 64
"""Of the fewest that Hopper's wider instruction multiplies."""


def choose_decode_rows(make: Callable[[int], TritonAttention], tiling: Tiling, group: int) -> Tiling:
    """`make`: a kernel that pads decodes to so many rows."""
    for rows in sorted({tiling.decode_rows, max(_WARP_GROUP_ROWS, tiling.decode_rows)}):
        if rows < tiling.prefill_rows:
            kernel = make(rows)
            if all(_alike(kernel, tiling, group, context) for context in _CONTEXTS):
                return tiling.with_decode_rows(rows)
    return tiling.with_decode_rows(tiling.prefill_rows)


def _alike(kernel: TritonAttention, tiling: Tiling, group: int, context: int) -> bool:
    """Whether the last token of a context has the same bits alone and with the token before it."""
    target = kernel.target
    generator = torch.Generator().manual_seed(context)
    head_dim, kv_heads = tiling.padded_dim, 2
    shape = AttentionShape(num_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5)
    blocks = -(-context // _BLOCK_SIZE)
    k_tgd, v_tgd = torch.randn(2, context, kv_heads, head_dim, generator=generator).to(target.device, target.dtype)
    q_thd = torch.randn(2, group * kv_heads, head_dim, generator=generator).to(target.device, target.dtype)
    slots = torch.arange(_BLOCK_SIZE, _BLOCK_SIZE + context, device=target.device)
    cache = torch.zeros(
        2, kv_heads, blocks + 1, kernel.block_bytes(_BLOCK_SIZE, head_dim), dtype=torch.uint8, device=target.device
    )
    kernel.write(cache, k_tgd, v_tgd, slots)
    table = torch.arange(1, blocks + 1, device=target.device)[None]
    found = [
        kernel(
            q_thd[2 - rows :],
            cache,
            kernel.plan(
                shape,
                PagedRequests(
                    query_start=(0, rows), context_lens=(context,), block_table_rb=table, block_size=_BLOCK_SIZE
                ),
            ),
        )[-1]
        for rows in (1, 2)
    ]
    return torch.equal(*found)
