"""Triton's attention: bits that depend on a row's position alone, lengths on the device, caches in 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.ops.attention import AttentionShape, DeviceLengths, PagedRequests
from quire.ops.reference.attention import ReferenceAttention
from quire.ops.reference.kv_layout import KVLayout
from quire.ops.target import Target
from quire.ops.triton import attention_plan
from quire.ops.triton.attention import TritonAttention
from quire.ops.triton.attention_plan import Tiling
from quire.ops.triton.row_tile import choose_decode_rows

BLOCK_SIZE = 16
SHAPE = AttentionShape(num_heads=6, num_kv_heads=2, head_dim=11, scale=0.3)


def kernel(kv_cache_dtype: str = "auto") -> TritonAttention:
    return TritonAttention(Target("cpu", torch.bfloat16, isa="triton", kv_cache_dtype=kv_cache_dtype))


def numbers(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def cache_of(attention: TritonAttention, blocks: int) -> Tensor:
    """A cache whose blocks, but the null block, are full of random numbers."""
    cache = torch.zeros(2, 2, blocks, attention.block_bytes(BLOCK_SIZE, 11), dtype=torch.uint8)
    k_tgd, v_tgd = numbers(2, (blocks - 1) * BLOCK_SIZE, 2, 11)
    attention.write(cache, k_tgd, v_tgd, torch.arange(BLOCK_SIZE, blocks * BLOCK_SIZE))
    return cache


def requests(query_lens: list[int], contexts: list[int], table: Tensor) -> PagedRequests:
    starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
    return PagedRequests(query_start=starts, context_lens=contexts, block_table_rb=table, block_size=BLOCK_SIZE)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        AttentionShape(num_heads=6, num_kv_heads=2, head_dim=11, scale=0.3, window=150, sinks=(0.5,) * 6, softcap=2.0),
    ],
)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_any_chunk(shape: AttentionShape) -> None:
    attention = kernel()
    cache = cache_of(attention, 23)
    table = torch.arange(1, 23, dtype=torch.int32)[None]
    end, rows = 340, 90
    q_thd = numbers(rows, 6, 11, seed=1)
    whole = attention(q_thd, cache, attention.plan(shape, requests([rows], [end], table)))
    for first, last in ((0, 7), (30, 89), (5, 6), (89, 90)):
        contexts = [end - rows + last]
        part = attention(q_thd[first:last], cache, attention.plan(shape, requests([last - first], contexts, table)))
        assert torch.equal(part, whole[first:last])
    # Each a request of its own, at contexts on both sides of a split's end, beside a chunk.
    chosen = [3, 5, 6, 40, 89]
    together = attention(
        torch.cat([q_thd[chosen], q_thd[10:14]]),
        cache,
        attention.plan(
            shape,
            requests([1] * 5 + [4], [end - rows + i + 1 for i in chosen] + [end - rows + 14], table.expand(6, -1)),
        ),
    )
    assert torch.equal(together, whole[[*chosen, 10, 11, 12, 13]])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("advances", [True, False], ids=["rows of empty requests", "no rows of empty requests"])
@pytest.mark.parametrize("most_items", [attention_plan.MOST_ITEMS, 0])
def test_lengths_on_the_device_do_what_lengths_on_the_host_do(
    window: int | None, advances: bool, most_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one split of a request, programs walk through whole contexts; to the same bits."""
    attention = kernel()
    cache = cache_of(attention, 23)
    shape = AttentionShape(num_heads=6, num_kv_heads=2, head_dim=11, scale=0.3, window=window)
    contexts, bounds = [300, 1, 0, 257, 300], [352, 16, 352, 352, 352]
    rows_of = [1 if advances or context else 0 for context in contexts]
    starts = [sum(rows_of[:i]) for i in range(6)]
    table = torch.arange(1, 23)[torch.arange(22).expand(5, -1).roll(3, 0)]
    q_thd = numbers(5, 6, 11, seed=1)
    lengths = DeviceLengths(
        query_start=torch.tensor(starts, dtype=torch.int32), context_lens=torch.tensor(contexts, dtype=torch.int32)
    )
    captured = PagedRequests(
        query_start=range(6), context_lens=bounds, block_table_rb=table, block_size=BLOCK_SIZE, lengths=lengths
    )
    served = [i for i, context in enumerate(contexts) if context]
    rows = [starts[i] for i in served]
    plain = requests([1] * len(served), [contexts[i] for i in served], table[served])
    expected = attention(q_thd[rows], cache, attention.plan(shape, plain))
    monkeypatch.setattr(attention_plan, "MOST_ITEMS", most_items)
    found = attention(q_thd, cache, attention.plan(shape, captured))
    assert torch.equal(found[rows], expected)
    assert torch.equal(attention(q_thd[rows], cache, attention.plan(shape, plain)), expected)
    empty = [row for row in range(5) if row not in rows]
    assert not found[empty].any()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "float16", "float32"])
