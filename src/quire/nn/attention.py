"""Self-attention with grouped KV heads, rotary positions and a paged cache.

Legend: t tokens, e hidden size, h query heads, g KV heads, d head dim, r rotated dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from quire.nn.batch import ForwardBatch, GroupTable
from quire.nn.kv import KVCache
from quire.nn.layers import Linear, Norm
from quire.nn.rope import RopeTable
from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.kernels import Kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTransform:
    """What happens to queries and keys besides projection and rotation.

    `whole`: norms see all heads as one vector. `after_rope`: they come after the rotation. `clip` bounds queries, keys
    and values. `growth` is (beta, period, offset): queries are multiplied by
    1 + beta * log(1 + floor((position + offset) / period)). `chunk`: a token sees only its own chunk of so many
    positions, a multiple of the cache's block size.
    """

    whole: bool = False
    after_rope: bool = False
    clip: float | None = None
    growth: tuple[float, int, int] | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What one kind of layer needs of this step. Made once per step by `step_contexts`.

    `plan` is the attention kernel's own; `rotation` cosines and sines `[t, r / 2]`, None where nothing is rotated;
    `slots_t` as in `ForwardBatch`; `growth_t11` multiplies queries. `own_tp`: one layer's own input, in models that
    have some.
    """

    plan: Any
    rotation: tuple[Tensor, Tensor] | None
    slots_t: Tensor
    growth_t11: Tensor | None
    own_tp: Tensor | None = None


class AttentionBlock(Protocol):
    """What a decoder's layer asks of its attention, of whatever kind."""

    @property
    def shape(self) -> Hashable:
        """What the kernel needs to know of it; attentions of one shape share a plan."""
        ...

    @property
    def rope(self) -> RopeTable | None: ...

    @property
    def transform(self) -> QueryTransform: ...

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens per KV block that its kernel can work with."""
        ...

    def block_shape(self, block_size: int) -> tuple[int, int, int]:
        """(planes, heads, bytes) of a block in its layer of the cache, see `nn.kv`."""
        ...

    def plan(self, requests: PagedRequests) -> Any:
        """The kernel's plan of a step."""
        ...

    def __call__(self, x_te: Tensor, kv_layer: Tensor, step: StepContext) -> Tensor:
        """Of normed rows; their keys and values are in the cache afterwards."""
        ...


class Attention:
    """`q_norm`, `k_norm` and `v_norm` normalise queries, keys and values, where the model has them. `k` None: it reads
    the keys and values of another layer, whose part of the cache it is given, and writes none. `v` None besides: values
    are what keys are before their norm. `gate` and `gate_function` multiply what is found, by dimension or by head.
    `rope` None: nothing is rotated."""

    def __init__(
        self,
        *,
        q: Linear,
        k: Linear | None,
        v: Linear | None,
        o: Linear,
        gate: Linear | None,
        gate_function: Literal["sigmoid", "softplus"] | None,
        q_norm: Norm | None,
        k_norm: Norm | None,
        v_norm: Norm | None,
        sinks: Tensor | None,
        shape: AttentionShape,
        rope: RopeTable | None,
        transform: QueryTransform,
        kernels: Kernels,
    ) -> None:
        self.q = q
        self.k = k
        self.v = v
        self.o = o
        self.gate = gate
        self.gate_function = gate_function
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.v_norm = v_norm
        self.sinks = sinks
        self.shape = shape
        self.rope = rope
        self.transform = transform
        self._kernels = kernels

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return self._kernels.attention.block_sizes

    def block_shape(self, block_size: int) -> tuple[int, int, int]:
        return 2, self.shape.num_kv_heads, self._kernels.attention.block_bytes(block_size, self.shape.head_dim)

    def plan(self, requests: PagedRequests) -> Any:
        return self._kernels.attention.plan(self.shape, requests)

    def __call__(self, x_te: Tensor, kv_layer: Tensor, step: StepContext) -> Tensor:
        q_thd = self._positioned(self._clipped(self.q(x_te)), self.shape.num_heads, self.q_norm, step)
        if step.growth_t11 is not None:
            q_thd = q_thd * step.growth_t11.to(q_thd.dtype)
        if self.k is not None:
            self._write(self.k, x_te, kv_layer, step)
        found_thd = self._kernels.attention(q_thd, kv_layer, step.plan)
        if self.gate is not None:
            gate_tn = self.gate.wide(x_te)
            opened_tn = 1.0 / (gate_tn.neg().exp() + 1.0) if self.gate_function == "sigmoid" else _softplus(gate_tn)
            found_thd = found_thd * opened_tn.to(found_thd.dtype).view(len(x_te), self.shape.num_heads, -1)
        return self.o(found_thd.view(len(x_te), -1))

    def _write(self, project: Linear, x_te: Tensor, kv_layer: Tensor, step: StepContext) -> None:
        k_tn = self._clipped(project(x_te))
        v_tn = k_tn if self.v is None else self._clipped(self.v(x_te))
        v_tgd = v_tn.view(len(x_te), -1, self.shape.head_dim)
        if self.v_norm is not None:
            v_tgd = self.v_norm(v_tgd)
        k_tgd = self._positioned(k_tn, self.shape.num_kv_heads, self.k_norm, step)
        self._kernels.attention.write(kv_layer, k_tgd, v_tgd, step.slots_t)

    def _clipped(self, x_tn: Tensor) -> Tensor:
        clip = self.transform.clip
        return x_tn if clip is None else x_tn.clamp(-clip, clip)

    def _positioned(self, x_tn: Tensor, heads: int, norm: Norm | None, step: StepContext) -> Tensor:
        """Normalised and rotated, in whichever order; `[t, heads, d]`."""
        if norm is not None and self.transform.whole:
            x_tn = norm(x_tn)
        x_thd = x_tn.view(len(x_tn), heads, -1)
        by_head = norm if not self.transform.whole else None
        if by_head is not None and not self.transform.after_rope:
            x_thd = by_head(x_thd)
        if step.rotation is not None:
            x_thd = self._kernels.rope(x_thd, *step.rotation)
        return by_head(x_thd) if by_head is not None and self.transform.after_rope else x_thd


