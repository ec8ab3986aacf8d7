from __future__ import annotations

import torch

from quire.nn.kv import KVCache

SIZES = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 5, "block_size": 4}


def cache(num_blocks: int, seed: int | None = None) -> KVCache:
    made = KVCache(**SIZES, num_blocks=num_blocks, dtype=torch.float32)
    if seed is not None:
        made.data.copy_(torch.randn(made.data.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def block(kv: KVCache, index: int) -> torch.Tensor:
    return kv.data[:, :, :, index].clone()


def test_starts_finite_and_has_the_size_it_says() -> None:
    kv = cache(7)
    assert not kv.data.any()
    assert kv.data.nbytes == 7 * KVCache.bytes_per_block(**SIZES, dtype=torch.float32)
    assert kv.layer(1).shape == (2, 2, 7, 4, 5)


def test_copies_blocks_and_nothing_else() -> None:
    kv = cache(6, seed=0)
    before = [block(kv, index) for index in range(6)]
    kv.copy_blocks([(1, 4), (2, 5)])
    kv.copy_blocks([])
    for index, source in enumerate([0, 1, 2, 3, 1, 2]):
        assert torch.equal(block(kv, index), before[source])


def test_a_block_that_was_swapped_out_comes_back_as_it_was() -> None:
    kv, host = cache(5, seed=1), cache(3, seed=2)
    third, fourth, untouched = block(kv, 3), block(kv, 4), block(host, 0)
    kv.swap_out([(3, 2), (4, 1)], host)
    kv.data[:, :, :, 3:] = 9.0
    kv.swap_in([(2, 1), (1, 2)], host)
    assert torch.equal(block(kv, 1), third)
    assert torch.equal(block(kv, 2), fourth)
    assert torch.equal(block(host, 0), untouched)
