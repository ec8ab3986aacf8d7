"""Copies of KV blocks, against indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.ops.target import Target
from quire.ops.triton.library import TRITON, is_installed

if not is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from quire.ops.triton.blocks import TritonBlocks


@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32), same=st.booleans(), block_bytes=st.sampled_from([6, 64, 8208]))
def test_blocks_go_where_they_are_sent(data: st.DataObject, seed: int, same: bool, block_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers, p, h = (data.draw(st.integers(1, 2)) for _ in range(3))
    n = data.draw(st.integers(2, 6))
    wider = torch.randint(0, 256, (layers, p, h + 1, n, block_bytes), generator=generator, dtype=torch.uint8)
    source = wider[:, :, 1:]
    destination = source if same else torch.randint(0, 256, source.shape, generator=generator, dtype=torch.uint8)
    blocks = torch.randperm(n, generator=generator)
    count = data.draw(st.integers(0, n // 2))
    pairs = torch.stack([blocks[:count], blocks[count : 2 * count]], dim=1)
    expected_wider, expected = wider.clone(), destination.clone()
    expected[:, :, :, pairs[:, 1]] = source[:, :, :, pairs[:, 0]]
    nobody = torch.tensor([[-1, 0], [0, -1], [n, 0], [0, n]])
    TritonBlocks(Target("cpu", torch.bfloat16, isa=TRITON)).copy(source, destination, torch.cat([pairs, nobody]))
    assert torch.equal(destination, expected)
    assert torch.equal(wider[:, :, :1], expected_wider[:, :, :1])
