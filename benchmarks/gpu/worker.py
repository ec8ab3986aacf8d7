"""One engine's turn, in a process of its own: `python -m benchmarks.gpu.worker`, started by `__main__`.

Its task comes as JSON on the command line, and what it found goes to a file: engines print what they like.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.engines import ENGINES, Settings
from benchmarks.gpu.workloads import Prompts, measure, nano_vllm, shortened


def turn(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is known so far, after each figure."""
    begin = time.perf_counter()
    engine = ENGINES[task["engine"]](Path(task["model"]), Settings(**task["settings"]))
    loaded = time.perf_counter()
    engine.generate([[1, 2, 3]], [2])
    found: dict[str, Any] = {
        "load_seconds": loaded - begin,
        "first_token_seconds": time.perf_counter() - loaded,
        "room": engine.room(),
        "kernels": kernels(task["settings"]["device"]) if task["engine"] == "quire" else {},
        "seconds": {},
    }
    figures = measure(
        engine,
        Prompts(task["turn"], task["vocab_size"]),
        batches=task["batches"],
        prefills=task["prefills"],
        steps=tuple(task["steps"]),
        context=task["context"],
        nano=shortened(nano_vllm(), task["nano"], task["vocab_size"]) if task["nano"] else None,
    )
    for name, seconds in figures:
        print(f"{name}: {seconds * 1e3:.3f} ms", flush=True)
        found["seconds"][name] = seconds
        yield found


def kernels(asked: str) -> dict[str, str]:
    """Which back end served each op."""
    import torch

    from quire.engine.device import resolve_device
    from quire.ops.kernels import choose
    from quire.ops.target import Target

    return {one.op: one.implementation for one in choose(Target(resolve_device(asked), torch.bfloat16))}


def limits(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import torch

    from quire.cli.bench.device_limits import measure_device

    yield measure_device(torch.device("cuda", 0), seconds=task["seconds"], matmul_size=8192)


def main() -> None:
    task = json.loads(sys.argv[1])
    out = Path(task["out"])
    for found in limits(task) if task["engine"] == "limits" else turn(task):
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
