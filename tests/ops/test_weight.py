"""Scales of 4-bit weights that are whole multiples of a step: found where they are, and only there."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.ops.spans import span_of
from quire.ops.weight import Int4Weight, dequantize, pack_nibbles, split


def int4(scale_ng: torch.Tensor, group_size: int, zero_ng: torch.Tensor | None = None) -> Int4Weight:
    n, groups = scale_ng.shape
    nibbles = pack_nibbles(torch.randint(0, 16, (n, groups * group_size)))
    return Int4Weight(nibbles_nk2=nibbles, scale_ng=scale_ng, zero_ng=zero_ng, group_size=group_size)


@given(
    n=st.integers(1, 600),
    spans=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_the_parts_give_the_scales_back(n: int, spans: int, group_size: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = spans * 256 // group_size
    steps_ns = torch.rand(n, spans, generator=generator).bfloat16().float()
    multipliers = torch.randint(-15, 16, (n, groups), generator=generator)
    scale_ng = multipliers * steps_ns.repeat_interleave(256 // group_size, 1)
    weight = int4(scale_ng, group_size)
    parts = split(weight).split_scales
    assert parts is not None
    assert parts.span == 256
    assert parts.multiplier_ng.abs().max() <= 15
    assert torch.equal(parts.step_ns.repeat_interleave(256 // group_size, 1) * parts.multiplier_ng, scale_ng)
    row = data.draw(st.integers(0, n - 1))
    spoilt = scale_ng.clone()
    spoilt[row, :2] = torch.tensor([1.0, 0.7123])  # no fifteenths of each other
    assert split(int4(spoilt, group_size)).split_scales is None


def test_none_with_zero_points_or_without_spans_or_of_what_is_not_finite() -> None:
    ones = torch.ones(3, 8)
    assert split(int4(ones, 32)).split_scales is not None
    assert split(int4(ones, 32, zero_ng=torch.full((3, 8), 7, dtype=torch.uint8))).split_scales is None
    assert split(int4(torch.ones(3, 3), 32)).split_scales is None
    for bad in (torch.nan, torch.inf):
        assert split(int4(ones.clone().index_fill_(1, torch.tensor([2]), bad), 32)).split_scales is None


def test_the_numbers_stay() -> None:
    weight = int4(torch.randint(-15, 16, (5, 16)) * 0.25, 32)
    assert torch.equal(dequantize(split(weight)), dequantize(weight))
    assert split(weight).row_group == 256
    assert weight.row_group == 32


def test_spans_divide_the_features() -> None:
    assert [span_of(k, 32) for k in (256, 1024, 896, 960, 96, 32)] == [256, 256, 128, 64, 0, 0]
    assert [span_of(k, 128) for k in (256, 384)] == [256, 0]
