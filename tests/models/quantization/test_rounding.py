"""Rounding a matrix to a format: the formula of each, and errors no larger than the format makes necessary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.models.quantization.rounding import pack_offset_nibbles, round_weight, scales_of
from quire.models.quantization.scheme import GROUP_SIZES, Scheme, rounded_scheme
from quire.ops.cpu.library import usable_isas
from quire.ops.target import Target
from quire.ops.weight import Int4Weight, Int8Weight, dequantize, unpack_nibbles, weight_bytes, weight_shape

SCHEMES = [
    Scheme(format="int8"),
    Scheme(format="fp8"),
    *(Scheme(format="int4", group_size=size) for size in GROUP_SIZES),
]


def matrix(n: int, k: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(n=st.integers(1, 40), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_error_is_at_most_a_step(scheme: Scheme, n: int, groups: int, seed: int) -> None:
    """Half a step of the grid where it is even; a sixteenth of the value for 8-bit floats, with three mantissa bits.
    Of int4, one end of the range is a step nearer than the other, and both are cut off by a quarter."""
    weight_nk = matrix(n, groups * 128, seed)
    rounded = round_weight(weight_nk, scheme)
    assert weight_shape(rounded) == weight_nk.shape
    assert weight_bytes(rounded) == scheme.nbytes(tuple(weight_nk.shape))
    error = (dequantize(rounded) - weight_nk.float()).abs()
    if scheme.format == "fp8":
        allowed = weight_nk.float().abs() / 16 + rounded.scale_n[:, None] * 2**-9
    else:
        steps = 0.51 if scheme.format == "int8" else 1.3
        scale = scales_of(rounded).abs()
        allowed = steps * (scale[:, None] if scale.ndim == 1 else scale.repeat_interleave(scheme.group_size, 1))
        if isinstance(rounded, Int4Weight) and rounded.split_scales is not None:  # of a scale 3/8 of a step too small
            allowed += 3.2 * rounded.split_scales.step_ns.repeat_interleave(rounded.split_scales.span, 1)
    # The scale itself is rounded to 8 bits, which the values at the end of the range feel most.
    assert bool((error <= allowed + weight_nk.float().abs() * 2**-8).all())


def test_int8_is_the_formula() -> None:
    weight_nk = matrix(300, 1000, 1, torch.float32)
    rounded = round_weight(weight_nk, Scheme(format="int8"))
    assert isinstance(rounded, Int8Weight)
    scale = (weight_nk.abs().amax(1) / 127).bfloat16().float()
    expected = (weight_nk / scale[:, None]).round().clamp(-127, 127)
    assert torch.equal(rounded.scale_n, scale)
    # Dividing, and multiplying by the inverse, may fall to different sides of a tie.
    assert bool(((rounded.values_nk - expected).abs() <= 1).all())
    assert (rounded.values_nk == expected).double().mean() > 0.9999


def test_int4_is_better_than_the_plain_formula() -> None:
    """Than the largest magnitude over 7.5, which is what compressed-tensors' default observer takes."""
    weight_nk = matrix(256, 1024, 2, torch.float32)
    rounded = round_weight(weight_nk, Scheme(format="int4", group_size=32))
    groups = weight_nk.view(256, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    plain = ((groups / scale).round().clamp(-8, 7) * scale).view(256, -1)
    assert (dequantize(rounded) - weight_nk).square().mean() < 0.85 * (plain - weight_nk).square().mean()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_slices_do_not_show(scheme: Scheme) -> None:
    """A row has the same bits whatever rows are rounded with it."""
    weight_nk = matrix(2100, 256, 3)
    whole = dequantize(round_weight(weight_nk, scheme))
    for rows in (slice(0, 1), slice(1000, 1100), slice(2099, 2100)):
        assert torch.equal(dequantize(round_weight(weight_nk[rows], scheme)), whole[rows])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_are_values_of_bfloat16_and_of_zeros_they_are_zero(scheme: Scheme) -> None:
    weight_nk = matrix(6, 256, 4)
    weight_nk[2] = 0
    rounded = round_weight(weight_nk, scheme)
    scales = scales_of(rounded)
    assert scales.dtype == torch.float32
    assert torch.equal(scales, scales.bfloat16().float())
    assert bool((scales[2] == 0).all())
    assert bool((dequantize(rounded)[2] == 0).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_not_finite_shows_in_the_scales(scheme: Scheme) -> None:
    for bad in (float("nan"), float("inf")):
        weight_nk = matrix(3, 128, 5)
        weight_nk[1, 77] = bad
        assert not bool(torch.isfinite(scales_of(round_weight(weight_nk, scheme))).all())


def test_nibbles_of_signed_values() -> None:
    values = torch.arange(-8.0, 8.0).repeat(3, 1)
    packed = pack_offset_nibbles(values.clone())
    assert torch.equal(unpack_nibbles(packed).float() - 8, values)


def test_which_layers_are_rounded_to_what() -> None:
    assert rounded_scheme("int8", "embedding.weight", (64, 32)) is None
    assert rounded_scheme("int8", "norm.weight", (64,)) is None
    assert rounded_scheme("int8", "layers.0.attention.q.bias", (64,)) is None
    assert rounded_scheme("int4", "layers.0.attention.q.weight", (64, 64)) == Scheme(format="int4", group_size=32)
    assert rounded_scheme("int4", "layers.0.attention.q.weight", (64, 48)) == Scheme(format="int8")
    assert rounded_scheme("int4", "head.weight", (64, 64)) == Scheme(format="int8")
    assert rounded_scheme("fp8", "head.weight", (64, 64)) is None
    assert rounded_scheme("fp8", "layers.3.mlp.up.weight", (64, 64)) == Scheme(format="fp8")


def test_int4_is_symmetric() -> None:
    rounded = round_weight(matrix(4, 64, 6), Scheme(format="int4", group_size=64))
    assert isinstance(rounded, Int4Weight)
    assert rounded.zero_ng is None
    assert rounded.group_size == 64


@pytest.mark.parametrize("isa", usable_isas())
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(n=st.integers(1, 40), groups=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_compiled_kernels_give_the_same_bits(scheme: Scheme, isa: str, n: int, groups: int, seed: int) -> None:
    weight_nk = matrix(n, groups * 128, seed)
    weight_nk[seed % n, :200] = 0.0
    compiled = Target("cpu", torch.bfloat16, threads=2, isa=isa).rounding
    one, other = round_weight(weight_nk, scheme, compiled), round_weight(weight_nk, scheme)
    assert torch.equal(scales_of(one), scales_of(other))
    assert torch.equal(dequantize(one), dequantize(other))


@given(n=st.integers(1, 30), spans=st.integers(1, 4), seed=st.integers(0, 99))
def test_int4_has_scales_that_are_added_up_in_whole_numbers(n: int, spans: int, seed: int) -> None:
    rounded = round_weight(matrix(n, spans * 256, seed), Scheme(format="int4", group_size=32))
    assert isinstance(rounded, Int4Weight)
    assert rounded.split_scales is not None
    assert rounded.split_scales.span == 256


def test_such_scales_cost_little() -> None:
    """Beside a scale of its own for every group, which is what the largest magnitude asks for."""
    weight_nk = matrix(256, 1024, 7, torch.float32)
    groups_ngj = weight_nk.view(256, -1, 32)
    low, high = groups_ngj.amin(-1), groups_ngj.amax(-1)
    scale = (torch.where(high > -low, high, low) / -8.25)[..., None]
    free = ((groups_ngj / scale).round().clamp(-8, 7) * scale).view(256, -1)
    error = (dequantize(round_weight(weight_nk, Scheme(format="int4", group_size=32))) - weight_nk).square().mean()
    assert error < 1.04 * (free - weight_nk).square().mean()
