"""`attention`: attention of a step's tokens over the paged KV cache.

Legend: t tokens of the step, r requests, h query heads, g KV heads, d head dim, n blocks, s tokens per block, b blocks
of the longest request, c tokens of a context, f the farthest distance that has a bias of its own.

An implementation owns the cache's inner layout: it says how many bytes a block takes, writes keys and values, and
attends over them. `plan` is called once per step, with what all layers of one shape share, and the call itself once per
layer. What the plan holds is the implementation's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, Tolerance, random_int, random_tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class DistanceBias:
    """Is added to scores: `table_hf` `[h, 2f + 1]`, in float32, for distances (key's position - query's) of -f to f;
    what is farther away has the bias of the farthest. Known by identity, so that it can be part of a key."""

    table_hf: Tensor

    @property
    def farthest(self) -> int:
        return self.table_hf.shape[1] // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What does not change while an engine runs. `scale` multiplies the scores.

    * `causal`: a token sees those up to itself; otherwise all of its request's context, what comes later included.
    * `window`: a token sees this many tokens, itself included; if not `causal`, so many to either side.
    * `softcap`: a scaled score x becomes softcap * tanh(x / softcap).
    * `slopes`, one per query head (ALiBi): slope * -|key's position - query's position| is added after that, and so
      is `distance_bias`.
    * `sinks`, one per query head: a score that takes its share of the weight and has no value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    distance_bias: DistanceBias | None = None
    sinks: tuple[float, ...] | None = None


class DeviceLengths(msgspec.Struct, frozen=True, kw_only=True):
    """`query_start` `[r + 1]` and `context_lens` `[r]` on the device, int32. A captured step reads these: what the host
    has beside them is then an upper bound (as many requests and rows, contexts as long at most). `chunks`: how many of
    the requests may have other than one row; 0: each has one at most. What rows of a context of 0 find is finite, and
    nobody's."""

    query_start: Tensor
    context_lens: Tensor
    chunks: int = 0


class PagedRequests(msgspec.Struct, frozen=True, kw_only=True):
    """Where a step's queries and keys are; the first three as in `ForwardBatch`. Row j of request i is at position
    `context_lens[i] - query_len[i] + j`, and sees all up to it, or the whole context. `lengths`: None where the host's
    numbers are all there is."""

    query_start: Sequence[int]
    context_lens: Sequence[int]
    block_table_rb: Tensor
    block_size: int
    lengths: DeviceLengths | None = None


class AttentionKernel(Protocol):
    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens per KV block that it can work with."""
        ...

    @property
    def reads_lengths(self) -> bool:
        """Whether `plan` goes by `PagedRequests.lengths` where there are any."""
        ...

    def block_bytes(self, block_size: int, head_dim: int) -> int:
        """What one head's keys, or its values, take in one block. A layer's cache is `[2, g, n, block_bytes]` bytes,
        zeros at first."""
        ...

    def write(self, kv_layer: Tensor, k_tgd: Tensor, v_tgd: Tensor, slots_t: Tensor) -> None:
        """Stores new tokens in place: slot `block * s + offset` of each. Nobody reads block 0; its slots may repeat.

        A value that is not finite is stored as zero. Attention multiplies what lies in a block's unused slots by a
        weight of zero, and zero times NaN is NaN: a request whose values overflowed would reach the block's next owner.
        """
        ...

    def plan(self, shape: AttentionShape, requests: PagedRequests) -> Any: ...

    def __call__(self, q_thd: Tensor, kv_layer: Tensor, plan: Any) -> Tensor:
        """`[t, h, d]` in the dtype of `q_thd`. Keys and values of the step's own tokens are in the cache already."""
        ...


