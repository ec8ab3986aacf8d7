"""Matrix products whose rows do not feel each other.

torch hands a matrix product to a library (oneDNN, MKL, cuBLAS) that picks its blocking, and with it the order in which
a sum is rounded, by the number of rows. A row computed among 3 others may then differ in its last bits from the same
row among 300. Promise P1 forbids that.

What these libraries do keep is this: two calls with the same number of rows treat every row alike. So one row count,
the canonical one, defines what a row's result *is*, and another count is used only after it was seen to give the same
bits as the canonical one, on this machine, with this weight. Rows are then served in pieces of such counts, the last
piece padded. Measured on x86 with oneDNN bf16: 16 and 32 agree for every shape, 1024 for most, 64 for few; with MKL
float32: 16 to 256 nearly always, 1 and 8 never.

A check is made when a count would first be used, so that start-up pays for none that are not. It compares some 10^5
results per count: where the order of a bfloat16 sum differs, about one result in a thousand rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CANONICAL_ROWS = 16
_CANDIDATES = (16, 32, 64, 128, 256, 512, 1024)

# A piece of m rows takes as long as m rows' arithmetic plus the reading of the weight, which is worth some 48 rows.
_WEIGHT_READ_IN_ROWS = 48
_RESULTS_TO_COMPARE = 1 << 17
_MAX_BLOCKS_PER_CHECK = 8
_MAX_TRIALS = 16

Multiply = Callable[[Tensor], Tensor]
"""From `[m, k]` to `[m, n]`."""


class RowSplit:
    """How to cut t rows into pieces whose bits do not depend on t, for the products of one shape and dtype."""

    def __init__(self) -> None:
        self._verdicts: dict[int, bool] = {CANONICAL_ROWS: True}
        self._plans: dict[int, tuple[int, ...]] = {}

    def pieces(self, rows: int, multiply: Multiply, sample_k: Tensor) -> tuple[int, ...]:
        """Row counts of the calls that serve `rows` rows; they add up to `rows` or a little more.

        `multiply` is tried out if a count is new; `sample_k` is any `[1, k]` tensor of the right dtype and device.
        """
        blocks = -(-rows // CANONICAL_ROWS)
        while blocks not in self._plans:
            plan = self._cheapest(blocks)
            unproven = next((count for count in sorted(set(plan)) if count not in self._verdicts), None)
            if unproven is None:
                self._plans[blocks] = plan
            else:
                self._verdicts[unproven] = _agrees(unproven, multiply, sample_k)
        return self._plans[blocks]

    def _cheapest(self, blocks: int) -> tuple[int, ...]:
        """Least cost for `blocks * CANONICAL_ROWS` rows among counts that are not known to disagree."""
        counts = [count for count in _CANDIDATES if self._verdicts.get(count, True)]
        best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        for need in range(1, blocks + 1):
            options = []
            for count in counts:
                cost, rest = best[max(0, need - count // CANONICAL_ROWS)]
                options.append((cost + count + _WEIGHT_READ_IN_ROWS, (count, *rest)))
            best.append(min(options))
        return tuple(sorted(best[blocks][1], reverse=True))


def _agrees(count: int, multiply: Multiply, sample_k: Tensor) -> bool:
    """Whether a call over `count` rows gives the bits of canonical calls, at several places among the rows."""
    generator = torch.Generator(device=sample_k.device).manual_seed(count)
    num_blocks = count // CANONICAL_ROWS
    stride = -(-num_blocks // _MAX_BLOCKS_PER_CHECK)
    starts = {block * CANONICAL_ROWS for block in (*range(0, num_blocks, stride), num_blocks - 1)}
    compared = 0
    for _ in range(_MAX_TRIALS):
        x_mk = torch.randn(count, sample_k.shape[-1], device=sample_k.device, generator=generator).to(sample_k.dtype)
        y_mn = multiply(x_mk)
        for start in starts:
            rows = slice(start, start + CANONICAL_ROWS)
            if not torch.equal(multiply(x_mk[rows]), y_mn[rows]):
                return False
        compared += len(starts) * CANONICAL_ROWS * y_mn.shape[-1]
        if compared >= _RESULTS_TO_COMPARE:
            break
    return True
