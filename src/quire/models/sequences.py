"""Whole sequences as one batch, each computed from its beginning: for measuring and calibrating a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from quire.nn.batch import ForwardBatch

BLOCK_SIZE = 16


def num_blocks(sequences: Sequence[Sequence[int]]) -> int:
    """Blocks of `BLOCK_SIZE` that a KV cache needs for `lay_out`; block 0 is nobody's."""
    return 1 + sum(-(-len(sequence) // BLOCK_SIZE) for sequence in sequences)


def in_batches(sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[Sequence[int]]]:
    """In order, as many at a time as have at most `max_tokens` together (or one, if it alone has more)."""
    batch: list[Sequence[int]] = []
    for sequence in sequences:
        if batch and sum(map(len, batch)) + len(sequence) > max_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def lay_out(sequences: Sequence[Sequence[int]]) -> ForwardBatch:
    """Token after token, sequence after sequence, each in blocks of its own. Logits are wanted of every row."""
    ids: list[int] = []
    positions, slots, query_start, tables = [], [], [0], []
    next_block = 1
    for sequence in sequences:
        count = -(-len(sequence) // BLOCK_SIZE)
        position = torch.arange(len(sequence))
        positions.append(position)
        slots.append(position + next_block * BLOCK_SIZE)
        tables.append(torch.arange(next_block, next_block + count))
        next_block += count
        ids += sequence
        query_start.append(len(ids))
    return ForwardBatch(
        token_ids_t=torch.tensor(ids),
        positions_t=torch.cat(positions),
        slots_t=torch.cat(slots),
        query_start=tuple(query_start),
        context_lens=tuple(len(sequence) for sequence in sequences),
        block_table_rb=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
        logits_rows_s=torch.arange(len(ids)),
    )
