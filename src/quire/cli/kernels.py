"""`quire kernels`: which implementation serves each op on this machine, and why."""

from __future__ import annotations

from typing import Literal

from quire.cli.bench.report import print_json
from quire.cli.flags import KernelFlags, settings
from quire.config.engine import EngineConfig
from quire.config.validate import validate


def kernels(
    *, dtype: Literal["bfloat16", "float32", "float16"] | None = None, json: bool = False, engine: KernelFlags = None
) -> None:
    """List which implementation serves each op on this machine, and why; or on a GPU, whether there is one or not.

    Parameters
    ----------
    dtype
        Of weights and activations; bfloat16 and float32 otherwise.
    json
        Print JSON.
    """
    config = settings(EngineConfig, engine, config=None).value
    validate(config)

    import torch

    from quire.engine.device import resolve_device
    from quire.ops.kernels import choose
    from quire.ops.target import Target

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    shown = [dtype] if dtype is not None else ["bfloat16", "float32"]
    # A device that is named need not be there: this is also how one learns what another machine would run.
    device = resolve_device("auto") if config.device == "auto" else torch.device(config.device)
    chosen = {name: choose(Target(device, dtypes[name], isa=config.isa)) for name in shown}
    reports = {name: [(one.op, one.implementation, one.reason) for one in each] for name, each in chosen.items()}
    if json:
        print_json(
            {
                "device": str(device),
                "kernels": {
                    name: [dict(zip(("op", "implementation", "reason"), line, strict=True)) for line in report]
                    for name, report in reports.items()
                },
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Kernels on this CPU" if device.type == "cpu" else f"Kernels on {device}", title_justify="left")
    for column in ("op", "dtype", "implementation", "why"):
        table.add_column(column)
    for name, report in reports.items():
        for op, implementation, reason in report:
            table.add_row(op, name, implementation, reason)
    Console().print(table)
