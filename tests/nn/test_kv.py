from __future__ import annotations

import gc
import weakref

import psutil
import pytest
import torch

from quire.core.errors import NotEnoughMemory
from quire.nn.host_kv import HostKV
from quire.nn.kv import KVCache

SIZES = {"num_layers": 3, "num_kv_heads": 2, "block_size": 4, "block_bytes": 40}
LARGE = {"num_layers": 4, "num_kv_heads": 2, "block_size": 16, "block_bytes": 2048}
LARGE_BLOCK = 4 * 2 * 2 * 2048


def cache(num_blocks: int, seed: int | None = None) -> KVCache:
    made = KVCache(**SIZES, num_blocks=num_blocks)
    if seed is not None:
        made.data.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return made


def block(kv: KVCache, index: int) -> torch.Tensor:
    return kv.data[:, :, :, index].clone()


def test_starts_finite_and_has_the_size_it_says() -> None:
    kv = cache(7)
    assert not kv.data.any()
    assert kv.data.nbytes == 7 * 3 * 2 * 2 * 40
    assert kv.layer(1).shape == (2, 2, 7, 40)


def test_groups_share_the_memory_and_have_layers_of_their_own() -> None:
    places = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]
    kv = KVCache(**{**SIZES, "num_layers": 5}, num_blocks=3, places=places)
    assert kv.data.shape[0] == 2
    assert (kv.num_groups, kv.group_of_layer) == (3, (0, 1, 0, 1, 2))
    for layer, (group, index) in enumerate(places):
        kv.layer(layer)[:, :, group] = 10 * group + index + 1
    for group, numbers in ((0, {1, 2}), (1, {11, 12}), (2, {21, 0})):  # the last group's block is half empty
        assert {int(value) for value in block(kv, group).unique()} == numbers


def test_memory_is_taken_when_it_is_written() -> None:
    num_blocks = (256 << 20) // LARGE_BLOCK
    process = psutil.Process()
    before = process.memory_info().rss
    kv = KVCache(**LARGE, num_blocks=num_blocks)
    kv.data[:, :, :, num_blocks // 2] = 1
    assert not kv.data[:, :, :, num_blocks // 2 + 1].any()
    assert process.memory_info().rss - before < 32 << 20
    kv.data.fill_(1)  # that the measure would notice
    assert process.memory_info().rss - before > 200 << 20


def test_memory_is_given_back_with_the_last_view() -> None:
    kv = cache(3, seed=0)
    layer, expected, gone = kv.layer(1), kv.data[1].clone(), weakref.ref(kv)
    del kv
    gc.collect()
    assert gone() is None
    assert torch.equal(layer, expected)


def test_a_pool_that_no_machine_has_is_refused() -> None:
    with pytest.raises(NotEnoughMemory, match="GiB"):
        cache(2**48)


def test_a_block_that_was_swapped_out_comes_back_as_it_was() -> None:
    kv = cache(5, seed=1)
    host = HostKV(kv, 3)
    third, fourth = block(kv, 3), block(kv, 4)
    host.swap_out([(3, 2), (4, 1)])
    kv.data[:, :, :, 3:] = 9
    host.swap_in([(2, 1), (1, 2), (0, 4)])
    assert torch.equal(block(kv, 1), third)
    assert torch.equal(block(kv, 2), fourth)
    assert not block(kv, 4).any(), "a block of the host that nothing was written to"


def test_a_swap_larger_than_is_copied_at_once() -> None:
    num_blocks = (150 << 20) // LARGE_BLOCK
    kv = KVCache(**LARGE, num_blocks=num_blocks)
    host = HostKV(kv, num_blocks)
    numbers = torch.arange(num_blocks) % 251
    kv.data.copy_(numbers[:, None])
    host.swap_out([(block, num_blocks - 1 - block) for block in range(num_blocks)])
    kv.data.zero_()
    host.swap_in([(block, block) for block in range(num_blocks)])
    assert kv.data.eq(numbers.flip(0)[:, None]).all()


def test_layers_of_several_shapes_have_their_bytes_and_move_together() -> None:
    shapes = [(2, 40), (1, 64), (2, 40), (1, 64), (1, 40)]
    kv = KVCache(num_layers=5, num_kv_heads=2, num_blocks=4, block_size=4, block_bytes=40, shapes=shapes)
    host = HostKV(kv, 4)
    assert [tuple(kv.layer(index).shape) for index in range(5)] == [(2, h, 4, b) for h, b in shapes]
    assert sum(tensor.nbytes for tensor in kv.tensors.values()) == 4 * 2 * sum(h * b for h, b in shapes)
    for index in range(5):
        assert not kv.layer(index).any(), "it is another layer's"
        kv.layer(index).fill_(index + 1)
    host.swap_out([(2, 1)])
    for index in range(5):
        kv.layer(index).zero_()
    host.swap_in([(1, 3)])
    for index in range(5):
        assert kv.layer(index)[:, :, 3].eq(index + 1).all()
        assert not kv.layer(index)[:, :, :3].any()
