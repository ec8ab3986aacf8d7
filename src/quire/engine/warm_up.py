"""What a GPU is made to do before the engine says that it is ready: captures, then steps up to the largest.

They have kernels compiled, and show whether the largest step fits beside the KV cache and what was captured: better now
than in the middle of somebody's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from quire.cache.ledger import HEAD_ROWS
from quire.core.errors import NotEnoughMemory
from quire.models.model import Model
from quire.nn.batch import ForwardBatch, GroupTable
from quire.nn.kv import KVCache
from quire.ops.draw import DrawTable

CAPTURE_SECONDS = 5.0
"""What is not captured by then is when it is first needed."""
_SIZES = (16, 32, 64, 128, 129, 512, 2048)
"""Tokens of steps for which kernels take different tiles, and are compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestStep:
    """`tokens` of prompts, of `longest` tokens each at most; `rows` of them go to the head."""

    tokens: int
    longest: int
    rows: int


def warm_up(
    model: Model,
    kv: KVCache,
    step: LargestStep,
    captures: Iterable[Callable[[], None]],
    clock: Callable[[], float],
) -> None:
    """Nothing that anybody reads is written. Raises NotEnoughMemory."""
    try:
        deadline = clock() + CAPTURE_SECONDS
        for capture in captures:
            if clock() >= deadline:
                break
            capture()
        is_cuda = kv.data.device.type == "cuda"
        if is_cuda:
            torch.cuda.empty_cache()  # what trying captures out has left to their stream
        for tokens in (*(size for size in _SIZES if size < step.tokens), step.tokens):
            _try_out(model, kv, replace(step, tokens=tokens))
        if is_cuda:
            torch.cuda.synchronize(kv.data.device)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(
            f"A step of {step.tokens} tokens does not fit beside the weights and a KV cache of "
            f"{kv.data.nbytes / 2**30:.2f} GiB: {' '.join(str(error).split())[:300]}",
            param="memory_utilization",
            remedy="Lower --memory-utilization or --max-num-batched-tokens, or end what else runs on this GPU.",
        ) from error


@torch.inference_mode()
def _try_out(model: Model, kv: KVCache, step: LargestStep) -> None:
    device = kv.data.device
    starts = [*range(0, step.tokens, step.longest), step.tokens]
    lengths = [stop - start for start, stop in pairwise(starts)]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device=device)

    table = GroupTable(
        slots_t=zeros(step.tokens), block_table_rb=zeros(len(lengths), -(-max(lengths) // kv.block_size))
    )
    batch = ForwardBatch(
        token_ids_t=zeros(step.tokens),
        positions_t=torch.cat([torch.arange(length) for length in lengths]).to(device),
        slots_t=table.slots_t,
        query_start=starts,
        context_lens=lengths,
        block_table_rb=table.block_table_rb,
        logits_rows_s=torch.arange(min(step.rows, step.tokens), device=device),
        later_groups=[table] * (kv.num_groups - 1),
    )
    hidden_sh = model.forward(batch, kv)
    if model.pooling is None:
        for first in range(0, len(hidden_sh), HEAD_ROWS):
            logits_sv = model.logits(hidden_sh[first : first + HEAD_ROWS])
            model.kernels.draw(logits_sv, DrawTable.greedy(len(logits_sv), device), zeros(len(logits_sv)))
