"""Attention's own properties: a token's bits do not depend on chunks, neighbours or blocks; nothing stale leaks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.kernels import select
from quire.ops.target import Target

KERNELS = {dtype: select(Target("cpu", dtype, isa="reference")) for dtype in (torch.float32, torch.bfloat16)}
HEADS = [(4, 2, 20), (8, 1, 80), (3, 3, 16), (16, 8, 128), (14, 2, 64), (12, 1, 256)]


@dataclass
class Sequence:
    """All queries, keys and values of one sequence, so that any part of it can be run again."""

    q_thd: Tensor
    k_tgd: Tensor
    v_tgd: Tensor

    @staticmethod
    def random(length: int, shape: AttentionShape, dtype: torch.dtype, seed: int) -> Sequence:
        generator = torch.Generator().manual_seed(seed)
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        return Sequence(*(torch.randn(length, count, shape.head_dim, generator=generator).to(dtype) for count in heads))


def run(
    parts: list[tuple[Sequence, int, int]], shape: AttentionShape, block_size: int, stale: float, seed: int
) -> list[Tensor]:
    """One step over `(sequence, start, stop)` parts, in randomly placed blocks; one result per part.

    Whatever no sequence has written holds `stale`.
    """
    contexts = [stop for _, _, stop in parts]
    counts = [-(-context // block_size) for context in contexts]
    order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    table = torch.zeros(len(parts), max(counts), dtype=torch.int64)
    dtype = parts[0][0].q_thd.dtype
    kv = torch.full((2, shape.num_kv_heads, sum(counts) + 1, block_size, shape.head_dim), stale, dtype=dtype)
    kernels = KERNELS[dtype]
    for request, (sequence, _, stop) in enumerate(parts):
        blocks = torch.tensor([order.pop() for _ in range(counts[request])])
        table[request, : len(blocks)] = blocks
        positions = torch.arange(stop)
        slots = blocks[positions // block_size] * block_size + positions % block_size
        kernels.kv_write(kv, sequence.k_tgd[:stop], sequence.v_tgd[:stop], slots)
    starts = [0]
    for _, start, stop in parts:
        starts.append(starts[-1] + stop - start)
    requests = PagedRequests(
        query_start=tuple(starts), context_lens=tuple(contexts), block_table_rb=table, block_size=block_size
    )
    q_thd = torch.cat([sequence.q_thd[start:stop] for sequence, start, stop in parts])
    out = kernels.attention(q_thd, kv, kernels.attention.plan(shape, requests))
    return [out[start:stop] for start, stop in itertools.pairwise(starts)]


def shape_of(heads: int, kv_heads: int, head_dim: int) -> AttentionShape:
    return AttentionShape(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_chunks_neighbours_and_blocks_leave_no_trace(
    heads: tuple[int, int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    shape = shape_of(*heads)
    length = data.draw(st.integers(1, 600), label="length")
    seed = data.draw(st.integers(0, 2**32), label="seed")
    sequence = Sequence.random(length, shape, dtype, seed)
    (whole,) = run([(sequence, 0, length)], shape, 16, 0.0, seed)
    start = 0
    for _ in range(6):
        if start == length:
            break
        chunk = data.draw(st.sampled_from([1, 2, 16, 17, 64, 130, 300]), label="chunk")
        stop = min(length, start + chunk)
        others = [
            (Sequence.random(end, shape, dtype, seed + end), data.draw(st.integers(0, end - 1)), end)
            for end in data.draw(st.lists(st.integers(1, 600), max_size=2), label="neighbours")
        ]
        place = data.draw(st.integers(0, len(others)), label="place")
        parts = [*others[:place], (sequence, start, stop), *others[place:]]
        block_size = data.draw(st.sampled_from([8, 16, 64, 256]), label="block_size")
        if block_size <= 128:  # 256 has other key tiles; it is the same for all of an engine's life
            assert torch.equal(run(parts, shape, block_size, 7.0, seed)[place], whole[start:stop])
        start = stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_a_decode_has_the_bits_of_a_prefill(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Every position from the ends of tiles and blocks, at a context that passes through all tile widths."""
    shape = shape_of(*heads)
    sequence = Sequence.random(2200, shape, dtype, 1)
    (tail,) = run([(sequence, 1900, 2200)], shape, 256, 0.0, 1)
    (whole,) = run([(sequence, 0, 2200)], shape, 256, 0.0, 2)
    assert torch.equal(whole[1900:], tail)
    decodes = [(sequence, stop - 1, stop) for stop in (1, 127, 128, 129, 512, 513, 768, 769, 2048, 2049)]
    for (_, start, stop), result in zip(decodes, run(decodes, shape, 256, 0.0, 3), strict=True):
        assert torch.equal(result, whole[start:stop])


def test_what_an_earlier_owner_left_in_a_block_is_not_felt() -> None:
    """Even NaN: `kv_write` keeps values finite, and scores of hidden keys are masked whatever they are."""
    shape = shape_of(4, 2, 20)
    spoiled, sequence = (Sequence.random(40, shape, torch.float32, seed) for seed in (1, 2))
    for tensor in (spoiled.k_tgd, spoiled.v_tgd):
        tensor[3:30] = float("nan")
        tensor[30:] = float("inf")
    kernels = KERNELS[torch.float32]
    kv = torch.zeros(2, 2, 4, 16, 20)
    requests = PagedRequests(
        query_start=(0, 21), context_lens=(21,), block_table_rb=torch.tensor([[1, 2]]), block_size=16
    )
    plan = kernels.attention.plan(shape, requests)
    results = []
    for earlier in (None, spoiled):
        if earlier is not None:
            kernels.kv_write(kv, earlier.k_tgd[:32], earlier.v_tgd[:32], torch.arange(16, 48))
        kernels.kv_write(kv, sequence.k_tgd[:21], sequence.v_tgd[:21], torch.arange(16, 37))
        results.append(kernels.attention(sequence.q_thd[:21], kv, plan))
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)
