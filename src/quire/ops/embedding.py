"""`embedding`: rows of a table."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, random_int, random_tensor


def embedding(ids_t: Tensor, table_vd: Tensor) -> Tensor:
    """`[t, d]`; `ids_t` int64, each below v."""
    return table_vd.index_select(0, ids_t)


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    vocab = random_int(1, 500, generator)
    return {
        "ids_t": torch.randint(0, vocab, (rows,), generator=generator),
        "table_vd": random_tensor(vocab, random_int(1, 200, generator), dtype=dtype, generator=generator),
    }


EMBEDDING = Op(name="embedding", definition=embedding, inputs=_inputs, row_arguments=("ids_t",))
