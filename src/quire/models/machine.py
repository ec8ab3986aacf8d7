"""What this machine reads and multiplies per second, measured in a moment: for estimates, not for benchmarks.

Other load on the machine lowers both figures, the product's most: its threads wait for each other.

`quire bench roofline` measures the same with torch, with larger buffers and for longer.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

_MAX_BUFFER_BYTES = 256 << 20
_BLOCK = 1 << 20  # elements touched between two looks at the clock


def measure_bandwidth(threads: int, *, seconds: float = 0.2) -> float:
    """Bytes per second that `threads` together read from memory.

    Half of `seconds` goes into making a buffer, the rest into reading it, so the time is bounded rather than the
    buffer: on a machine with a very large last-level cache the figure may be that of the cache.
    """

    def touched(_: int) -> NDArray[np.float32]:
        deadline = time.perf_counter() + seconds / 2
        buffer = np.empty(max(_BLOCK, _MAX_BUFFER_BYTES // 4 // threads), dtype=np.float32)
        size = 0
        while size < len(buffer) and (size == 0 or time.perf_counter() < deadline):
            buffer[size : size + _BLOCK] = 1.0
            size = min(len(buffer), size + _BLOCK)
        return buffer[:size]

    with ThreadPoolExecutor(threads) as pool:
        buffers = list(pool.map(touched, range(threads)))
        num_bytes = sum(buffer.nbytes for buffer in buffers)
        end = time.perf_counter() + seconds / 2
        best = float("inf")
        while best == float("inf") or time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.max, buffers))  # the reduction that numpy vectorises best, and without the lock
            best = min(best, time.perf_counter() - start)
    return num_bytes / best


def measure_flops(*, size: int = 512, seconds: float = 0.05) -> float:
    """Floating-point operations per second of a float32 matrix product, with numpy's own threads."""
    left = np.ones((size, size), dtype=np.float32)
    left @ left
    end = time.perf_counter() + seconds
    best = float("inf")
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
