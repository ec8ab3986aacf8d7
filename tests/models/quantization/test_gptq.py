"""GPTQ: better than rounding to nearest for the inputs it was given, and the same where inputs do not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quire.core.errors import BadValue
from quire.models.quantization.gptq import gptq, search_scales
from quire.models.quantization.rounding import int4_scales, round_weight, scales_of
from quire.models.quantization.scheme import Scheme
from quire.ops.weight import Int4Weight, Int8Weight, QuantizedWeight, dequantize, unpack_nibbles

SCHEMES = [Scheme(format="int8"), *(Scheme(format="int4", group_size=size) for size in (32, 64, 128))]


def correlated(rows: int, k: int, seed: int) -> Tensor:
    """Inputs of a few directions and some noise, of very different sizes, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(rows, 24, generator=generator) @ torch.randn(24, k, generator=generator)
    sizes = torch.rand(k, generator=generator).mul_(3).exp_()
    return (directions + 0.5 * torch.randn(rows, k, generator=generator)) * sizes


def output_error(weight: QuantizedWeight, exact_nk: Tensor, x_tk: Tensor) -> float:
    return float((x_tk @ (dequantize(weight) - exact_nk).T).square().mean())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_output_error_is_far_below_that_of_rounding(scheme: Scheme, seed: int) -> None:
    exact_nk = torch.randn(48, 256, generator=torch.Generator().manual_seed(seed + 10)) * 0.05
    x_tk = correlated(2000, 256, seed)
    found = gptq(exact_nk, x_tk.T @ x_tk / len(x_tk), scheme)
    rounded = round_weight(exact_nk, scheme)
    assert output_error(found, exact_nk, x_tk) < 0.5 * output_error(rounded, exact_nk, x_tk)
    fresh_tk = correlated(2000, 256, seed)[:500].flip(1)  # inputs of another kind: no promise, but no ruin
    assert output_error(found, exact_nk, fresh_tk) < 10 * output_error(rounded, exact_nk, fresh_tk)


@given(n=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 50))
def test_independent_inputs_leave_nothing_to_make_up_for(n: int, groups: int, seed: int) -> None:
    """With a diagonal matrix, each value is its group's nearest, whatever the order of columns and the blocks."""
    generator = torch.Generator().manual_seed(seed)
    k = 64 * groups
    exact_nk = torch.randn(n, k, generator=generator)
    energy_k = torch.rand(k, generator=generator) + 0.1
    found = gptq(exact_nk, torch.diag(energy_k), Scheme(format="int4", group_size=64))
    assert isinstance(found, Int4Weight)
    scale_nk = int4_scales(search_scales(exact_nk, energy_k, 64, -8, 7), 64).repeat_interleave(64, 1)
    assert torch.equal(found.scale_ng.repeat_interleave(64, 1), scale_nk)
    steps = exact_nk / scale_nk
    values = unpack_nibbles(found.nibbles_nk2).float() - 8
    assert bool(((values - steps.clamp(-8, 7)).abs() <= 0.501).all())


def test_scales_are_of_the_least_weighted_error() -> None:
    """Among those that are tried: no other multiple of the largest magnitude does better."""
    generator = torch.Generator().manual_seed(3)
    exact_nk = torch.randn(4, 64, generator=generator)
    energy_k = torch.rand(64, generator=generator)
    found = search_scales(exact_nk, energy_k, 32, -8, 7)

    def error(scale: Tensor, row: int, group: int) -> float:
        part, weight = exact_nk[row, 32 * group :][:32], energy_k[32 * group :][:32]
        return float((((part / scale).round().clamp(-8, 7) * scale - part).square() * weight).sum())

    for row in range(4):
        for group in range(2):
            largest = exact_nk[row, 32 * group :][:32].abs().max()
            tried = [(sign * step / 20 * largest / 8).bfloat16().float() for step in range(14, 23) for sign in (1, -1)]
            best = min(error(scale, row, group) for scale in tried)
            assert error(found[row, group], row, group) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_features_that_were_never_seen_are_rounded_for_themselves(scheme: Scheme) -> None:
    exact_nk = torch.randn(8, 128, generator=torch.Generator().manual_seed(4))
    x_tk = correlated(300, 128, 4)
    x_tk[:, 50:60] = 0
    found = gptq(exact_nk, x_tk.T @ x_tk / 300, scheme)
    scale = scales_of(found).abs().reshape(8, -1)
    step = scale.repeat_interleave(128 // scale.shape[1], 1)
    error = (dequantize(found) - exact_nk).abs() / step
    assert bool((error[:, 50:60] <= 2.6).all())  # at the range's ends it is more than half a step


def test_it_is_of_the_same_bits_each_time_and_of_scales_that_are_stored_exactly() -> None:
    exact_nk, x_tk = torch.randn(8, 128, generator=torch.Generator().manual_seed(5)), correlated(300, 128, 5)
    for scheme in SCHEMES[:2]:
        first, again = (gptq(exact_nk.clone(), x_tk.T @ x_tk / 300, scheme) for _ in range(2))
        assert torch.equal(dequantize(first), dequantize(again))
        assert torch.equal(scales_of(first), scales_of(first).bfloat16().float())
        if isinstance(first, Int8Weight):
            assert int(first.values_nk.min()) >= -127


def test_inputs_that_are_not_finite_are_refused() -> None:
    energy_kk = torch.eye(64)
    energy_kk[3, 3] = float("nan")
    with pytest.raises(BadValue, match="calibration"):
        gptq(torch.randn(4, 64), energy_kk, Scheme(format="int4", group_size=32))