def test_a_cache_in_another_dtype_is_the_references(kv_dtype: str) -> None:
    attention = kernel(kv_dtype)
    target = Target("cpu", torch.bfloat16, isa="reference", kv_cache_dtype=kv_dtype)
    k_tgd, v_tgd = numbers(2, 5 * BLOCK_SIZE, 2, 11)
    k_tgd[7, 1, 3], v_tgd[8, 0, 2], v_tgd[9, 1, 0], k_tgd[11] = float("nan"), float("nan"), float("inf"), 0
    slots = torch.randperm(5 * BLOCK_SIZE, generator=torch.Generator().manual_seed(0)) + BLOCK_SIZE
    found, expected = torch.zeros(2, 2, 2, 6, attention.block_bytes(BLOCK_SIZE, 11), dtype=torch.uint8)
    attention.write(found, k_tgd, v_tgd, slots)
    layout = KVLayout(target.kv_dtype, target.dtype)
    layout.write(expected, k_tgd, v_tgd, slots)
    # The interpreter rounds some numbers in 8-bit floats to their other neighbour.
    rtol = 0.14 if kv_dtype == "fp8" else 0.0
    for one, other in zip(found, expected, strict=True):
        read, wanted = (layout.read(each, torch.arange(6), BLOCK_SIZE, 11) for each in (one, other))
        torch.testing.assert_close(read, wanted, rtol=rtol, atol=rtol / 20, equal_nan=True)
    cache = cache_of(attention, 6)
    reference = ReferenceAttention(target)
    table = torch.arange(1, 6)[None].expand(2, -1)
    q_thd, step = numbers(5, 6, 11, seed=1), requests([1, 4], [77, 66], table)
    torch.testing.assert_close(
        attention(q_thd, cache, attention.plan(SHAPE, step)),
        reference(q_thd, cache, reference.plan(SHAPE, step)),
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_what_lies_in_unused_slots_reaches_nobody(kv_dtype: str) -> None:
    attention = kernel(kv_dtype)
    cache = cache_of(attention, 6)
    step = requests([1, 4], [35, 35], torch.tensor([[1, 2, 3], [1, 2, 3]]))
    q_thd = numbers(5, 6, 11, seed=1)
    clean = attention(q_thd, cache, attention.plan(SHAPE, step))
    spoilt = torch.full((13, 2, 11), float("nan")).to(torch.bfloat16)
    attention.write(cache, spoilt, spoilt, torch.arange(3 * BLOCK_SIZE + 3, 4 * BLOCK_SIZE))
    cache[:, :, 4:] = 0xFF
    assert torch.equal(attention(q_thd, cache, attention.plan(SHAPE, step)), clean)
    seen = requests([1], [36], torch.tensor([[1, 2, 3]]))
    assert attention(q_thd[:1], cache, attention.plan(SHAPE, seen)).isnan().all()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("most_items", [attention_plan.MOST_ITEMS, 0])
@pytest.mark.parametrize("back_end", ["triton", "reference"])
def test_lengths_of_chunks_on_the_device_do_what_those_on_the_host_do(
    window: int | None, most_items: int, back_end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and decodes in one step; places that nobody takes, and rows that are nobody's behind all others."""
    attention = kernel() if back_end == "triton" else ReferenceAttention(kernel().target)
    cache = cache_of(attention, 23)
    shape = AttentionShape(num_heads=6, num_kv_heads=2, head_dim=11, scale=0.3, window=window)
    query_lens, contexts = [1, 70, 1, 2, 0, 0, 9], [300, 90, 257, 2, 0, 0, 0]
    starts = [sum(query_lens[:i]) for i in range(8)]
    table = torch.arange(1, 23)[torch.arange(22).expand(7, -1).roll(3, 0)]
    q_thd = numbers(starts[-1], 6, 11, seed=1)
    captured = PagedRequests(
        query_start=[0] * 7 + [starts[-1]],
        context_lens=[352] * 7,
        block_table_rb=table,
        block_size=BLOCK_SIZE,
        lengths=DeviceLengths(
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            chunks=3,
        ),
    )
    plain = requests(query_lens[:4], contexts[:4], table[:4])
    expected = attention(q_thd[:74], cache, attention.plan(shape, plain))
    monkeypatch.setattr(attention_plan, "MOST_ITEMS", most_items)
    found = attention(q_thd, cache, attention.plan(shape, captured))
    assert torch.equal(found[:74], expected)
    assert found[74:].isfinite().all()


class Unlike(TritonAttention):
    """As on a device that rounds another way in decodes of fewer rows than `alike`."""

    def __init__(self, target: Target, rows: int, alike: int) -> None:
        super().__init__(target, row_tile=rows)
        self._adds = float(rows < alike)

    def __call__(self, q_thd, kv_layer, plan):
        return super().__call__(q_thd, kv_layer, plan) + self._adds * (plan.decodes == 1)


@pytest.mark.parametrize(("alike", "chosen"), [(16, 16), (64, 64), (65, 128)])
def test_a_decode_has_as_few_rows_as_round_like_a_prefill(
    alike: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.ops.triton.row_tile._CONTEXTS", (3, 20))
    tiling = Tiling.of(2, 16, torch.bfloat16)
    target = Target("cpu", torch.bfloat16, isa="triton")
    found = choose_decode_rows(lambda rows: Unlike(target, rows, alike), tiling, 2)
    assert (tiling.decode_rows, tiling.prefill_rows, found.decode_rows) == (16, 128, chosen)
