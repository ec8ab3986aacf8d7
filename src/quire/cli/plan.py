"""`quire plan`: what a model needs and what fits, told from config.json and the headers of its weights."""

from __future__ import annotations

import math
from typing import Any

from quire.cli.bench.report import print_json
from quire.cli.bench.workload import require
from quire.cli.flags import ConfigFile, EngineFlags, settings
from quire.config.engine import EngineConfig
from quire.core.errors import ConfigError
from quire.core.machine import has_gpu_driver

GIB = 1024**3
_SECONDS = 0.2
_MATMUL_SIZE = 4096


def plan(
    model: str | None = None,
    *,
    memory: float | None = None,
    bandwidth: float | None = None,
    tflops: float | None = None,
    json: bool = False,
    config: ConfigFile = None,
    engine: EngineFlags = None,
) -> None:
    """Tell what fits in memory and how fast it can run, before reading a weight: on this machine, or on a GPU that need
    not be here if all its figures are given.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    memory
        GiB that are free there.
    bandwidth
        GB/s of its memory.
    tflops
        10^12 operations per second of its matrix products, in the numbers that the model is computed in.
    json
        Print JSON.
    """
    wanted = settings(EngineConfig, engine, config=config, model=model).value
    for name, figure in (("memory", memory), ("bandwidth", bandwidth), ("tflops", tflops)):
        require(name, figure, figure is None or 0 < figure < math.inf, "a number above 0")

    from quire.models.plan import plan_model
    from quire.models.source import resolve_model

    figures = {
        "memory_available": None if memory is None else int(memory * GIB),
        "bandwidth": None if bandwidth is None else bandwidth * 1e9,
        "flops": None if tflops is None else tflops * 1e12,
    }
    made = plan_model(resolve_model(wanted), wanted, **_of_device(wanted, figures))
    if json:
        print_json(made.to_dict())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Plan of {wanted.model}", show_header=False, title_justify="left")
    for row in made.rows():
        table.add_row(*row)
    Console().print(table)


def _of_device(wanted: EngineConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Which device is planned for and, of a GPU, its figures: those that are not given are measured."""
    if wanted.device == "cpu" or (wanted.device == "auto" and not has_gpu_driver()):
        return given
    if wanted.device != "auto" and None not in given.values():
        return {**given, "gpu": True}

    from quire.engine.device import memory_for, resolve_device

    device = resolve_device(wanted.device)
    if device.type == "cpu":
        return given
    missing = {name for name, figure in given.items() if figure is None}
    if device.type != "cuda" and missing - {"memory_available"}:
        raise ConfigError(
            f"device is {wanted.device}, whose speed cannot be measured.",
            param="device",
            remedy="Say --bandwidth and --tflops.",
        )
    measured: dict[str, Any] = {"memory_available": memory_for(device)}
    if missing - {"memory_available"}:
        import torch

        from quire.cli.bench.device_limits import measure_matmul, measure_memory

        with torch.cuda.device(device):
            measured["bandwidth"] = measure_memory(_SECONDS)["memory_gb_per_s"]["read"] * 1e9
            measured["flops"] = (measure_matmul(_MATMUL_SIZE, _SECONDS)["bf16"] or 0.0) * 1e9
    return {**given, **{name: measured[name] for name in missing}, "gpu": True}
