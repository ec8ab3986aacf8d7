"""Calls of ops at the shapes of real models, on memory that nobody has filled: for `compile_only`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quire.core.kv_format import kv_block_bytes
from quire.core.sampling import SamplingParams
from quire.ops.attention import AttentionShape, DeviceLengths, PagedRequests
from quire.ops.draw import DrawTable
from quire.ops.kernels import select
from quire.ops.latent_attention import LatentShape
from quire.ops.moe import MoeWeights
from quire.ops.sampling import SamplingRow
from quire.ops.spans import span_of
from quire.ops.target import Target
from quire.ops.triton.blocks import TritonBlocks
from quire.ops.triton.fused import HeadNorms, RotaryTable, TritonFused
from quire.ops.triton.implementations import implementations
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, SplitScales, Weight, split

ROWS = (1, 16, 64, 256, 2048)
"""Decoding alone, among few and among many, and a prefill."""
FUSED = "fused"
"""In the place of an op's name: kernels that are no op's alone."""
_BLOCK_SIZE = 16
_CONTEXT = 2048
_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """`experts` is 0 for a dense model; `intermediate` is then that of its one feed-forward block, else an expert's."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 128
    experts: int = 0
    experts_per_row: int = 0


SHAPES = (
    ModelShape(name="Qwen3-0.6B", hidden=1024, intermediate=3072, heads=16, kv_heads=8, vocab=151936),
    ModelShape(name="Qwen3-8B", hidden=4096, intermediate=12288, heads=32, kv_heads=8, vocab=151936),
    ModelShape(name="Llama-3.1-8B", hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256),
    ModelShape(
        name="Qwen3-30B-A3B",
        hidden=2048,
        intermediate=768,
        heads=32,
        kv_heads=4,
        vocab=151936,
        experts=128,
        experts_per_row=8,
    ),
)


def served_ops(target: Target) -> list[str]:
    """Those of which this module knows a call."""
    return [
        implementation.op
        for implementation in implementations()
        if implementation.op in _CALLS and implementation.unfit(target) is None
    ]


def call(op: str, target: Target, shape: ModelShape, rows: int) -> None:
    """Calls Triton's implementation of `op` as a model of this shape would, with `rows` tokens."""
    if op == FUSED:
        _fused(target, shape, rows)
        return
    build = next(one.build for one in implementations() if one.op == op)
    _CALLS[op](build(target), target, shape, rows)


def _empty(target: Target, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=target.dtype)


