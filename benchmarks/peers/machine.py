"""How quiet the machine is: what a figure was measured under is kept beside it, so that noise can be seen."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PROBE_BYTES = 1024**3
"""Of memory that the bandwidth probe reads; larger than the last-level cache."""


class Machine:
    """Owns the probe's buffer, which is filled once so that a probe reads memory and nothing else."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._parts = np.array_split(np.ones(PROBE_BYTES // 8, dtype=np.int64), threads)

    def read_bandwidth(self) -> float:
        """GB/s of reading with all threads: the best of three passes, a fraction of a second."""
        seconds = []
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in range(3):
                begin = time.perf_counter()
                list(pool.map(np.max, self._parts))
                seconds.append(time.perf_counter() - begin)
        return PROBE_BYTES / min(seconds) / 1e9

    def describe(self) -> dict[str, Any]:
        fields = (line.partition(": ") for line in Path("/proc/cpuinfo").read_text().splitlines())
        return {
            "cpu": next((value for name, _, value in fields if name.strip() == "model name"), platform.machine()),
            "cores": len(os.sched_getaffinity(0)),
            "threads": self._threads,
            "memory_gib": round(psutil.virtual_memory().total / 1024**3, 1),
            "load_average": os.getloadavg()[0],
            "read_gb_per_s": self.read_bandwidth(),
        }


def require_quiet(limit: float) -> None:
    """Raise `SystemExit` when more than `limit` processes have been running over the last minute."""
    load = os.getloadavg()[0]
    if load > limit:
        raise SystemExit(f"The load average is {load:.2f}; figures taken now would say little. Wait, or say --noisy.")


@contextmanager
def others_share(process: psutil.Process) -> Iterator[dict[str, float]]:
    """Fills in which share of the machine's cores others than `process` and its children took meanwhile."""
    found: dict[str, float] = {}
    begin, busy, own = time.perf_counter(), _busy_seconds(), cpu_seconds(process)
    yield found
    elapsed = time.perf_counter() - begin
    others = (_busy_seconds() - busy) - (cpu_seconds(process) - own)
    found["others_cpu"] = max(0.0, others / (elapsed * (os.cpu_count() or 1)))


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    return float(sum(times.user + times.system for times in (each.cpu_times() for each in family(process))))


def resident_bytes(process: psutil.Process) -> int:
    """RSS of a process and its children; pages that they share, such as a mapped checkpoint's, count for each."""
    return int(sum(each.memory_info().rss for each in family(process)))


def _busy_seconds() -> float:
    """Of all cores, by anyone, and by other machines on this host where that is told (steal)."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
