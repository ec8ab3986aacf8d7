"""From what the scheduler chose to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from quire.cache.pool import NULL_BLOCK
from quire.nn.batch import ForwardBatch, GroupTable
from quire.ops.moving import to_device
from quire.sched.state import ScheduledChunk

Ids = NDArray[np.int64]


class BatchBuilder:
    """Makes each step's `ForwardBatch`. A batch is good until the next one is made: the block tables stay in place."""

    def __init__(self, block_size: int, device: torch.device, num_groups: int = 1) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = [BlockTables() for _ in range(num_groups)]
        self._later_groups = range(1, num_groups)

    def build(self, chunks: Sequence[ScheduledChunk]) -> ForwardBatch:
        """Lay the chunks' tokens end to end. Hidden states are asked for of `wanted_rows`. A last token that is not
        known yet is 0, see `pending_rows`."""
        block_size = self._block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        context_lens: list[int] = []
        logits_rows: list[int] = []
        told = any(chunk.state.request.token_type_ids is not None for chunk in chunks)
        token_types: list[int] = []
        for chunk in chunks:
            state, start, first = chunk.state, chunk.start, query_start[-1]
            end = chunk.start + chunk.num_tokens
            known = state.token_ids[start:end]
            token_ids += known if len(known) == chunk.num_tokens else [*known, 0]
            positions += range(start, end)
            if told:
                token_types += _token_types(chunk)
            slots += _slots(chunk, state.block_tables[0], block_size)
            logits_rows += [first + row for row in wanted_rows(chunk)]
            query_start.append(first + chunk.num_tokens)
            context_lens.append(end)
        return ForwardBatch(
            token_ids_t=self._tensor(token_ids),
            positions_t=self._tensor(positions),
            slots_t=self._tensor(slots),
            query_start=query_start,
            context_lens=context_lens,
            block_table_rb=self._table(chunks, 0),
            logits_rows_s=self._tensor(logits_rows),
            token_types_t=self._tensor(token_types) if told else None,
            later_groups=[self._group(chunks, group) for group in self._later_groups] if self._later_groups else (),
        )

    def _group(self, chunks: Sequence[ScheduledChunk], group: int) -> GroupTable:
        slots = chain.from_iterable(
            _slots(chunk, chunk.state.block_tables[group], self._block_size) for chunk in chunks
        )
        return GroupTable(slots_t=self._tensor(list(slots)), block_table_rb=self._table(chunks, group))

    def _table(self, chunks: Sequence[ScheduledChunk], group: int) -> torch.Tensor:
        return self._tensor(self._tables[group].of([chunk.state.block_tables[group] for chunk in chunks]))

    def _tensor(self, values: list[int] | Ids) -> torch.Tensor:
        # On a CPU a view of the block tables, on a GPU a copy.
        return to_device(torch.from_numpy(np.asarray(values, np.int64)), self._device)


def _token_types(chunk: ScheduledChunk) -> list[int]:
    """0 where nothing is said, as of generated tokens."""
    types = chunk.state.request.token_type_ids or ()
    known = list(types[chunk.start : chunk.start + chunk.num_tokens])
    return known + [0] * (chunk.num_tokens - len(known))


def _slots(chunk: ScheduledChunk, blocks: list[int], block_size: int) -> list[int]:
    start = chunk.start
    if chunk.num_tokens == 1:
        return [0 if chunk.first_slot_cached else blocks[start // block_size] * block_size + start % block_size]
    return [blocks[i // block_size] * block_size + i % block_size for i in range(start, start + chunk.num_tokens)]


class BlockTables:
    """The block tables of a step side by side, padded with 0.

    From step to step most requests keep their row and few get a new block, so only that is written. A request's list
    of blocks grows in place, and more and more of its front is hidden; or it is replaced by another list. It is known
    again by being the same object.
    """

    def __init__(self) -> None:
        self._padded: Ids = np.zeros((1, 1), np.int64)
        self._lists: list[list[int]] = []
        """Whose row is whose."""
        self._lengths: list[int] = []
        """How much of each row is not padding, rows that no request has now included."""
        self._hidden: list[int] = []
        """How many blocks at the front of each row are null."""

    def of(self, lists: list[list[int]]) -> Ids:
        """`[requests, blocks of the longest]`; a view of what the next call changes. None of the lists is empty, or
        has null blocks alone."""
        longest = max(map(len, lists))
        self._make_room(len(lists), longest)
        before = self._lists
        for row, blocks in enumerate(lists):
            length = self._lengths[row]
            kept = length if row < len(before) and before[row] is blocks else 0
            if kept != len(blocks):
                self._padded[row, len(blocks) : length] = 0
                self._padded[row, kept : len(blocks)] = blocks[kept:]
                self._lengths[row] = len(blocks)
                if not kept:
                    self._hidden[row] = 0
            if blocks[self._hidden[row]] == NULL_BLOCK:
                self._hide(row, blocks)
        self._lists = lists
        return self._padded[: len(lists), :longest]

    def _hide(self, row: int, blocks: list[int]) -> None:
        hidden = self._hidden[row]
        first = next(index for index in range(hidden, len(blocks)) if blocks[index] != NULL_BLOCK)
        self._padded[row, hidden:first] = NULL_BLOCK
        self._hidden[row] = first

    def _make_room(self, num_rows: int, longest: int) -> None:
        rows, columns = self._padded.shape
        if num_rows > rows or longest > columns:
            grown = np.zeros((max(rows, 2 * num_rows), max(columns, 2 * longest)), np.int64)
            grown[:rows, :columns] = self._padded
            self._padded = grown
        self._lengths += [0] * (num_rows - len(self._lengths))
        self._hidden += [0] * (num_rows - len(self._hidden))


def wanted_rows(chunk: ScheduledChunk) -> range:
    """Which of a chunk's rows the runner needs hidden states of: the last one where it samples, every one for prompt
    log-probabilities, and those that a pooling request's task needs."""
    last = range(chunk.num_tokens - chunk.samples, chunk.num_tokens)
    match chunk.state.pooled_rows:
        case None:
            return range(chunk.num_tokens) if needs_prompt_logprobs(chunk) else last
        case "first":
            return range(1 if chunk.start == 0 else 0)
        case "last":
            return last
        case "all":
            return range(chunk.num_tokens)


def pending_rows(chunks: Sequence[ScheduledChunk]) -> list[tuple[int, ScheduledChunk]]:
    """(row of the batch, chunk) of those whose last token an earlier step, which is not settled yet, has drawn."""
    found, row = [], -1
    for chunk in chunks:
        row += chunk.num_tokens
        if chunk.start + chunk.num_tokens > len(chunk.state.token_ids):
            found.append((row, chunk))
    return found


def needs_prompt_logprobs(chunk: ScheduledChunk) -> bool:
    """Whether this chunk computes prompt rows whose log-probabilities were asked for and have not been told yet."""
    state = chunk.state
    return state.request.sampling.prompt_logprobs is not None and not state.prompt_logprobs_told
