"""From logits to tokens by Triton: how `kernels/sampling.py` is launched, and the memory that it works in.

Two passes over all logits serve rows that are greedy or only have a temperature; two more, over the chunks that have
such tokens, list what truncation may leave. All of them are made by many programs per row, in parts of a row that
may depend on how many rows there are: a part's results are per chunk, block or bucket, so no sum sees the parts.
Between and after them one program per row adds up what has to be added one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.ops.draw import DrawTable
from quire.ops.target import Target
from quire.ops.triton.kernels import sampling as kernels
from quire.ops.triton.kernels.weights import BLOCK, BUCKETS
from quire.ops.triton.launch import Launch

_CHUNK = 2048
"""Logits that a program takes at once: four 16-byte loads for each thread of four warps."""
PROGRAMS = 1024
"""About as many as a large GPU runs at once, of four warps: more only cost starting them."""
_TILE = 2048
_MOST_VOCAB = 1 << 22
"""More tokens than a bucket could count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Of up to so many rows of one vocabulary: c chunks of it, b blocks, k buckets. See the kernels.

    `ids_sv` is as large as the logits.
    """

    chunk_max_sc: Tensor
    chunk_id_sc: Tensor
    number_sc: Tensor
    sums_sb: Tensor
    hist_sk: Tensor
    shares_sk: Tensor
    inner_sb: Tensor
    limit_s: Tensor
    edge_s: Tensor
    before_s: Tensor
    goal_s: Tensor
    ids_sv: Tensor

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device) -> Workspace:
        def full(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        chunks, buckets, block = _ceil_div(vocab, _CHUNK), BUCKETS.value, BLOCK.value
        return cls(
            chunk_max_sc=full(chunks, dtype=torch.float32),
            chunk_id_sc=full(chunks, dtype=torch.int32),
            number_sc=full(chunks, dtype=torch.int32),
            sums_sb=full(chunks * _CHUNK // block, dtype=torch.float64),
            hist_sk=full(buckets, dtype=torch.int64),
            shares_sk=full(buckets, dtype=torch.float64),
            inner_sb=full(block, dtype=torch.float64),
            limit_s=full(dtype=torch.int32),
            edge_s=full(dtype=torch.int32),
            before_s=full(dtype=torch.float64),
            goal_s=full(dtype=torch.float64),
            ids_sv=full(vocab, dtype=torch.int32),
        )


class Drawing:
    """Of one engine, in one stream: calls share their memory.

    A call allocates nothing but its result once there has been one as large, over the same vocabulary. What was
    allocated is never given back, because graphs that were captured have its addresses; who captures several begins
    with the largest.
    """

    def __init__(self, target: Target, programs: int = PROGRAMS) -> None:
        self._launch: Launch = target.launch
        self._programs = programs
        self._workspaces: dict[int, list[Workspace]] = {}

    def draw(self, logits_sv: Tensor, table: DrawTable, position_s: Tensor) -> Tensor:
        """The op `draw`. What is launched depends on the shape of the logits alone."""
        return self.choose(logits_sv, table, position_s, draws=True, truncates=True)

    def choose(
        self, logits_sv: Tensor, table: DrawTable, position_s: Tensor, *, draws: bool, truncates: bool
    ) -> Tensor:
        """The same for a caller who knows whether any row is not greedy, and whether any is truncated."""
        rows, vocab = logits_sv.shape
        out_s = torch.empty(rows, dtype=torch.int64, device=logits_sv.device)
        if not rows:
            return out_s
        logits_sv = dense(logits_sv)
        work = self._workspace(rows, vocab, logits_sv.device)
        row = (logits_sv, logits_sv.stride(0), vocab)
        params = (table.temperature, table.min_p, table.top_k, table.top_p, table.seed, position_s)
        chunks, blocks = work.chunk_max_sc.shape[1], work.sums_sb.shape[1]
        best = (work.chunk_max_sc, work.chunk_id_sc)
        widths = {"CHUNKS": _power_of_two(chunks)}
        cut = (work.limit_s, work.edge_s, work.before_s, work.goal_s)
        memory = (work.sums_sb, work.hist_sk, work.shares_sk, work.inner_sb, *cut)
        self._best(logits_sv, work)
        if draws:
            self._weigh(logits_sv, table, work)
        self._launch(
            kernels.start_kernel, (rows,), *row, *params, *best, *memory, out_s, chunks, blocks, **widths, TILE=_TILE
        )
        if truncates:
            for counts in (True, False):
                self._launch(
                    kernels.list_kernel,
                    (rows, self._parts(rows, chunks)),
                    *row,
                    table.temperature,
                    *best,
                    work.limit_s,
                    work.number_sc,
                    work.ids_sv,
                    chunks,
                    CHUNK=_CHUNK,
                    COUNTS=counts,
                    **widths,
                )
            listed = (work.number_sc, work.ids_sv, out_s, chunks, blocks)
            self._launch(
                kernels.finish_kernel,
                (rows,),
                *row,
                *params,
                *best,
                *memory,
                *listed,
                **widths,
                TILE=_TILE,
                num_warps=8,
            )
        return out_s

    def totals(self, logits_sv: Tensor) -> tuple[Tensor, Tensor]:
        """float64 `[s]` each: a row's largest logit, NaN where it is not finite, and the sum of all tokens' weights."""
        rows, vocab = logits_sv.shape
        device = logits_sv.device
        work = self._workspace(rows, vocab, device)
        plain = DrawTable.greedy(rows, device)
        plain.temperature.fill_(1)
        logits_sv = dense(logits_sv)
        self._best(logits_sv, work)
        self._weigh(logits_sv, plain, work)
        most_s, total_s = (torch.empty(rows, dtype=torch.float64, device=device) for _ in range(2))
        chunks, blocks = work.chunk_max_sc.shape[1], work.sums_sb.shape[1]
        self._launch(
            kernels.total_kernel,
            (rows,),
            work.chunk_max_sc,
            work.chunk_id_sc,
            work.sums_sb,
            most_s,
            total_s,
            chunks,
            blocks,
            CHUNKS=_power_of_two(chunks),
        )
        return most_s, total_s

    def _best(self, logits_sv: Tensor, work: Workspace) -> None:
        rows, vocab = logits_sv.shape
        chunks = work.chunk_max_sc.shape[1]
        self._launch(
            kernels.best_kernel,
            (rows, self._parts(rows, chunks)),
            logits_sv,
            logits_sv.stride(0),
            vocab,
            work.chunk_max_sc,
            work.chunk_id_sc,
            work.hist_sk,
            chunks,
            CHUNK=_CHUNK,
        )

    def _weigh(self, logits_sv: Tensor, table: DrawTable, work: Workspace) -> None:
        rows, vocab = logits_sv.shape
        chunks, blocks = work.chunk_max_sc.shape[1], work.sums_sb.shape[1]
        self._launch(
            kernels.weigh_kernel,
            (rows, self._parts(rows, chunks)),
            logits_sv,
            logits_sv.stride(0),
            vocab,
            table.temperature,
            table.top_k,
            table.top_p,
            work.chunk_max_sc,
            work.chunk_id_sc,
            work.sums_sb,
            work.hist_sk,
            chunks,
            blocks,
            CHUNK=_CHUNK,
            CHUNKS=_power_of_two(chunks),
        )

    def _parts(self, rows: int, chunks: int) -> int:
        return min(chunks, max(1, self._programs // rows))

    def _workspace(self, rows: int, vocab: int, device: torch.device) -> Workspace:
        assert vocab < _MOST_VOCAB, vocab
        known = self._workspaces.setdefault(vocab, [])
        for work in known:
            if len(work.limit_s) >= rows:
                return work
        # At least doubled: one after the other they take no more than two of the largest.
        known.append(Workspace.empty(_power_of_two(rows), vocab, device))
        return known[-1]


def dense(logits_sv: Tensor) -> Tensor:
    """With a row's logits one after the other."""
    assert logits_sv.dtype == torch.float32, logits_sv.dtype
    return logits_sv if logits_sv.stride(-1) == 1 or logits_sv.shape[1] == 1 else logits_sv.contiguous()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
