"""A step's tensors, against what they mean written out token by token, over steps whose requests come, grow and go."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.core.request import EngineRequest
from quire.core.sampling import SamplingParams
from quire.engine.inputs import BatchBuilder
from quire.sched.state import RequestState, ScheduledChunk

BLOCK = 4


def state(number: int, num_tokens: int, prompt_logprobs: int | None = None) -> RequestState:
    tokens = [100 * number + position for position in range(num_tokens)]
    sampling = SamplingParams(prompt_logprobs=prompt_logprobs)
    request = EngineRequest(request_id=str(number), prompt_token_ids=tokens, sampling=sampling, arrival_time=0.0)
    return RequestState(
        request=request, number=number, token_ids=list(tokens), num_prompt_tokens=num_tokens, longest=99
    )


def chunk_of(item: RequestState, start: int, num_tokens: int, *, cached: bool = False) -> ScheduledChunk:
    samples = start + num_tokens == len(item.token_ids)
    return ScheduledChunk(item, start, num_tokens, samples, cached)


def check(builder: BatchBuilder, chunks: list[ScheduledChunk]) -> None:
    batch = builder.build(chunks)
    ids, positions, rows, starts = [], [], [], [0]
    for chunk in chunks:
        item, end = chunk.state, chunk.start + chunk.num_tokens
        for position in range(chunk.start, end):
            told = item.request.sampling.prompt_logprobs is not None
            if told or (chunk.samples and position == end - 1):
                rows.append(len(ids))
            ids.append(item.token_ids[position])
            positions.append(position)
        starts.append(len(ids))
    for group, found in enumerate([batch, *batch.later_groups]):
        check_group(found, chunks, group)
    assert len(batch.later_groups) == len(chunks[0].state.block_tables) - 1
    for found, expected in ((batch.token_ids_t, ids), (batch.positions_t, positions), (batch.logits_rows_s, rows)):
        assert found.dtype == torch.int64
        assert found.tolist() == expected
    assert list(batch.query_start) == starts
    assert list(batch.context_lens) == [chunk.start + chunk.num_tokens for chunk in chunks]


def check_group(found, chunks: list[ScheduledChunk], group: int) -> None:
    tables = [chunk.state.block_tables[group] for chunk in chunks]
    longest = max(map(len, tables))
    slots = [
        0 if chunk.first_slot_cached else table[position // BLOCK] * BLOCK + position % BLOCK
        for chunk, table in zip(chunks, tables)
        for position in range(chunk.start, chunk.start + chunk.num_tokens)
    ]
    assert found.slots_t.tolist() == slots
    assert found.block_table_rb.tolist() == [table + [0] * (longest - len(table)) for table in tables]
    assert found.slots_t.dtype == found.block_table_rb.dtype == torch.int64


def test_token_types_where_a_request_tells_them_and_0_elsewhere():
    builder = BatchBuilder(BLOCK, torch.device("cpu"))
    silent, told = state(1, 3), state(2, 5)
    told.request = replace(told.request, token_type_ids=[0, 1, 1])
    silent.block_tables, told.block_tables = [[7]], [[5, 9]]
    chunks = [chunk_of(silent, 0, 3), chunk_of(told, 1, 4)]
    types = builder.build(chunks).token_types_t
    assert types is not None
    assert types.dtype == torch.int64
    assert types.tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert builder.build(chunks[:1]).token_types_t is None


def test_chunks_of_a_prompt_a_cached_prompt_and_one_with_logprobs():
    builder = BatchBuilder(BLOCK, torch.device("cpu"))
    long, hit, told = state(1, 11), state(2, 8), state(3, 6, prompt_logprobs=0)
    long.block_tables, hit.block_tables, told.block_tables = [[7, 3]], [[5, 9]], [[2, 4]]
    long.num_hidden = hit.num_hidden = told.num_hidden = [0]
    check(builder, [chunk_of(long, 2, 5), chunk_of(hit, 7, 1, cached=True), chunk_of(told, 0, 4)])


@given(st.data())
def test_steps_of_requests_that_come_grow_and_go(data):
    num_groups = data.draw(st.sampled_from([1, 1, 3]), label="groups")
    builder = BatchBuilder(BLOCK, torch.device("cpu"), num_groups)
    running: list[RequestState] = []
    fresh = itertools.count(1)
    for number in range(1, data.draw(st.integers(1, 12), label="steps") + 1):
        for _ in range(data.draw(st.integers(0 if running else 1, 3), label="newcomers")):
            item = state(number, data.draw(st.integers(1, 30), label="tokens"))
            num_blocks = -(-len(item.token_ids) // BLOCK)
            item.block_tables = [[next(fresh) for _ in range(num_blocks)] for _ in range(num_groups)]
            item.num_hidden = [0] * num_groups
            running.append(item)
        order = data.draw(st.permutations(running), label="order")
        running = order[: data.draw(st.integers(1, len(order)), label="still there")]
        for item in running:
            match data.draw(st.sampled_from(["grows", "comes back", "sees less", "stays"])):
                case "grows":
                    item.token_ids += range(BLOCK)
                    for table in item.block_tables:
                        table.append(next(fresh))
                case "comes back":
                    item.block_tables = [[next(fresh) for _ in table] for table in item.block_tables]
                    item.num_hidden = [0] * num_groups
                case "sees less":
                    hide(item, data.draw(st.integers(0, num_groups - 1)), data.draw(st.integers(0, 9)))
        check(builder, [chunk_of(item, len(item.token_ids) - 1, 1) for item in running])


def hide(item: RequestState, group: int, count: int) -> None:
    """As `sched.settle` does; the last block is never hidden from the token that is written to it."""
    table = item.block_tables[group]
    hidden = max(item.num_hidden[group], min(count, len(table) - 1))
    table[:hidden] = [0] * hidden
    item.num_hidden[group] = hidden
