"""How matrix products are cut into programs, by their shapes. Legend: t rows, k features in, n features out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.ops.target import Target
from quire.ops.triton.kernels.linear import MOST_PARTS as _MOST_PARTS

MOST_PARTS: int = _MOST_PARTS.value
PROGRAMS = 128
"""That keep a GPU's memory busy: one for about each multiprocessor of a large one. A constant, since bits follow from
it: they would not be the same on two machines."""
FEW_ROWS = 128
_SHORTEST_PART = 256
_MOST_SHARED_BYTES = 200 << 10
_MOST_STAGES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program computes: `features` by `rows`; `form`: how it goes through k, see `linear_kernel`."""

    features: int
    rows: int
    form: str
    num_warps: int
    num_stages: int


def step_of(values: Tensor, *, rounds_rows: bool = False) -> int:
    """Features of k that are taken at once: 128 bytes of a weight's row, the unit of a GPU's memory. Of 8-bit floats
    half as many, since they are widened in registers, unless `rounds_rows`."""
    widened = values.dtype == torch.float8_e4m3fn and not rounds_rows
    return 64 if widened else 128 // values.element_size()


def parts_of(n: int, k: int, step: int) -> tuple[int, int]:
    """(parts of k, steps of each), by the weight's shape alone: parts enough for `PROGRAMS` programs of 64 features,
    unless they were too short. More would slow down many rows: each part of a tile begins with an empty pipeline."""
    tiles, parts = -(-n // 64), 1
    while parts < MOST_PARTS and tiles * parts < PROGRAMS and k >= 2 * parts * _SHORTEST_PART:
        parts *= 2
    all_steps = -(-k // step)
    steps = -(-all_steps // parts)
    return -(-all_steps // steps), steps


def rows_tile(t: int, most: int = FEW_ROWS) -> int:
    """The narrowest tile for t rows, of the matrix unit's widths."""
    return min(most, max(16, 1 << (t - 1).bit_length()))


def tile_of(t: int, outputs: Sequence[int], x: Tensor, step: int, *, cut: bool, shared_bytes: int) -> Tile:
    """For t rows of x and weights of so many outputs. `cut`: k is in parts, of some weight.

    Few rows: tiles of 64 features, and where those are few, a program per part of k. Many: the largest tile that
    leaves no multiprocessor idle; one of 128 x 256 has no registers left to add up parts.
    """

    def programs(features: int, rows: int) -> int:
        return sum(-(-n // features) for n in outputs) * -(-t // rows)

    # Tiles that pass through registers: float32 is not for the matrix unit, and copies to it are of 16 bytes.
    odd = x.shape[1] % 16 != 0 or x.stride(0) % 16 != 0
    small = odd or x.dtype == torch.float32
    # Sums of 8-bit floats have registers of their own for each step (see `multiply_add`), beside those for parts.
    floats = x.dtype == torch.float8_e4m3fn
    widest = 256 if step * x.element_size() <= 128 and not floats else 128
    most = 16 if odd else 32 if small else 64 if floats and cut else FEW_ROWS
    features, rows = 64, rows_tile(t, most)
    if t > FEW_ROWS and not small:
        if not cut and programs(128, widest) >= PROGRAMS:
            features, rows = 128, widest
        elif programs(128, rows) >= PROGRAMS:
            features = 128
    form = "one" if not cut else "split" if programs(features, rows) < PROGRAMS else "loop"
    return Tile(
        features=features,
        rows=rows,
        form=form,
        num_warps=features // 16,
        num_stages=stages(features, rows, x, step, shared_bytes=shared_bytes),
    )


def shared_bytes_of(target: Target) -> int:
    """Of a multiprocessor's own memory, for operands that are on their way. Bits do not follow from it."""
    limit = target.shared_bytes
    if limit is None:
        if target.device.type != "cuda":
            return _MOST_SHARED_BYTES
        properties: Any = torch.cuda.get_device_properties(target.device)
        limit = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return min(_MOST_SHARED_BYTES, int(limit) - 2048)


def stages(features: int, rows: int, x: Tensor, step: int, *, shared_bytes: int, weights: int = 1) -> int:
    """Steps that are under way at once: what fits into the multiprocessor's memory, which two small programs share."""
    room = shared_bytes if features > 64 else shared_bytes // 2
    return max(2, min(_MOST_STAGES, room // (weights * features * 128 + rows * step * x.element_size())))
