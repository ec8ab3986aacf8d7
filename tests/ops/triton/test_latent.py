"""Triton's attention over latents: bits that depend on a row's position alone, lengths on the device, 8-bit caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.ops.attention import DeviceLengths, PagedRequests
from quire.ops.latent_attention import LatentShape
from quire.ops.reference.latent_attention import ReferenceLatentAttention
from quire.ops.target import Target
from quire.ops.triton import attention_plan
from quire.ops.triton.latent import TritonLatentAttention
from quire.ops.triton.library import TRITON, interprets

pytestmark = pytest.mark.skipif(not interprets(), reason="needs Triton's interpreter")
BLOCK_SIZE = 16
BLOCKS = 21
FEW = LatentShape(num_heads=3, latent_dim=28, rope_dim=8, scale=0.3)
MANY = LatentShape(num_heads=34, latent_dim=300, rope_dim=8, scale=0.1)
"""Heads of several tiles, and a latent of two parts."""


def target(kv_cache_dtype: str = "auto") -> Target:
    return Target("cpu", torch.bfloat16, isa=TRITON, kv_cache_dtype=kv_cache_dtype)


def numbers(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def cache_of(kernel: TritonLatentAttention | ReferenceLatentAttention, shape: LatentShape) -> Tensor:
    cache = torch.zeros(BLOCKS, kernel.block_bytes(BLOCK_SIZE, shape), dtype=torch.uint8)
    count = (BLOCKS - 1) * BLOCK_SIZE
    latents, keys = numbers(count, shape.latent_dim), numbers(count, shape.rope_dim, seed=1)
    latents[7, 3], latents[8, 0], keys[11, 2], latents[12] = float("nan"), float("inf"), float("inf"), 0
    kernel.write(cache, latents, keys, torch.arange(BLOCK_SIZE, BLOCKS * BLOCK_SIZE))
    return cache


def step(query_lens: list[int], contexts: list[int]) -> PagedRequests:
    """Of requests whose blocks begin behind the first one, in which not all is finite."""
    table = torch.arange(2, BLOCKS)[torch.arange(BLOCKS - 2).expand(len(contexts), -1).roll(3, 0)]
    starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
    return PagedRequests(query_start=starts, context_lens=contexts, block_table_rb=table, block_size=BLOCK_SIZE)


@pytest.mark.parametrize(
    ("shape", "most_items"),
    [(FEW, attention_plan.MOST_ITEMS), (FEW, 0), (MANY, attention_plan.MOST_ITEMS)],
    ids=["few", "few, whole", "many"],
)
def test_a_row_has_the_same_bits_alone_and_in_a_prompt_and_by_lengths_on_the_device(
    shape: LatentShape, most_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across the ends of tiles and splits."""
    kernel = TritonLatentAttention(target())
    cache = cache_of(kernel, shape)
    q_thd = numbers(6, shape.num_heads, shape.width, seed=2)
    prompt = step([6], [259])
    whole = kernel(q_thd, cache, kernel.plan(shape, prompt))
    monkeypatch.setattr(attention_plan, "MOST_ITEMS", most_items)
    rows, contexts = [1, 2, 3, 5], [255, 256, 257, 259]
    table = prompt.block_table_rb
    alone = PagedRequests(
        query_start=range(5), context_lens=contexts, block_table_rb=table.expand(4, -1), block_size=BLOCK_SIZE
    )
    found = kernel(q_thd[rows], cache, kernel.plan(shape, alone))
    assert torch.equal(found, whole[rows])
    mixed = PagedRequests(
        query_start=[0] * 5 + [7],
        context_lens=[300] * 5,
        block_table_rb=table.expand(5, -1),
        block_size=BLOCK_SIZE,
        lengths=DeviceLengths(
            query_start=torch.tensor([0, 1, 4, 5, 5, 7], dtype=torch.int32),
            context_lens=torch.tensor([256, 259, 257, 0, 0], dtype=torch.int32),
            chunks=2,
        ),
    )
    given = torch.cat([q_thd[2:3], q_thd[3:6], q_thd[3:4], q_thd[:2]])
    found = kernel(given, cache, kernel.plan(shape, mixed))
    assert torch.equal(found[:5], torch.cat([whole[2:3], whole[3:6], whole[3:4]]))
    assert found.isfinite().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_a_cache_is_laid_out_and_read_as_the_references(kv_dtype: str) -> None:
    kernel, reference = TritonLatentAttention(target(kv_dtype)), ReferenceLatentAttention(target(kv_dtype))
    ours, theirs = cache_of(kernel, FEW), cache_of(reference, FEW)
    q_thd = numbers(9, 3, FEW.width, seed=2)
    parts = step([1, 8], [270, 66])
    expected = reference(q_thd, theirs, reference.plan(FEW, parts))
    for cache in (ours, theirs):
        found = kernel(q_thd, cache, kernel.plan(FEW, parts))
        # The interpreter rounds some numbers in 8-bit floats to their other neighbour.
        bound = 1e-1 if kv_dtype == "fp8" else 2e-2
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    spoiled = PagedRequests(
        query_start=[0, 1], context_lens=[9], block_table_rb=torch.ones(1, 1, dtype=torch.int64), block_size=BLOCK_SIZE
    )
    for cache in (ours, theirs):
        assert kernel(q_thd[:1], cache, kernel.plan(FEW, spoiled)).isnan().all()
