"""Every implementation in Triton on the device: against its op's definition, and against itself among other rows."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from quire.ops.op import Implementation, Inputs
from quire.ops.registry import implementations, op_registry
from quire.ops.target import Target

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (1, 2, 5, 16, 17, 64, 129, 300, 1025)
"""On both sides of where kernels change their blocks."""
PARTS = ((0, 1), (3, 20), (16, 32), (77, 141), (1, 258), (299, 300))
SERVED = [one for one in implementations() if one.backend == "triton"]
ROW_OPS = [one for one in SERVED if (op_registry().get(one.op) or pytest.fail(one.op)).row_arguments]


def name(implementation: Implementation) -> str:
    return implementation.op


def moved(value: Any, device: torch.device | str) -> Any:
    """The same on the device: tensors, and whatever holds some."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **changed) if any(isinstance(one, Tensor) for one in leaves(changed)) else value
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.replace(
            value, **{field: moved(getattr(value, field), device) for field in value.__struct_fields__}
        )
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
        return type(value)(moved(one, device) for one in value)
    return value


def leaves(values: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for value in values.values():
        found.extend(value if isinstance(value, (list, tuple)) else [value])
    return [leaf for one in found for leaf in (leaves(vars_of(one)) if is_dataclass(one) else [one])]


def vars_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def as_tensors(result: Any, inputs: Inputs, calls: Any) -> list[Tensor]:
    """The definition's results, or what it changed in place."""
    if result is None:
        return [value for value in inputs.values() if isinstance(value, Tensor)]
    if isinstance(result, list):
        return [calls.as_tensor(result)]
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", SERVED, ids=name)
def test_agrees_with_the_definition(
    implementation: Implementation, dtype: torch.dtype, rows: int, device: torch.device, calls: Any
) -> None:
    op = op_registry().get(implementation.op)
    target = Target(device, dtype)
    if (why := implementation.unfit(target)) is not None:
        pytest.skip(why)
    tolerance = op.tolerances[dtype]
    for seed in range(3):
        inputs = op.inputs(rows, dtype, torch.Generator().manual_seed(seed))
        found = calls.compute(implementation, target, implementation.build(target), moved(inputs, device))
        expected = as_tensors(op.definition(**inputs), inputs, calls)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=tolerance.relative, atol=tolerance.absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ROW_OPS, ids=name)
def test_a_row_has_the_same_bits_in_any_batch(
    implementation: Implementation, dtype: torch.dtype, device: torch.device, calls: Any
) -> None:
    op = op_registry().get(implementation.op)
    target = Target(device, dtype)
    if (why := implementation.unfit(target)) is not None:
        pytest.skip(why)
    for seed in range(3):
        inputs = moved(op.inputs(300, dtype, torch.Generator().manual_seed(seed)), device)
        kernel = implementation.build(target)
        whole = calls.compute(implementation, target, kernel, inputs)
        for start, stop in PARTS:
            rows = slice(start, stop)
            some = {key: value[rows] if key in op.row_arguments else value for key, value in inputs.items()}
            for part, all_rows in zip(calls.compute(implementation, target, kernel, some), whole, strict=True):
                assert torch.equal(part, all_rows[rows]), (seed, start, stop)


@pytest.mark.parametrize("implementation", SERVED, ids=name)
def test_a_call_again_gives_the_same_bits(implementation: Implementation, device: torch.device, calls: Any) -> None:
    """A data race would show now and then."""
    op = op_registry().get(implementation.op)
    target = Target(device, torch.bfloat16)
    inputs = moved(op.inputs(257, torch.bfloat16, torch.Generator().manual_seed(1)), device)
    kernel = implementation.build(target)
    first = calls.compute(implementation, target, kernel, inputs)
    for _ in range(20):
        for one, other in zip(calls.compute(implementation, target, kernel, inputs), first, strict=True):
            assert torch.equal(one, other)