def attention(q_thd: Tensor, kv_2gnsd: Tensor, shape: AttentionShape, requests: PagedRequests) -> Tensor:
    """Request by request, in float64, with the whole score matrix at once; keys and values in a plain layout."""
    out_thd = torch.empty_like(q_thd)
    group = shape.num_heads // shape.num_kv_heads
    for request, context in enumerate(requests.context_lens):
        rows = slice(requests.query_start[request], requests.query_start[request + 1])
        blocks = requests.block_table_rb[request, : -(-context // requests.block_size)]
        kv_2gcd = kv_2gnsd.index_select(2, blocks).flatten(2, 3)[:, :, :context].double()
        k_hcd, v_hcd = kv_2gcd.repeat_interleave(group, dim=1)
        q_hqd = q_thd[rows].double().transpose(0, 1)
        scores_hqc = q_hqd @ k_hcd.transpose(1, 2) * shape.scale
        distance_qc = torch.arange(context) - torch.arange(context - q_hqd.shape[1], context)[:, None]
        if shape.softcap is not None:
            scores_hqc = shape.softcap * (scores_hqc / shape.softcap).tanh()
        if shape.slopes is not None:
            scores_hqc = scores_hqc - _per_head(shape.slopes) * distance_qc.abs()
        if shape.distance_bias is not None:
            farthest = shape.distance_bias.farthest
            scores_hqc = scores_hqc + shape.distance_bias.table_hf[:, distance_qc.clamp(-farthest, farthest) + farthest]
        hidden_qc = (distance_qc > 0) & shape.causal
        if shape.window is not None:
            hidden_qc |= distance_qc.abs() >= shape.window
        scores_hqc = scores_hqc.masked_fill(hidden_qc, float("-inf"))
        if shape.sinks is not None:
            sinks_hq1 = _per_head(shape.sinks).expand(-1, q_hqd.shape[1], 1)
            scores_hqc = torch.cat([scores_hqc, sinks_hq1], dim=-1)
        weights_hqc = scores_hqc.softmax(-1)[..., :context]
        out_thd[rows] = (weights_hqc @ v_hcd).transpose(0, 1).to(q_thd.dtype)
    return out_thd


def _per_head(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """At least `rows` tokens: some requests decode, some prefill, in shuffled blocks."""
    group, kv_heads = random_int(1, 8, generator), random_int(1, 3, generator)
    head_dim, requests = random_int(1, 96, generator), random_requests(rows, generator)
    num_blocks = int(requests.block_table_rb.max()) + 1
    return {
        "q_thd": random_tensor(requests.query_start[-1], group * kv_heads, head_dim, dtype=dtype, generator=generator),
        "kv_2gnsd": random_tensor(
            2, kv_heads, num_blocks, requests.block_size, head_dim, dtype=dtype, generator=generator
        ),
        "shape": AttentionShape(
            num_heads=group * kv_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            causal=random_int(0, 3, generator) > 0,
            window=_sometimes(generator, lambda: random_int(1, 300, generator)),
            softcap=_sometimes(generator, lambda: random_int(1, 20, generator) / 4),
            slopes=_sometimes(generator, lambda: _random_floats(group * kv_heads, 0.1, generator)),
            distance_bias=_sometimes(generator, lambda: _random_bias(group * kv_heads, generator)),
            sinks=_sometimes(generator, lambda: _random_floats(group * kv_heads, 2.0, generator)),
        ),
        "requests": requests,
    }


def random_requests(rows: int, generator: torch.Generator) -> PagedRequests:
    """A prefill of `rows` tokens after some that decode, in shuffled blocks."""
    block_size = 1 << random_int(3, 7, generator)
    query_lens = [1] * random_int(0, 4, generator) + [rows]
    context_lens = [length + random_int(0, 700, generator) for length in query_lens]
    blocks_of = [-(-length // block_size) for length in context_lens]
    order = (torch.randperm(sum(blocks_of), generator=generator) + 1).tolist()
    table = torch.zeros(len(context_lens), max(blocks_of), dtype=torch.int64)
    for request, count in enumerate(blocks_of):
        table[request, :count] = torch.tensor([order.pop() for _ in range(count)])
    return PagedRequests(
        query_start=tuple(torch.tensor([0, *query_lens]).cumsum(0).tolist()),
        context_lens=tuple(context_lens),
        block_table_rb=table,
        block_size=block_size,
    )


def _sometimes(generator: torch.Generator, make: Callable[[], T]) -> T | None:
    return make() if random_int(0, 3, generator) == 0 else None


def _random_floats(count: int, scale: float, generator: torch.Generator) -> tuple[float, ...]:
    return tuple(random_tensor(count, dtype=torch.float32, generator=generator, scale=scale).tolist())


def _random_bias(heads: int, generator: torch.Generator) -> DistanceBias:
    width = 2 * random_int(0, 200, generator) + 1
    return DistanceBias(random_tensor(heads, width, dtype=torch.float32, generator=generator))


ATTENTION = Op(
    name="attention",
    definition=attention,
    inputs=_inputs,
    tolerances={
        torch.float32: Tolerance(relative=1e-4, absolute=1e-5),
        torch.bfloat16: Tolerance(relative=1e-2, absolute=1e-2),
        torch.float16: Tolerance(relative=2e-3, absolute=2e-3),
    },
)
