"""How a step's queries and keys are cut into programs' work: on the host, or by a kernel from lengths on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.triton.kernels.attention import plan_kernel
from quire.ops.triton.kernels.mixed_plan import mixed_plan_kernel
from quire.ops.triton.launch import Launch

SPLIT = 256
"""Tokens of a context that one program takes when a row decodes. Few, so that one request of a thousand tokens keeps
many multiprocessors busy; not fewer, as each split's sums go through memory (a thirtieth of the keys' and values' bytes
for four query heads of a KV head)."""


MOST_ITEMS = 2048
"""Splits of a step whose sums are kept apart. With more of them there is work enough for every multiprocessor if each
program takes a whole context: the workspace does not grow with contexts times requests."""

MOST_BYTES = 128 * 2**20
"""Of those sums: wide results have fewer splits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Block sizes for one head shape and cache. `keys` is in the order of sums, so it depends on nothing else."""

    padded_dim: int
    keys: int
    decode_rows: int
    decode_warps: int
    prefill_rows: int
    prefill_warps: int
    num_stages: int

    @staticmethod
    def of(group: int, head_dim: int, multiplied: torch.dtype, *, quantized: bool = False) -> Tiling:
        """`group`: query heads of one KV head. Two tiles of sums and one of scores live in registers, and keys and
        values of 8 bits on their way, of which fewer fit; others in shared memory.

        Triton parts the stages between loads of block numbers and those of keys and values, which need them: of five,
        two tiles are under way; of three, one, which is waited for when the one before it is done.
        """
        padded = max(16, 1 << (head_dim - 1).bit_length())
        heads = max(16, 1 << (group - 1).bit_length())
        wide = multiplied == torch.float32
        # Tensor cores want 64 rows or more of a warp group. Without them (float32) registers hold fewer.
        rows = 16 if wide else 128 if padded <= 128 else 64
        return Tiling(
            padded_dim=padded,
            keys=32 if wide or quantized or padded > 128 else 64,
            decode_rows=heads,
            decode_warps=_decode_warps(heads, padded),
            prefill_rows=max(rows, heads),
            prefill_warps=4 if wide and padded <= 64 else 8,
            num_stages=2 if wide or (quantized and padded > 128) else 5,
        )

    def within(self, shared_bytes: int, itemsize: int) -> Tiling:
        """As many stages as there is shared memory for: what does not fit there is kept in registers, and spilled."""
        stage = 2 * self.keys * self.padded_dim * itemsize
        return replace(self, num_stages=max(2, min(self.num_stages, shared_bytes // stage)))

    def with_decode_rows(self, rows: int) -> Tiling:
        rows = max(rows, self.decode_rows)
        return replace(self, decode_rows=rows, decode_warps=_decode_warps(rows, self.padded_dim))


def _decode_warps(rows: int, padded_dim: int) -> int:
    """So many that their registers hold two tiles of sums."""
    return 4 if rows <= 64 and rows * padded_dim <= 64 * 64 else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """`numbers` as `plan_kernel` has them, and room for `most_items` splits' softmax, which layers use in turn."""

    requests: int
    most_items: int
    numbers: Tensor
    partial: Tensor
    tops: Tensor
    totals: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonPlan:
    """`decodes`: rows that `work` gives. `tiles` `[tiles, 5]`: see `prefill_kernel`."""

    shape: AttentionShape
    tiling: Tiling
    block_size: int
    block_table_rb: Tensor
    decodes: int
    work: DecodeWork | None
    tiles: Tensor | None


def plan_attention(shape: AttentionShape, requests: PagedRequests, tiling: Tiling, launch: Launch) -> TritonPlan:
    if requests.lengths is not None:
        return _planned_on_device(shape, requests, tiling, launch)
    return _planned_on_host(shape, requests, tiling)


