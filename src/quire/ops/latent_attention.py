"""`latent_attention`: causal attention over a paged cache of latents (DeepSeek-V2, 2024), which are not expanded.

Legend: t tokens of the step, r requests, h query heads, c numbers of a latent, p rotated numbers of a key, d = c + p,
n blocks, s tokens per block, b bytes of a block, x tokens of a context.

A token leaves one row in a layer's cache: its latent, which all heads share, and the rotated part of its key. The
latent is key and value at once: queries come in the latents' space, and so do results. Bringing them there and back is
two products per head, which are linear layers of their own.

An implementation owns the cache's inner layout, as with `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quire.ops.attention import PagedRequests, random_requests
from quire.ops.latent_index import IndexShape, choose_by
from quire.ops.op import Inputs, Op, Tolerance, random_int, random_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """What does not change while an engine runs. `scale` multiplies the scores. `index`: of the `latent_index` that
    chooses what a token sees, where there is one."""

    num_heads: int
    latent_dim: int
    rope_dim: int
    scale: float
    index: IndexShape | None = None

    @property
    def width(self) -> int:
        """Of a query, and of a token's row in the cache."""
        return self.latent_dim + self.rope_dim


class LatentAttentionKernel(Protocol):
    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens per block that it can work with."""
        ...

    def reads_lengths(self, shape: LatentShape) -> bool:
        """Whether `plan` goes by `PagedRequests.lengths` where there are any."""
        ...

    def block_bytes(self, block_size: int, shape: LatentShape) -> int:
        """What a layer's rows take in one block. A layer's cache is `[n, block_bytes]` bytes, zeros at first."""
        ...

    def write(self, cache_nb: Tensor, latent_tc: Tensor, key_tp: Tensor, slots_t: Tensor) -> None:
        """Stores new tokens in place, as `AttentionKernel.write` does. A latent that is not finite is stored as zeros,
        and its key as NaN: its own request's scores are spoiled, and nobody's who gets the block later."""
        ...

    def plan(self, shape: LatentShape, requests: PagedRequests) -> Any: ...

    def __call__(self, q_thd: Tensor, cache_nb: Tensor, plan: Any, chosen_tk: Tensor | None = None) -> Tensor:
        """`[t, h, c]` in the dtype of `q_thd`. The step's own tokens are in the cache already. `chosen_tk`: the only
        positions that each row sees, as `latent_index` gives them."""
        ...


def latent_attention(
    q_thd: Tensor, rows_nsd: Tensor, shape: LatentShape, requests: PagedRequests, chosen_tk: Tensor | None = None
) -> Tensor:
    """Request by request, in float64, with the whole score matrix at once; the cache in a plain layout."""
    out_thc = q_thd.new_empty(*q_thd.shape[:2], shape.latent_dim)
    for request, context in enumerate(requests.context_lens):
        rows = slice(requests.query_start[request], requests.query_start[request + 1])
        blocks = requests.block_table_rb[request, : -(-context // requests.block_size)]
        rows_xd = rows_nsd.index_select(0, blocks).flatten(0, 1)[:context].double()
        q_hqd = q_thd[rows].double().transpose(0, 1)
        scores_hqx = q_hqd @ rows_xd.T * shape.scale
        hidden_qx = torch.arange(context) > torch.arange(context - q_hqd.shape[1], context)[:, None]
        if chosen_tk is not None:
            hidden_qx |= (chosen_tk[rows, :, None] != torch.arange(context)).all(1)
        weights_hqx = scores_hqx.masked_fill(hidden_qx, float("-inf")).softmax(-1)
        out_thc[rows] = (weights_hqx @ rows_xd[:, : shape.latent_dim]).transpose(0, 1).to(q_thd.dtype)
    return out_thc


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """At least `rows` tokens: some requests decode, some prefill, in shuffled blocks."""
    shape = LatentShape(
        num_heads=random_int(1, 20, generator),
        latent_dim=random_int(1, 96, generator),
        rope_dim=2 * random_int(1, 24, generator),
        scale=random_int(1, 8, generator) / 24,
    )
    requests = random_requests(rows, generator)
    num_blocks = int(requests.block_table_rb.max()) + 1
    chosen_tk = None
    if random_int(0, 1, generator):
        scores_ty = torch.rand(requests.query_start[-1], max(requests.context_lens), generator=generator)
        chosen_tk = choose_by(scores_ty, requests, random_int(1, 300, generator))
    size = (num_blocks, requests.block_size, shape.width)
    return {
        "q_thd": random_tensor(
            requests.query_start[-1], shape.num_heads, shape.width, dtype=dtype, generator=generator, scale=0.5
        ),
        "rows_nsd": random_tensor(*size, dtype=dtype, generator=generator),
        "shape": shape,
        "requests": requests,
        "chosen_tk": chosen_tk,
    }


LATENT_ATTENTION = Op(
    name="latent_attention",
    definition=latent_attention,
    inputs=_inputs,
    tolerances={
        torch.float32: Tolerance(relative=1e-4, absolute=1e-5),
        torch.bfloat16: Tolerance(relative=1e-2, absolute=1e-2),
        torch.float16: Tolerance(relative=2e-3, absolute=2e-3),
    },
)
