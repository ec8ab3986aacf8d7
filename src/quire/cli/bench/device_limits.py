"""What a CUDA or ROCm device's memory, arithmetic and queue can give, by torch. Imports nothing but torch, so that a
machine with little installed can measure as well.

Times are the device's own, between two of its events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MIB = 1024**2
BUFFER_BYTES = 4096 * MIB
"""Many times the last cache of any device."""
HOST_BUFFER_BYTES = 256 * MIB
SMALL_KERNELS = 1000
"""How many kernels that do next to nothing are launched one after the other."""


def measure_device(device: torch.device, *, seconds: float, matmul_size: int) -> dict[str, Any]:
    """All figures of one device. `seconds`: for how long each is measured, at least.

    Memory in GB/s, of which a copy counts what is read and what is written; matrix products in GFLOP/s, None for what
    the device has not; copies to and from pinned host memory in GB/s; microseconds from one small kernel to the next.
    """
    import torch

    with torch.cuda.device(device):
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": str(device),
            "name": properties.name,
            "torch": torch.__version__,
            "multiprocessors": properties.multi_processor_count,
            **measure_memory(seconds),
            "matmul_size": matmul_size,
            "matmul_gflop_per_s": measure_matmul(matmul_size, seconds),
            "host_gb_per_s": measure_host_copies(seconds),
            "kernel_gap_us": measure_gaps(seconds),
        }


def measure_memory(seconds: float) -> dict[str, Any]:
    import torch

    free, _ = torch.cuda.mem_get_info()
    size = min(BUFFER_BYTES, free // 4) // MIB * MIB
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), seconds)
    # Two of torch's ways to read without writing; which one is faster depends on the device.
    reads = [median_seconds(source.sum, seconds / 2), median_seconds(source.amax, seconds / 2)]
    return {
        "buffer_bytes": size,
        "memory_gb_per_s": {"read": size / min(reads) / 1e9, "copy": 2 * size / copy / 1e9},
    }


def measure_matmul(size: int, seconds: float) -> dict[str, float | None]:
    """Of square matrices of random numbers: zeros would go faster than any model's weights."""
    import torch

    left, right = (torch.randn(size, size, device="cuda") for _ in range(2))
    one = torch.ones((), device="cuda")

    def bf16() -> Callable[[], object]:
        a, b = left.bfloat16(), right.bfloat16()
        return lambda: a @ b

    def fp8() -> Callable[[], object]:
        a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    def int8() -> Callable[[], object]:
        a, b = ((matrix * 30).clamp(-127, 127).to(torch.int8) for matrix in (left, right.t()))
        return lambda: torch._int_mm(a, b.t())

    figures: dict[str, float | None] = {}
    for kind in (bf16, fp8, int8):
        try:
            taken = median_seconds(kind(), seconds)
        except RuntimeError:  # what this device or torch has not
            figures[kind.__name__] = None
        else:
            figures[kind.__name__] = 2 * size**3 / taken / 1e9
    return figures


def measure_host_copies(seconds: float) -> dict[str, float]:
    import torch

    host = torch.ones(HOST_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    to_device = median_seconds(lambda: device.copy_(host, non_blocking=True), seconds)
    to_host = median_seconds(lambda: host.copy_(device, non_blocking=True), seconds)
    return {"to_device": HOST_BUFFER_BYTES / to_device / 1e9, "to_host": HOST_BUFFER_BYTES / to_host / 1e9}


def measure_gaps(seconds: float) -> dict[str, float]:
    """Each kernel adds to one number: what is left is the way from one to the next, launched by the host one by one,
    as a graph of one kernel that is replayed, and inside a graph."""
    import torch

    number = torch.zeros(1, device="cuda")

    def launches() -> None:
        for _ in range(SMALL_KERNELS):
            number.add_(1)

    def captured(count: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        number.add_(1)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(count):
                number.add_(1)
        return graph

    one, many = captured(1), captured(SMALL_KERNELS)

    def replays() -> None:
        for _ in range(SMALL_KERNELS):
            one.replay()

    times = {"launch": launches, "graph_replay": replays, "within_graph": many.replay}
    return {name: median_seconds(run, seconds) / SMALL_KERNELS * 1e6 for name, run in times.items()}


def median_seconds(run: Callable[[], object], seconds: float) -> float:
    """Of at least five calls after three for warming up, for at least `seconds` in all, on the current device."""
    import torch

    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        before, after = event(), event()
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return sorted(times)[len(times) // 2]
