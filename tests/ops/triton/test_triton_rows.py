"""Row kernels in Triton where the common test of implementations does not reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.ops.activation import ACTIVATIONS, activation
from quire.ops.kernels import Kernels, select
from quire.ops.layer_norm import add_layer_norm
from quire.ops.norm import add_rms_norm
from quire.ops.op import random_tensor
from quire.ops.target import Target
from quire.ops.triton.library import TRITON, is_installed
from quire.ops.triton.row_view import row_view

BF16 = torch.bfloat16

if not is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)


def kernels(dtype: torch.dtype = BF16) -> Kernels:
    return select(Target("cpu", dtype, isa=TRITON))


def random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return random_tensor(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_view_of_rows_addresses_them(data: st.DataObject) -> None:
    """Brute force: what the two strides say, element by element, of tensors that were cut and turned."""
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 16, 32]), min_size=1, max_size=4))
    count = torch.Size(sizes).numel()
    x = torch.arange(count + 17, dtype=torch.float32)[data.draw(st.integers(0, 17)) :][:count].view(sizes)
    for dim in range(x.dim()):
        start = data.draw(st.integers(0, x.shape[dim] - 1))
        x = x.narrow(dim, start, data.draw(st.integers(1, x.shape[dim] - start)))
    x = x.permute(*data.draw(st.permutations(range(x.dim()))))
    d = x.shape[-1]
    view = row_view(x)
    storage = view.tensor.as_strided((view.tensor.untyped_storage().nbytes() // 4,), (1,), 0)
    first = view.tensor.storage_offset()
    starts = [r // view.inner * view.outer_stride + r % view.inner * view.inner_stride for r in range(view.rows)]
    found = torch.stack([storage[first + start : first + start + d] for start in starts])
    assert torch.equal(found, x.reshape(-1, d))
    aligned = view.outer_stride % 16 == 0 and view.inner_stride % 16 == 0
    assert aligned == (d % 16 == 0)
    assert not aligned or view.tensor.data_ptr() % 16 == 0


def test_heads_of_a_joint_product_are_read_in_place() -> None:
    joint = random(5, 8, 64)
    q, k = joint[:, :6], joint[:, 6:]
    for x in (q, k, joint.view(5, 512)[:, 64:320]):
        assert row_view(x).tensor.data_ptr() == x.data_ptr()
    weight, angle = random(64), random(5, 32, dtype=torch.float32)
    for x in (q, k):
        dense = x.contiguous()
        assert torch.equal(kernels().rms_norm(x, weight, 1e-6, 0.0), kernels().rms_norm(dense, weight, 1e-6, 0.0))
        assert torch.equal(kernels().rope(x, angle.cos(), angle.sin()), kernels().rope(dense, angle.cos(), angle.sin()))


@pytest.mark.parametrize("width", [4096, 12288, 20000])
def test_wide_rows(width: int) -> None:
    x, residual, weight, bias = (random(2, width, seed=seed) for seed in range(4))
    for found, expected in (
        (kernels().add_rms_norm(x, residual, weight[0], 1e-6, 1.0), add_rms_norm(x, residual, weight[0], 1e-6, 1.0)),
        (
            kernels().add_layer_norm(x, residual, weight[0], bias[0], 1e-5),
            add_layer_norm(x, residual, weight[0], bias[0], 1e-5),
        ),
    ):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_rounding_is_that_of_the_definitions() -> None:
    """All but sums and the exponential function are the same operations in the same order."""
    triton, plain = kernels(), select(Target("cpu", BF16, isa="reference"))
    x, y = random(24, 1024), random(24, 1024, seed=1)
    angle = random(24, 32, dtype=torch.float32)
    heads = x.view(24, 16, 64)
    assert torch.equal(
        triton.rope(heads, angle.cos(), angle.sin()),
        plain.rope(heads, angle.cos(), angle.sin()),
    )
    (normed, total), (expected, expected_total) = (k.add_rms_norm(x, y, x[0], 1e-6, 0.0) for k in (triton, plain))
    assert torch.equal(total, expected_total)
    assert (normed != expected).float().mean() < 1e-3
    assert (triton.gated_activation(x, y, "silu") != plain.gated_activation(x, y, "silu")).float().mean() < 1e-3
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(triton.embedding(ids, x), x[ids])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_every_number(name: str) -> None:
    """All bfloat16 numbers whose cube is one, too: within a rounding, or of a size that does not count."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    numbers = numbers[numbers.abs() < 1e12]
    found, expected = kernels().activation(numbers, name).double(), activation(numbers.double(), name).double()
    error = (found - expected).abs()
    assert (error <= expected.abs() * 2**-7 + 1e-6).all(), numbers[error > expected.abs() * 2**-7 + 1e-6]
    assert kernels().activation(numbers[:3] * torch.nan, name).isnan().all()
    gated = kernels().gated_activation(numbers, torch.ones_like(numbers), name).double()
    normal = found.abs() >= torch.finfo(BF16).tiny  # the interpreter widens others wrongly
    assert torch.equal(gated[normal], found[normal])


def test_no_rows_at_all_and_a_token_that_is_none() -> None:
    x = random(0, 3, 64)
    triton = kernels()
    assert triton.rms_norm(x, random(64), 1e-6, 0.0).shape == x.shape
    assert triton.rope(x, torch.empty(0, 32), torch.empty(0, 32)).shape == x.shape
    assert triton.gated_activation(x, x, "silu").shape == x.shape
    table = random(5, 64)
    found = triton.embedding(torch.tensor([-1, 4, 5, 2**40]), table)
    assert torch.equal(found[1], table[4])
    assert not found[[0, 2, 3]].any()
