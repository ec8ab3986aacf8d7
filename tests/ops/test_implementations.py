"""Every implementation that there is, against its op's definition, and against itself on other batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.core.errors import QuireError
from quire.core.request import TokenLogprobs
from quire.ops.attention import AttentionKernel
from quire.ops.cpu.library import REFERENCE, usable_isas
from quire.ops.kernels import Kernels, select
from quire.ops.latent_attention import LatentAttentionKernel, LatentShape
from quire.ops.linear import LINEARS
from quire.ops.moe import MoeWeights
from quire.ops.op import Implementation, Inputs
from quire.ops.reference.attention import ReferenceAttention
from quire.ops.registry import implementations, op_registry
from quire.ops.target import Target
from quire.ops.triton.library import TRITON

TARGETS = [
    *(Target("cpu", dtype, isa=REFERENCE) for dtype in (torch.float32, torch.bfloat16)),
    *(Target("cpu", torch.bfloat16, isa=isa, threads=2) for isa in usable_isas()),
    *(Target("cpu", dtype, isa=TRITON) for dtype in (torch.float32, torch.bfloat16)),
]
BACKENDS = {REFERENCE: "reference", TRITON: "triton"}
MOST_INTERPRETED_ROWS = 10
SLOWLY_INTERPRETED = ("draw", "sample", "token_logprobs")
"""Ops of many small steps per row, whose logits are float32 whatever an engine computes in."""


def cases(*, of_rows: bool, interpreted: bool = False) -> pytest.MarkDecorator:
    """Every implementation that fits this machine in every dtype; `of_rows` for ops that work row by row only;
    `interpreted` for Triton's, which are slow here and have few examples."""
    rows_ops = {name for name, op in op_registry() if op.row_arguments}
    fitting = [
        pytest.param(implementation, target, id=f"{implementation.op}-{target.isa}-{target.dtype}")
        for target in TARGETS
        if (target.isa == TRITON) == interpreted
        for implementation in implementations()
        if implementation.backend == BACKENDS.get(target.isa or "", "cpu")
        and implementation.unfit(target) is None
        and (implementation.op in rows_ops or not of_rows)
        and not (slow(implementation, target) and target.dtype != torch.float32)
    ]
    return pytest.mark.parametrize(("implementation", "target"), fitting)


def slow(implementation: Implementation, target: Target) -> bool:
    return target.isa == TRITON and implementation.op in SLOWLY_INTERPRETED


def fewer(rows: int, implementation: Implementation, target: Target) -> int:
    """Rows for kernels that are interpreted, one program after the other: 2 or more stay 2 or more."""
    if slow(implementation, target):
        return min(rows, 2)
    return rows if target.isa != TRITON else min(rows, 2 + rows % (MOST_INTERPRETED_ROWS - 1))


def as_tensor(tokens: list[TokenLogprobs | QuireError]) -> Tensor:
    """A row for each token: all that is said about it."""
    rows = [
        [-1.0]
        if isinstance(token, QuireError)
        else [token.token_id, token.logprob, token.rank, *token.top_ids, *token.top_logprobs]
        for token in tokens
    ]
    return torch.tensor([row + [0.0] * (20 - len(row)) for row in rows], dtype=torch.float64)


def written(kernel: AttentionKernel, kv_2gnsd: Tensor) -> Tensor:
    """The kernel's own cache with these keys and values in it, all but the null block's."""
    _, g, n, s, d = kv_2gnsd.shape
    cache = torch.zeros(2, g, n, kernel.block_bytes(s, d), dtype=torch.uint8, device=kv_2gnsd.device)
    k_tgd, v_tgd = kv_2gnsd[:, :, 1:].flatten(2, 3).transpose(1, 2)
    kernel.write(cache, k_tgd, v_tgd, torch.arange(s, n * s, device=kv_2gnsd.device))
    return cache


def written_latents(kernel: LatentAttentionKernel, rows_nsd: Tensor, shape: LatentShape) -> Tensor:
    """The same of latents and their keys."""
    n, s, _ = rows_nsd.shape
    cache = torch.zeros(n, kernel.block_bytes(s, shape), dtype=torch.uint8)
    latent_tc, key_tp = rows_nsd[1:].flatten(0, 1).split([shape.latent_dim, shape.rope_dim], dim=-1)
    kernel.write(cache, latent_tc, key_tp, torch.arange(s, n * s))
    return cache


def packed(kernels: Kernels, weights: MoeWeights) -> MoeWeights:
    """By the linear kernels that serve each weight."""
    lists = (
        [kernels.linear_for(weight).pack(weight) for weight in each]
        for each in (weights.gate, weights.up, weights.down)
    )
    gate, up, down = lists
    return replace(weights, router=kernels.linear.pack(weights.router), gate=gate, up=up, down=down)