def _planned_on_device(shape: AttentionShape, requests: PagedRequests, tiling: Tiling, launch: Launch) -> TritonPlan:
    """Each request decodes, but for as many as `lengths.chunks`. A window bounds what a request may take whatever its
    length."""
    lengths = requests.lengths
    assert lengths is not None
    r, rows = len(requests.context_lens), requests.query_start[-1]
    most_of = np.asarray(requests.context_lens, dtype=np.int64)
    counts = -(-most_of // SPLIT)
    if shape.window is not None:
        counts = np.minimum(counts, -(-shape.window // SPLIT) + 1)
    most_items = min(int(counts.sum()), max(r, _most_apart(shape, tiling)))
    tokens = _tile_tokens(shape, tiling)
    most_tiles = rows // tokens + lengths.chunks if lengths.chunks else 0
    device = requests.block_table_rb.device
    together = torch.empty(4 * r + 2 + 2 * most_items + 5 * most_tiles, dtype=torch.int32, device=device)
    numbers, tiles = torch.split(together, [4 * r + 2 + 2 * most_items, 5 * most_tiles])
    told = (lengths.query_start, lengths.context_lens, numbers)
    padded = max(16, 1 << (r - 1).bit_length()) if r else 0
    window = shape.window or 0
    constants = {"SPLIT": SPLIT, "WINDOW": shape.window is not None, "REQUESTS": padded}
    if lengths.chunks:
        assert shape.causal, "without lengths on the host a token sees those before it"
        launch(mixed_plan_kernel, (r,), *told, tiles, window, r, most_items, most_tiles, TOKENS=tokens, **constants)
    elif r:
        assert rows <= r, "without chunks each request has one row at most"
        launch(plan_kernel, (r,), *told, window, r, most_items, **constants)
    return TritonPlan(
        shape=shape,
        tiling=tiling,
        block_size=requests.block_size,
        block_table_rb=requests.block_table_rb,
        decodes=r if lengths.chunks else rows,
        work=_work(shape, tiling, r, most_items, numbers),
        tiles=tiles.view(-1, 5) if most_tiles else None,
    )


def _planned_on_host(shape: AttentionShape, requests: PagedRequests, tiling: Tiling) -> TritonPlan:
    """One copy to the device."""
    starts = np.asarray(requests.query_start, dtype=np.int64)
    contexts = np.asarray(requests.context_lens, dtype=np.int64)
    r = len(contexts)
    query_lens = np.diff(starts)
    decodes = np.flatnonzero(query_lens == 1)
    counts = np.zeros(r, np.int64)
    firsts = np.zeros(r, np.int64)
    if shape.window is not None:
        firsts = np.maximum(contexts - shape.window, 0) // SPLIT
    counts[decodes] = (-(-contexts // SPLIT) - firsts)[decodes]
    is_whole = counts.sum() > max(len(decodes), _most_apart(shape, tiling))
    if is_whole:
        counts[decodes] = 1
    item_start = np.concatenate([[0], counts.cumsum()])
    most_items = int(item_start[-1])
    owner = np.repeat(np.arange(r), counts)
    splits = np.arange(most_items) - item_start[owner] + firsts[owner]
    served = np.full(r, -1)
    served[: len(decodes)] = decodes
    tiles = _tiles(shape, tiling, starts, contexts, np.flatnonzero(query_lens > 1))
    items = np.stack([owner, splits], axis=1).ravel()
    work = np.concatenate([starts[:-1], contexts, served, item_start, items, [is_whole]])
    device = requests.block_table_rb.device
    together = torch.from_numpy(np.concatenate([work, tiles.ravel()]).astype(np.int32))
    if device.type != "cpu":
        together = together.pin_memory().to(device, non_blocking=True)
    return TritonPlan(
        shape=shape,
        tiling=tiling,
        block_size=requests.block_size,
        block_table_rb=requests.block_table_rb,
        decodes=len(decodes),
        work=_work(shape, tiling, r, most_items, together[: len(work)]) if len(decodes) else None,
        tiles=together[len(work) :].view(-1, 5) if len(tiles) else None,
    )


def _tiles(
    shape: AttentionShape, tiling: Tiling, starts: np.ndarray, contexts: np.ndarray, prefills: np.ndarray
) -> np.ndarray:
    """`[tiles, 5]`. Late tiles of a chunk see the most keys and start first."""
    tokens = _tile_tokens(shape, tiling)
    parts = [np.zeros((0, 5), np.int64)]
    for request in prefills.tolist():
        length = int(starts[request + 1] - starts[request])
        first = np.arange(0, length, tokens)[::-1]
        part = np.empty((len(first), 5), np.int64)
        part[:, 0] = request
        part[:, 1] = starts[request] + first
        part[:, 2] = np.minimum(tokens, length - first)
        part[:, 3] = contexts[request] - length + first
        part[:, 4] = contexts[request]
        parts.append(part)
    return np.concatenate(parts)


def _most_apart(shape: AttentionShape, tiling: Tiling) -> int:
    """Splits whose sums are kept apart."""
    return min(MOST_ITEMS, MOST_BYTES // (4 * shape.num_heads * (tiling.padded_dim + 2)))


def _tile_tokens(shape: AttentionShape, tiling: Tiling) -> int:
    """Of a prompt, with all query heads of a KV head."""
    return tiling.prefill_rows // (shape.num_heads // shape.num_kv_heads)


def _work(shape: AttentionShape, tiling: Tiling, r: int, most_items: int, numbers: Tensor) -> DecodeWork:
    rows = most_items * shape.num_heads
    space = torch.empty(rows * (tiling.padded_dim + 2), dtype=torch.float32, device=numbers.device)
    partial, tops, totals = torch.split(space, [rows * tiling.padded_dim, rows, rows])
    return DecodeWork(requests=r, most_items=most_items, numbers=numbers, partial=partial, tops=tops, totals=totals)