def _softplus(x: Tensor) -> Tensor:
    """Of parts whose bits do not depend on where an element stands, unlike torch's own."""
    return x.clamp(min=0) + x.abs().neg().exp().log1p()


def step_contexts(
    attentions: Sequence[AttentionBlock], kv_layers: Sequence[int], batch: ForwardBatch, kv: KVCache
) -> list[StepContext]:
    """One per attention, whose keys and values are in the layer of `kv` that `kv_layers` names; layers of one kind and
    group share theirs."""
    plans: dict[tuple[Hashable, int | None, int], Any] = {}
    rotations: dict[int, tuple[Tensor, Tensor]] = {}
    contexts: dict[tuple[Hashable, QueryTransform, int, int], StepContext] = {}
    found = []
    for attention, kv_layer in zip(attentions, kv_layers, strict=True):
        group = kv.group_of_layer[kv_layer]
        key = attention.shape, attention.transform, id(attention.rope), group
        if key not in contexts:
            chunk = attention.transform.chunk
            seen = attention.shape, chunk, group
            if seen not in plans:
                requests = paged_requests(batch, group, kv.block_size)
                visible = requests if chunk is None else cut_into_chunks(requests, chunk)
                plans[seen] = attention.plan(visible)
            if attention.rope is not None and id(attention.rope) not in rotations:
                rotations[id(attention.rope)] = attention.rope.rows(batch.positions_t)
            contexts[key] = StepContext(
                plan=plans[seen],
                rotation=rotations.get(id(attention.rope)),
                slots_t=_table(batch, group).slots_t,
                growth_t11=_growth(attention, batch.positions_t),
            )
        found.append(contexts[key])
    return found


def paged_requests(batch: ForwardBatch, group: int, block_size: int) -> PagedRequests:
    """Where the batch's queries are, and the keys of a group of layers."""
    return PagedRequests(
        query_start=batch.query_start,
        context_lens=batch.context_lens,
        block_table_rb=_table(batch, group).block_table_rb,
        block_size=block_size,
        lengths=batch.lengths,
    )


def _table(batch: ForwardBatch, group: int) -> ForwardBatch | GroupTable:
    return batch.later_groups[group - 1] if group else batch


def cut_into_chunks(requests: PagedRequests, chunk: int) -> PagedRequests:
    """Each request as several, one for each chunk of positions that it has rows in: its table begins with that chunk's
    blocks. What attention computes depends on distances alone, so nothing else changes."""
    assert chunk % requests.block_size == 0
    blocks_of_chunk = chunk // requests.block_size
    query_start, context_lens, tables = [0], [], []
    for request, context in enumerate(requests.context_lens):
        position = context - (requests.query_start[request + 1] - requests.query_start[request])
        while position < context:
            index = position // chunk
            end = min(context, (index + 1) * chunk)
            query_start.append(query_start[-1] + end - position)
            context_lens.append(end - index * chunk)
            first = index * blocks_of_chunk
            tables.append(requests.block_table_rb[request, first : first + blocks_of_chunk])
            position = end
    return PagedRequests(
        query_start=query_start,
        context_lens=context_lens,
        block_table_rb=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
        block_size=requests.block_size,
    )


def _growth(attention: AttentionBlock, positions_t: Tensor) -> Tensor | None:
    if attention.transform.growth is None:
        return None
    beta, period, offset = attention.transform.growth
    return (1 + beta * torch.log1p(((positions_t + offset) // period).float()))[:, None, None]
