"""Swaps beside a GPU: by a stream of their own, through little memory."""

from __future__ import annotations

import torch

from quire.nn import host_kv
from quire.nn.host_kv import HostKV
from quire.nn.kv import KVCache
from quire.ops.moving import to_device

BLOCK = {"num_layers": 4, "num_kv_heads": 2, "block_size": 16, "block_bytes": 4096}
BLOCK_BYTES = 4 * 2 * 2 * 4096


def test_what_is_written_over_at_once_was_swapped_out_before(device: torch.device) -> None:
    num_blocks = 6 * host_kv._COPY_BYTES // BLOCK_BYTES
    kv = KVCache(**BLOCK, num_blocks=num_blocks, device=device)
    host = HostKV(kv, num_blocks)
    numbers = torch.arange(num_blocks, device=device) % 251
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    kv.data.copy_(numbers[:, None])
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(3):
        host.swap_out(list(enumerate(order)))
        kv.data.fill_(255)
        host.swap_in([(there, here) for here, there in enumerate(order)])
        assert kv.data.eq(numbers[:, None]).all()
    assert torch.cuda.max_memory_allocated(device) - before < kv.data.nbytes + 4 * host_kv._COPY_BYTES


def test_pinned_memory_is_in_pieces_that_waste_little(device: torch.device, monkeypatch) -> None:
    monkeypatch.setattr(host_kv, "_PINNED_BYTES", 5 * BLOCK_BYTES)
    kv = KVCache(**BLOCK, num_blocks=17, device=device)
    host = HostKV(kv, 17)
    kv.data.copy_(torch.arange(17, device=device)[:, None])
    expected = kv.data.clone()
    host.swap_out([(block, 16 - block) for block in range(17)])
    kv.data.zero_()
    host.swap_in([(16 - block, block) for block in range(17)])
    assert torch.equal(kv.data, expected)


def test_a_view_arrives_dense_and_nothing_waits_for_the_device(device: torch.device) -> None:
    numbers = torch.arange(4096).view(64, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = to_device(numbers[:, :7], device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    numbers.zero_()
    assert there.is_contiguous()
    assert torch.equal(there.cpu(), torch.arange(4096).view(64, 64)[:, :7])