def _heads(target: Target, shape: ModelShape, rows: int) -> Tensor:
    """Queries, as a view of a product that has keys and values too."""
    joint = _empty(target, rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    return joint[:, : shape.heads]


def _rms_norm(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    kernel(_empty(target, rows, shape.hidden), _empty(target, shape.hidden), _EPS, 0.0)
    kernel(_heads(target, shape, rows), _empty(target, shape.head_dim), _EPS, 0.0)


def _add_rms_norm(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    x = _empty(target, rows, shape.hidden)
    kernel(x, torch.empty_like(x), _empty(target, shape.hidden), _EPS, 0.0)


def _layer_norm(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    kernel(_empty(target, rows, shape.hidden), _empty(target, shape.hidden), _empty(target, shape.hidden), _EPS)


def _add_layer_norm(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    x = _empty(target, rows, shape.hidden)
    kernel(x, torch.empty_like(x), _empty(target, shape.hidden), _empty(target, shape.hidden), _EPS)


def _embedding(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    kernel(torch.zeros(rows, dtype=torch.int64), _empty(target, shape.vocab, shape.hidden))


def _activation(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    kernel(_empty(target, rows, shape.intermediate), "gelu")


def _gated_activation(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    gate, up = _empty(target, rows, 2 * shape.intermediate).chunk(2, dim=-1)
    kernel(gate, up, "silu")


def _rope(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    cos_tr, sin_tr = torch.empty(2, rows, shape.head_dim // 2)
    kernel(_heads(target, shape, rows), cos_tr, sin_tr)


def _fused(target: Target, shape: ModelShape, rows: int) -> None:
    """What is no op of its own: with norms and without, into caches of 16 and of 8 bits."""
    joint = _empty(target, rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    q_thd, k_tgd, v_tgd = torch.split(joint, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    weight = _empty(target, shape.head_dim)
    cos_pr, sin_pr = torch.empty(2, _CONTEXT, shape.head_dim // 2)
    for kv_dtype in ("auto", "fp8"):
        into = Target("cpu", target.dtype, isa=target.isa, launch=target.launch, kv_cache_dtype=kv_dtype)
        fused = TritonFused(into)
        block_bytes = kv_block_bytes(into.kv_dtype, block_size=_BLOCK_SIZE, head_dim=shape.head_dim)
        for norms in (HeadNorms(q_weight=weight, k_weight=weight, eps=_EPS), None):
            fused.qkv(
                q_thd,
                k_tgd,
                v_tgd,
                norms=norms,
                rotary=RotaryTable(cos_pr=cos_pr, sin_pr=sin_pr),
                positions_t=torch.zeros(rows, dtype=torch.int64),
                slots_t=torch.zeros(rows, dtype=torch.int64),
                kv_layer=torch.empty(2, shape.kv_heads, 8, block_bytes, dtype=torch.uint8),
            )
    blocks = torch.empty(2, 2, shape.kv_heads, 4, block_bytes, dtype=torch.uint8)
    TritonBlocks(target).copy(blocks, blocks, torch.zeros(1, 2, dtype=torch.int64))
    fused.silu_mul(_empty(target, rows, 2 * shape.intermediate))


def _draw(kernel: Any, _target: Target, shape: ModelShape, rows: int) -> None:
    rows = min(rows, 256)
    table = DrawTable.greedy(rows, torch.device("cpu"))
    kernel(torch.empty(rows, shape.vocab), table, torch.zeros(rows, dtype=torch.int64))


def _sample(kernel: Any, _target: Target, shape: ModelShape, rows: int) -> None:
    """With changes to the logits, which `draw` has none of."""
    sampling = SamplingParams(temperature=0.0, logit_bias={0: 1.0})
    row = SamplingRow(sampling=sampling, position=1, token_ids=[0], num_prompt_tokens=1, eos_token_ids=[])
    kernel(torch.empty(min(rows, 256), shape.vocab), [row] * min(rows, 256))


def _linear(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    """All products of a layer, and the logits of the rows that are sampled."""
    _products(kernel, target, shape, rows, lambda n, k: _empty(target, n, k))
    vocabulary = kernel.pack(_empty(target, shape.vocab, shape.hidden))
    kernel.wide(_empty(target, min(rows, 256), shape.hidden), vocabulary, None)


def _linear_fp8_rows(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    _products(kernel, target, shape, rows, _fp8_weight)


def _products(kernel: Any, target: Target, shape: ModelShape, rows: int, weight: Callable[[int, int], Weight]) -> None:
    """Of a layer, those over the same rows in one launch. `weight`: of (outputs, inputs)."""
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    products: list[tuple[int, tuple[int, ...]]] = [
        (shape.hidden, (heads, kv_heads, kv_heads)),
        (heads, (shape.hidden,)),
    ]
    if not shape.experts:
        products += [(shape.hidden, (shape.intermediate,) * 2), (shape.intermediate, (shape.hidden,))]
    for k, sizes in products:
        weights = [kernel.pack(weight(n, k)) for n in sizes]
        kernel.group(_empty(target, rows, k), weights, [None] * len(sizes))


def _fp8_weight(n: int, k: int) -> Fp8Weight:
    return Fp8Weight(values_nk=torch.empty(n, k, dtype=torch.float8_e4m3fn), scale_n=torch.empty(n), rounds_rows=True)


def _int8(n: int, k: int) -> list[Weight]:
    return [Int8Weight(values_nk=torch.empty(n, k, dtype=torch.int8), scale_n=torch.empty(n))]


def _fp8(n: int, k: int) -> list[Weight]:
    return [Fp8Weight(values_nk=torch.empty(n, k, dtype=torch.float8_e4m3fn), scale_n=torch.empty(n))]


def _int4(n: int, k: int) -> list[Weight]:
    """With zero points, and with scales that several groups share."""
    size = 32
    nibbles_nk2, scale_ng = torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // size)
    zeros = Int4Weight(
        nibbles_nk2=nibbles_nk2,
        scale_ng=scale_ng,
        zero_ng=torch.empty(n, k // size, dtype=torch.uint8),
        group_size=size,
    )
    span = span_of(k, size)
    scales = SplitScales(
        step_ns=torch.empty(n, k // span), multiplier_ng=torch.empty(n, k // size, dtype=torch.int8), span=span
    )
    return [zeros, replace(zeros, zero_ng=None, split_scales=scales)]


def _quantized(weights: Callable[[int, int], list[Weight]]) -> Callable[[Any, Target, ModelShape, int], None]:
    """What reads the hidden state, and what makes it again: narrow weights are cut in k, wide ones are not."""

    def run(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
        for n, k in ((shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
            for weight in weights(n, k):
                kernel(_empty(target, rows, k), kernel.pack(weight), None)

    return run


def _attention(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    """Where `rows` decode, and where they are one request's prefill."""
    attention = AttentionShape(
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
    )
    blocks = -(-_CONTEXT // _BLOCK_SIZE)
    block_bytes = kernel.block_bytes(_BLOCK_SIZE, shape.head_dim)
    kv_layer = torch.empty(2, shape.kv_heads, blocks, block_bytes, dtype=torch.uint8)
    k_tgd, v_tgd = _empty(target, 2, rows, shape.kv_heads, shape.head_dim)
    kernel.write(kv_layer, k_tgd, v_tgd, torch.zeros(rows, dtype=torch.int64))
    for query_lens in ([1] * rows, [rows]):
        requests = _requests(query_lens, blocks)
        kernel(_heads(target, shape, rows), kv_layer, kernel.plan(attention, requests))


def _latent_attention(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    """As many heads, with DeepSeek's latents."""
    latent = LatentShape(num_heads=shape.heads, latent_dim=512, rope_dim=64, scale=0.1)
    blocks = -(-_CONTEXT // _BLOCK_SIZE)
    cache = torch.empty(blocks, kernel.block_bytes(_BLOCK_SIZE, latent), dtype=torch.uint8)
    kernel.write(cache, _empty(target, rows, 512), _empty(target, rows, 64), torch.zeros(rows, dtype=torch.int64))
    for query_lens in ([1] * rows, [rows]):
        requests = _requests(query_lens, blocks)
        kernel(_empty(target, rows, shape.heads, latent.width), cache, kernel.plan(latent, requests))


def _requests(query_lens: list[int], blocks: int) -> PagedRequests:
    start = torch.tensor([0, *query_lens]).cumsum(0)
    contexts = [_CONTEXT] * len(query_lens)
    return PagedRequests(
        query_start=start.tolist(),
        context_lens=contexts,
        block_table_rb=torch.zeros(len(query_lens), blocks, dtype=torch.int64),
        block_size=_BLOCK_SIZE,
        lengths=DeviceLengths(
            query_start=start.int(),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            chunks=0 if max(query_lens) == 1 else 1,
        ),
    )


def _moe(kernel: Any, target: Target, shape: ModelShape, rows: int) -> None:
    if not shape.experts:
        return
    linear, int4 = select(target).linear, select(target).linear_int4
    router = linear.pack(_empty(target, shape.experts, shape.hidden))

    def plain(n: int, k: int) -> list[Any]:
        return [linear.pack(weight) for weight in _empty(target, shape.experts, n, k)]

    def in_4_bits(n: int, k: int) -> list[Any]:
        return [int4.pack(_int4_weight(n, k))] * shape.experts

    def in_8_bits(n: int, k: int) -> list[Any]:
        return [linear.pack(_fp8_weight(n, k))] * shape.experts

    for experts in (plain, in_4_bits, in_8_bits):
        weights = MoeWeights(
            router=router,
            gate=experts(shape.intermediate, shape.hidden),
            up=experts(shape.intermediate, shape.hidden),
            down=experts(shape.hidden, shape.intermediate),
            top_k=shape.experts_per_row,
            renormalize=True,
        )
        kernel(_empty(target, rows, shape.hidden), kernel.join(weights))


def _int4_weight(n: int, k: int) -> Int4Weight:
    """As quire makes them: groups of 32, whose scales are multiples of a step."""
    nibbles, scales = torch.zeros(n, k // 2, dtype=torch.uint8), torch.ones(n, k // 32)
    return split(Int4Weight(nibbles_nk2=nibbles, scale_ng=scales, zero_ng=None, group_size=32))


_CALLS = {
    "activation": _activation,
    "add_layer_norm": _add_layer_norm,
    "add_rms_norm": _add_rms_norm,
    "attention": _attention,
    "draw": _draw,
    "embedding": _embedding,
    "gated_activation": _gated_activation,
    "latent_attention": _latent_attention,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "linear_fp8": _quantized(_fp8),
    "linear_fp8_rows": _linear_fp8_rows,
    "linear_int4": _quantized(_int4),
    "linear_int8": _quantized(_int8),
    "moe": _moe,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "sample": _sample,
}
"""From (built kernel, target, shape, rows)."""
