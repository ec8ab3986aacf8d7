"""The implementations that one engine uses, chosen once when it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from quire.core.errors import QuireError
from quire.core.request import TokenLogprobs
from quire.ops.attention import AttentionKernel
from quire.ops.cpu.stack import build_stack
from quire.ops.draw import Draw
from quire.ops.latent_attention import LatentAttentionKernel
from quire.ops.latent_index import LatentIndexKernel
from quire.ops.linear import LinearKernel
from quire.ops.moe import MoeKernel
from quire.ops.op import Implementation
from quire.ops.registry import implementations
from quire.ops.sampling import SamplingRow
from quire.ops.stack import BuildStack
from quire.ops.target import Target
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, PackedWeight, Weight

BESIDE_STACK = ("activation", "draw", "latent_attention", "latent_index", "linear_fp8_rows")
"""Ops that a stack's layers have none of, or that weights of a stack's own format go by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """A line of `quire kernels`: which back end serves an op, and why that one."""

    op: str
    implementation: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One callable per op, with the arguments of the op's definition (of kernels' protocols for attention)."""

    activation: Callable[[Tensor, str], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
    attention: AttentionKernel
    draw: Draw
    embedding: Callable[[Tensor, Tensor], Tensor]
    gated_activation: Callable[[Tensor, Tensor, str], Tensor]
    latent_attention: LatentAttentionKernel
    latent_index: LatentIndexKernel
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    linear: LinearKernel
    linear_fp8: LinearKernel
    linear_fp8_rows: LinearKernel
    linear_int4: LinearKernel
    linear_int8: LinearKernel
    moe: MoeKernel
    rms_norm: Callable[[Tensor, Tensor, float, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Sequence[SamplingRow]], list[TokenLogprobs | QuireError]]
    token_logprobs: Callable[[Tensor, Sequence[int], int], list[TokenLogprobs]]
    choices: tuple[KernelChoice, ...]
    stack: BuildStack | None = None
    """All layers in one call, where one back end serves every op of a decoder and offers it."""

    def linear_for(self, weight: Weight | PackedWeight) -> LinearKernel:
        """The kernel that serves a weight's format."""
        match weight:
            case PackedWeight():
                quantized = {"int8": self.linear_int8, "int4": self.linear_int4, "fp8": self.linear_fp8}
                return quantized.get(weight.value.format, self.linear)
            case Int8Weight():
                return self.linear_int8
            case Int4Weight():
                return self.linear_int4
            case Fp8Weight(rounds_rows=True):
                return self.linear_fp8_rows
            case Fp8Weight():
                return self.linear_fp8
            case _:
                return self.linear

    def served_by(self, op: str) -> str:
        """The name of the back end that serves an op."""
        return next(choice.implementation for choice in self.choices if choice.op == op)

    def report(self) -> list[tuple[str, str, str]]:
        """(op, implementation, reason) for each op."""
        return [(choice.op, choice.implementation, choice.reason) for choice in self.choices]


def select(target: Target) -> Kernels:
    """The preferred implementation of each op that fits the target."""
    chosen = _choices(target)
    built: dict[str, Any] = {choice.op: implementation.build(target) for implementation, choice in chosen}
    choices = [choice for _, choice in chosen]
    return Kernels(**built, choices=tuple(choices), stack=_stack(target, choices))


def choose(target: Target) -> tuple[KernelChoice, ...]:
    """What `select` would take, for a device that need not be there."""
    return tuple(choice for _, choice in _choices(target))


def _choices(target: Target) -> list[tuple[Implementation, KernelChoice]]:
    available = implementations()
    found = []
    for op in (field.name for field in fields(Kernels) if field.name not in ("choices", "stack")):
        chosen, reason = _choose([item for item in available if item.op == op], target)
        found.append((chosen, KernelChoice(op=op, implementation=chosen.backend, reason=reason)))
    return found


def _stack(target: Target, choices: list[KernelChoice]) -> BuildStack | None:
    serving = {choice.implementation for choice in choices if choice.op not in BESIDE_STACK}
    if serving == {"cpu"}:
        return partial(build_stack, target)
    if serving == {"triton"}:
        return partial(import_module("quire.ops.triton.stack").build_stack, target)
    return None


def _choose(candidates: list[Implementation], target: Target) -> tuple[Implementation, str]:
    passed_over: list[str] = []
    for candidate in sorted(candidates, key=lambda item: -item.preference):
        why_not = candidate.unfit(target)
        if why_not is None:
            return candidate, "; ".join([candidate.note, *passed_over])
        passed_over.append(f"not {candidate.backend}: {why_not}")
    raise AssertionError("the reference back end serves every op everywhere")
