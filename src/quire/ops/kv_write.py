"""`kv_write`: stores keys and values of new tokens in a layer's paged cache.

Legend: t tokens, h KV heads, d head dim, n blocks, s tokens per block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, random_int, random_tensor


def kv_write(kv_2hnsd: Tensor, k_thd: Tensor, v_thd: Tensor, slots_t: Tensor) -> None:
    """In place: slot `block * s + offset` of each token. Slots of block 0 may repeat; nobody reads them.

    A value that is not finite is stored as zero. Attention multiplies what lies in a block's unused slots by a weight
    of zero, and zero times NaN is NaN: a request whose values overflowed would reach the block's next owner.
    """
    _, h, n, s, d = kv_2hnsd.shape
    slots_2htd = kv_2hnsd.view(2, h, n * s, d)
    slots_2htd[0].index_copy_(1, slots_t, k_thd.transpose(0, 1))
    slots_2htd[1].index_copy_(1, slots_t, v_thd.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).transpose(0, 1))


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    heads, head_dim = random_int(1, 5, generator), random_int(1, 100, generator)
    block_size = 1 << random_int(3, 6, generator)
    num_blocks = rows // block_size + random_int(2, 5, generator)
    return {
        "kv_2hnsd": torch.zeros(2, heads, num_blocks, block_size, head_dim, dtype=dtype),
        "k_thd": random_tensor(rows, heads, head_dim, dtype=dtype, generator=generator),
        "v_thd": random_tensor(rows, heads, head_dim, dtype=dtype, generator=generator),
        "slots_t": torch.randperm((num_blocks - 1) * block_size, generator=generator)[:rows] + block_size,
    }


KV_WRITE = Op(name="kv_write", definition=kv_write, inputs=_inputs)