def compute(implementation: Implementation, target: Target, kernel: Any, inputs: Inputs) -> list[Tensor]:
    """All results of a call, what it wrote in place included."""
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if implementation.op == "attention":
        plan = kernel.plan(inputs["shape"], inputs["requests"])
        # The back ends for any device share a layout; to write so much is slow where it is interpreted.
        writer = ReferenceAttention(target) if target.isa == TRITON else kernel
        results = kernel(inputs["q_thd"], written(writer, inputs["kv_2gnsd"]), plan)
    elif implementation.op == "latent_attention":
        plan = kernel.plan(inputs["shape"], inputs["requests"])
        cache = written_latents(kernel, inputs["rows_nsd"], inputs["shape"])
        results = kernel(inputs["q_thd"], cache, plan, inputs["chosen_tk"])
    elif implementation.op == "latent_index":
        keys_nsd, shape = inputs["keys_nsd"], inputs["shape"]
        n, s, _ = keys_nsd.shape
        cache = torch.zeros(n, kernel.block_bytes(s, shape), dtype=torch.uint8)
        kernel.write(cache, keys_nsd[1:].flatten(0, 1), torch.arange(s, n * s))
        results = kernel(inputs["q_thd"], inputs["weights_th"], cache, kernel.plan(shape, inputs["requests"]))
    elif implementation.op == "moe":
        results = kernel(inputs["x_te"], kernel.join(packed(select(target), inputs["weights"])))
    elif implementation.op in {op.name for op in LINEARS}:
        results = kernel(inputs["x_tk"], kernel.pack(inputs["weight"]), inputs["bias_n"])
    else:
        results = kernel(*inputs.values())
    if implementation.op in ("sample", "token_logprobs"):
        return [as_tensor(results)]
    if results is None:
        return [value for value in inputs.values() if isinstance(value, Tensor)]
    return list(results) if isinstance(results, tuple) else [results]


@cases(of_rows=False)
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 150), seed=st.integers(0, 2**32))
def test_agrees_with_the_definition(implementation: Implementation, target: Target, rows: int, seed: int) -> None:
    check_definition(implementation, target, rows, seed)


@cases(of_rows=False, interpreted=True)
@settings(max_examples=3, deadline=None)
@given(rows=st.integers(1, 150), seed=st.integers(0, 2**32))
def test_interpreted_it_agrees_with_the_definition(
    implementation: Implementation, target: Target, rows: int, seed: int
) -> None:
    check_definition(implementation, target, rows, seed)


def check_definition(implementation: Implementation, target: Target, rows: int, seed: int) -> None:
    op = op_registry().get(implementation.op)
    assert op is not None
    rows = fewer(rows, implementation, target)
    inputs = op.inputs(rows, target.dtype, torch.Generator().manual_seed(seed))
    expected_inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    expected = op.definition(**expected_inputs)
    if isinstance(expected, list):
        expected = as_tensor(expected)
    if expected is None:
        expected = tuple(value for value in expected_inputs.values() if isinstance(value, Tensor))
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = compute(implementation, target, implementation.build(target), inputs)
    tolerance = op.tolerances[target.dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance.relative, atol=tolerance.absolute)


@cases(of_rows=True)
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(2, 400), seed=st.integers(0, 2**32), data=st.data())
def test_a_row_has_the_same_bits_in_any_batch(
    implementation: Implementation, target: Target, rows: int, seed: int, data: st.DataObject
) -> None:
    check_rows(implementation, target, rows, seed, data)


@cases(of_rows=True, interpreted=True)
@settings(max_examples=2, deadline=None)
@given(rows=st.integers(2, 400), seed=st.integers(0, 2**32), data=st.data())
def test_interpreted_a_row_has_the_same_bits_in_any_batch(
    implementation: Implementation, target: Target, rows: int, seed: int, data: st.DataObject
) -> None:
    check_rows(implementation, target, rows, seed, data)


def check_rows(implementation: Implementation, target: Target, rows: int, seed: int, data: st.DataObject) -> None:
    op = op_registry().get(implementation.op)
    assert op is not None
    rows = fewer(rows, implementation, target)
    inputs = op.inputs(rows, target.dtype, torch.Generator().manual_seed(seed))
    kernel = implementation.build(target)
    whole = compute(implementation, target, kernel, inputs)
    start = data.draw(st.integers(0, rows - 1), label="start")
    stop = data.draw(st.integers(start + 1, rows), label="stop")
    some = {name: value[start:stop] if name in op.row_arguments else value for name, value in inputs.items()}
    for part, all_rows in zip(compute(implementation, target, kernel, some), whole, strict=True):
        assert torch.equal(part, all_rows[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "n"), [(1024, 1024), (3072, 1024), (1024, 3072), (576, 576), (100, 60), (4099, 33)])
def test_linear_rows_are_alone_at_the_shapes_of_real_models(k: int, n: int, dtype: torch.dtype) -> None:
    """Large enough that the library below changes its blocking with the number of rows."""
    generator = torch.Generator().manual_seed(k + n)
    x = torch.randn(1100, k, generator=generator).to(dtype)
    weight = torch.randn(n, k, generator=generator).mul_(k**-0.5).to(dtype)
    linear = select(Target("cpu", dtype, isa="reference")).linear
    weight = linear.pack(weight)
    whole = linear(x, weight, None)
    for start, stop in ((0, 1), (3, 20), (77, 110), (500, 1013), (1099, 1100), (0, 300)):
        assert torch.equal(linear(x[start:stop], weight, None), whole[start:stop])


def test_every_op_is_served_and_says_why() -> None:
    report = select(Target("cpu", torch.float32)).report()
    assert [op for op, _, _ in report] == op_registry().names()
    assert all(backend and reason for _, backend, reason in report)
    assert {implementation.op for implementation in implementations()} == set(op_registry().names())


def test_an_engine_keeps_what_it_learned_to_itself() -> None:
    one, other = select(Target("cpu", torch.float32)), select(Target("cpu", torch.float32))
    assert one.linear is not other.linear
    assert one.attention is not other.attention
