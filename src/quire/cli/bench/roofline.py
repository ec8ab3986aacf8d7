"""`quire bench roofline`: what this machine's memory and arithmetic can give, by torch and by the compiled kernels; or
what a GPU's can (`device_limits`).

A decode step reads all weights and the KV of its requests once, so memory bandwidth over those bytes bounds its rate;
prefill is bounded by the matmul peak.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from quire.cli.bench.report import print_json, print_table
from quire.cli.bench.workload import require
from quire.config.engine import EngineConfig
from quire.config.validate import validate
from quire.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

GIB, MIB = 1024**3, 1024**2
CACHE_MULTIPLE = 4  # a buffer of so many last-level caches comes from memory
LEAST_BUFFER_BYTES = 256 * 1024**2
MOST_BUFFER_BYTES = 4 * GIB
CPU_MATMUL_SIZE, GPU_MATMUL_SIZE = 2048, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineOptions:
    """The flags of `quire bench roofline`."""

    device: str = "cpu"
    """What is measured: cpu, cuda, cuda:1; auto takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads; one per core that may be used otherwise."""
    seconds: float = 1.0
    """For how long each figure is measured, at least."""
    matmul_size: int | None = None
    """Rows and columns of the square matrices; 2048 otherwise, 8192 of a GPU."""
    json: bool = False
    """Print JSON."""


DEFAULTS = RooflineOptions()


def roofline(options: Annotated[RooflineOptions, Parameter(name="*")] = DEFAULTS) -> None:
    """Measured memory bandwidth and matmul peaks of this machine, or of its GPU."""
    size = options.matmul_size
    require("threads", options.threads, options.threads is None or options.threads >= 1, "at least 1")
    require("seconds", options.seconds, 0 < options.seconds <= 600, "above 0 and at most 600")
    require("matmul_size", size, size is None or 64 <= size <= 16384, "from 64 to 16384")
    validate(EngineConfig(device=options.device))
    from quire.engine.device import resolve_device

    device = resolve_device(options.device)
    if device.type == "cpu":
        _cpu(options, size or CPU_MATMUL_SIZE)
    else:
        _gpu(device, options, size or GPU_MATMUL_SIZE)


def _cpu(options: RooflineOptions, matmul_size: int) -> None:
    import torch

    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    cache = last_level_cache_bytes()
    result = {
        "benchmark": "roofline",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": cache,
        **measure_memory(buffer_bytes(cache), options.seconds),
        **measure_matmul(matmul_size, options.seconds),
        **measure_kernels(options.threads, buffer_bytes(cache), options.seconds),
    }
    if options.json:
        print_json(result)
        return
    rows = [
        ("threads", f"{result['threads']} ({result['cpu_capability']})"),
        ("last-level cache", f"{cache / 1024**2:,.0f} MiB"),
        ("buffer", f"{result['buffer_bytes'] / 1024**2:,.0f} MiB"),
    ]
    rows += [(f"memory {name}", f"{figure:,.1f} GB/s") for name, figure in result["memory_gb_per_s"].items()]
    rows += [(f"matmul {name}", f"{figure:,.0f} GFLOP/s") for name, figure in result["matmul_gflop_per_s"].items()]
    rows += [
        (f"kernels {name} ({result['isa']})", f"{figure:,.1f} GB/s")
        for name, figure in result["kernels_gb_per_s"].items()
    ]
    rows += [
        (f"kernels {name} ({result['isa']})", f"{figure:,.0f} Gop/s")
        for name, figure in result["kernels_gop_per_s"].items()
    ]
    print_table("Roofline (medians)", rows)


def _gpu(device: torch.device, options: RooflineOptions, matmul_size: int) -> None:
    from quire.cli.bench.device_limits import measure_device

    if device.type != "cuda":
        raise ConfigError(
            f"device is {options.device}, whose limits cannot be measured.",
            param="device",
            remedy="Take cpu, or an NVIDIA or AMD GPU: cuda, cuda:1.",
        )
    result = {
        "benchmark": "roofline",
        **measure_device(device, seconds=options.seconds, matmul_size=matmul_size // 16 * 16),
    }
    if options.json:
        print_json(result)
        return
    rows = [("device", f"{result['name']} ({result['device']}, torch {result['torch']})")]
    rows += [(f"memory {name}", f"{figure:,.0f} GB/s") for name, figure in result["memory_gb_per_s"].items()]
    rows += [
        (f"matmul {name}", "not available" if figure is None else f"{figure / 1e3:,.0f} TFLOP/s")
        for name, figure in result["matmul_gflop_per_s"].items()
    ]
    rows += [(f"pinned memory {name}", f"{figure:,.1f} GB/s") for name, figure in result["host_gb_per_s"].items()]
    rows += [(f"kernel gap {name}", f"{figure:,.2f} us") for name, figure in result["kernel_gap_us"].items()]
    print_table("Roofline (medians)", [(name.replace("_", " "), text) for name, text in rows])


def buffer_bytes(cache: int) -> int:
    """Several times the cache, but at most an eighth of the memory that is free (a copy takes two such buffers)."""
    import psutil

    room = psutil.virtual_memory().available // 8
    return int(min(max(CACHE_MULTIPLE * cache, LEAST_BUFFER_BYTES), MOST_BUFFER_BYTES, room)) // 4096 * 4096


def last_level_cache_bytes() -> int:
    """The largest cache of the first core, as Linux tells it; 32 MiB where it does not."""
    sizes = [32 * 1024**2]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 1024, "M": 1024**2, "G": GIB}.get(text[-1], 1))
    return max(sizes)


def measure_memory(size: int, seconds: float) -> dict[str, Any]:
    """GB/s of reading (the better of a matrix-vector product and a sum), and of copying (read plus written)."""
    import torch

    columns = 1024
    source = torch.ones(size // (4 * columns), columns)
    vector = torch.ones(columns)
    out = torch.empty(source.shape[0])
    target = torch.empty_like(source)
    size = source.numel() * 4
    reads = (
        _median_seconds(lambda: torch.mv(source, vector, out=out), seconds / 2),
        _median_seconds(source.sum, seconds / 2),
    )
    copy = _median_seconds(lambda: target.copy_(source), seconds)
    return {
        "buffer_bytes": size,
        "memory_gb_per_s": {"read": size / min(reads) / 1e9, "copy": 2 * size / copy / 1e9},
    }


def measure_matmul(size: int, seconds: float) -> dict[str, Any]:
    """GFLOP/s of a square matrix product, by dtype."""
    import torch

    dtypes: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
    figures = {}
    for name, dtype in dtypes.items():
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)

        def multiply(a: torch.Tensor = left, b: torch.Tensor = right, c: torch.Tensor = out) -> torch.Tensor:
            return torch.mm(a, b, out=c)

        figures[name] = 2 * size**3 / _median_seconds(multiply, seconds) / 1e9
    return {"matmul_size": size, "matmul_gflop_per_s": figures}


def measure_kernels(threads: int | None, size: int, seconds: float) -> dict[str, Any]:
    """Limits of the compiled kernels' instruction set, best of several: a stream read by its threads, and dot products
    on registers alone (an addition and a multiplication are two operations). Empty where there are no such kernels."""
    from quire.ops.cpu.library import kernels_module, open_backend

    module = kernels_module()
    if module is None:
        return {"isa": None, "kernels_gb_per_s": {}, "kernels_gop_per_s": {}}
    backend = open_backend(threads, None)
    repeats = max(2, int(4 * seconds))
    return {
        "isa": backend.isa,
        "kernels_gb_per_s": {"read": module.read_bandwidth(backend, size // MIB * MIB, repeats) / 1e9},
        "kernels_gop_per_s": {kind: module.peak(backend, kind, repeats) / 1e9 for kind in ("bf16", "int8", "fp32")},
    }


def _median_seconds(run: Callable[[], object], seconds: float) -> float:
    """Of at least three calls after one for warming up, for at least `seconds` in all."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
