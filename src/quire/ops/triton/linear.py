"""Linear layers by Triton, over weights as they lie in a checkpoint.

Legend: t rows, k features in, n features out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from quire.ops.target import Target
from quire.ops.triton.kernels.linear import linear_kernel
from quire.ops.triton.launch import Launch
from quire.ops.triton.quantize import quantize
from quire.ops.triton.tiles import FEW_ROWS, MOST_PARTS, PROGRAMS, parts_of, shared_bytes_of, step_of, tile_of
from quire.ops.weight import Fp8Weight, Int8Weight, weight_shape

PlainWeight = Tensor | Int8Weight | Fp8Weight

_MOST_AT_ONCE = 3
_ROW_TILES_TOGETHER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One weight of a launch. `parts` and `steps`: see `parts_of`."""

    n: int
    values_nk: Tensor
    scale_n: Tensor | None
    bias_n: Tensor | None
    parts: int
    steps: int


class TritonLinear:
    """`LinearKernel` of all formats but int4. One stream at a time may call it: its tickets are shared by its calls."""

    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch
        self._shared_bytes = shared_bytes_of(target)
        # Made now: a captured graph would fill it with zeros at every replay, and only then.
        self._tickets = torch.zeros(PROGRAMS * MOST_PARTS, dtype=torch.int32, device=target.device)

    def pack(self, weight: PlainWeight) -> PlainWeight:
        """As it is; a copy only where it is not dense."""
        if isinstance(weight, Tensor):
            return weight.contiguous()
        return replace(weight, values_nk=weight.values_nk.contiguous(), scale_n=weight.scale_n.contiguous())

    def __call__(self, x_tk: Tensor, weight: PlainWeight, bias_n: Tensor | None = None) -> Tensor:
        """`[..., n]` for rows of any leading shape."""
        return self._multiply(x_tk, [weight], [bias_n], x_tk.dtype)[0]

    def wide(self, x_tk: Tensor, weight: PlainWeight, bias_n: Tensor | None) -> Tensor:
        return self._multiply(x_tk, [weight], [bias_n], torch.float32)[0]

    def group(self, x_tk: Tensor, weights: Sequence[PlainWeight], biases: Sequence[Tensor | None]) -> list[Tensor]:
        """Several weights of one format over the same rows, with the bits of single calls, in as few launches as may
        be. The results of a launch lie side by side: they are views of one `[..., n1 + n2 + ...]`."""
        return self._multiply(x_tk, weights, biases, x_tk.dtype)

    def _multiply(
        self, x_tk: Tensor, weights: Sequence[PlainWeight], biases: Sequence[Tensor | None], dtype: torch.dtype
    ) -> list[Tensor]:
        rows = x_tk.reshape(-1, x_tk.shape[-1])
        scale_t = None
        narrow = row_dtype(weights[0])
        if narrow is not None:
            rows, scale_t = quantize(self._launch, rows, narrow)
        elif rows.stride(1) != 1:
            rows = rows.contiguous()
        t = rows.shape[0]
        jobs = [_job(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        results: list[Tensor] = []
        for some in _launches(jobs, t):
            sizes = [job.n for job in some]
            out = torch.empty(t, sum(sizes), dtype=dtype, device=x_tk.device)
            if t:
                self._run(rows, scale_t, some, out)
            side_by_side = out.view(*x_tk.shape[:-1], sum(sizes))
            for last, size in zip(accumulate(sizes), sizes, strict=True):
                results.append(side_by_side[..., last - size : last])
        return results

    def _run(self, x_tk: Tensor, scale_t: Tensor | None, jobs: Sequence[_Job], out_tn: Tensor) -> None:
        (t, k), values = x_tk.shape, jobs[0].values_nk
        step = step_of(values, rounds_rows=scale_t is not None)
        cut = any(job.parts > 1 for job in jobs)
        tile = tile_of(t, [job.n for job in jobs], x_tk, step, cut=cut, shared_bytes=self._shared_bytes)
        row_tiles = -(-t // tile.rows)
        programs = row_tiles * sum(
            -(-job.n // tile.features) * (job.parts if tile.form == "split" else 1) for job in jobs
        )
        wide = torch.int32 if values.dtype == torch.int8 else torch.float32
        room = programs * tile.features * tile.rows if tile.form == "split" else 1
        partials = torch.empty(room, dtype=wide, device=x_tk.device)
        first, second, third = (jobs[min(index, len(jobs) - 1)] for index in range(_MOST_AT_ONCE))
        each = (first, second, third)
        self._launch(
            linear_kernel,
            (programs,),
            x_tk,
            x_tk if scale_t is None else scale_t,
            *(job.values_nk for job in each),
            *(job.values_nk if job.scale_n is None else job.scale_n for job in each),
            *(job.values_nk if job.bias_n is None else job.bias_n for job in each),
            out_tn,
            partials,
            self._tickets,
            t,
            k,
            x_tk.stride(0),
            out_tn.stride(0),
            *(job.n for job in each),
            *(job.parts for job in each),
            *(job.steps for job in each),
            COUNT=len(jobs),
            SCALES=(first.scale_n is not None) + (scale_t is not None),
            BIAS=first.bias_n is not None,
            FORM=tile.form,
            EVEN_K=k % step == 0,
            BLOCK_F=tile.features,
            BLOCK_T=tile.rows,
            BLOCK_K=step,
            GROUP_T=_ROW_TILES_TOGETHER,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def row_dtype(weight: PlainWeight) -> torch.dtype | None:
    """What rows are rounded to that a weight multiplies; None: they stay."""
    if isinstance(weight, Int8Weight):
        return torch.int8
    return torch.float8_e4m3fn if isinstance(weight, Fp8Weight) and weight.rounds_rows else None


def _job(weight: PlainWeight, bias_n: Tensor | None) -> _Job:
    n, k = weight_shape(weight)
    values, scale = (weight, None) if isinstance(weight, Tensor) else (weight.values_nk, weight.scale_n)
    parts, steps = parts_of(n, k, step_of(values, rounds_rows=row_dtype(weight) is not None))
    return _Job(n=n, values_nk=values, scale_n=scale, bias_n=bias_n, parts=parts, steps=steps)


def _launches(jobs: Sequence[_Job], t: int) -> Iterator[Sequence[_Job]]:
    """Neighbours that may share a launch. Of many rows, those whose k is cut stay apart: they take another tile."""

    def kind(job: _Job) -> tuple[bool, bool]:
        return job.bias_n is None, t > FEW_ROWS and job.parts > 1

    some: list[_Job] = []
    for job in jobs:
        if some and (len(some) == _MOST_AT_ONCE or kind(job) != kind(some[0])):
            yield some
            some = []
        some.append(job)
    if some:
        yield some
