"""From what the scheduler chose to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from quire.nn.batch import ForwardBatch
from quire.sched.state import ScheduledChunk


def build_batch(chunks: Sequence[ScheduledChunk], block_size: int, device: torch.device) -> ForwardBatch:
    """Lay the chunks' tokens end to end. Logits are asked for where a chunk samples, and for every row of a chunk that
    needs prompt log-probabilities (`needs_prompt_logprobs`)."""
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    token_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slots = np.empty(num_tokens, np.int64)
    tables = np.zeros((len(chunks), max(len(chunk.state.block_ids) for chunk in chunks)), np.int64)
    query_start = [0]
    context_lens = []
    logits_rows: list[int] = []
    for index, chunk in enumerate(chunks):
        state, first = chunk.state, query_start[-1]
        end, last = chunk.start + chunk.num_tokens, first + chunk.num_tokens
        blocks = state.block_ids
        tables[index, : len(blocks)] = blocks
        token_ids[first:last] = state.token_ids[chunk.start : end]
        position = np.arange(chunk.start, end)
        positions[first:last] = position
        slots[first:last] = tables[index, position // block_size] * block_size + position % block_size
        if chunk.first_slot_cached:
            slots[first] = 0
        if needs_prompt_logprobs(chunk):
            logits_rows.extend(range(first, last))
        elif chunk.samples:
            logits_rows.append(last - 1)
        query_start.append(last)
        context_lens.append(end)

    def to_device(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return ForwardBatch(
        token_ids_t=to_device(token_ids),
        positions_t=to_device(positions),
        slots_t=to_device(slots),
        query_start=tuple(query_start),
        context_lens=tuple(context_lens),
        block_table_rb=to_device(tables),
        logits_rows_s=to_device(np.array(logits_rows, np.int64)),
    )


def needs_prompt_logprobs(chunk: ScheduledChunk) -> bool:
    """Whether this chunk computes prompt rows whose log-probabilities were asked for and have not been told yet."""
    state = chunk.state
    return state.request.sampling.prompt_logprobs is not None and not state.prompt_logprobs_told
