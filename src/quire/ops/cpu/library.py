"""The compiled module, and what this processor can run of it."""

from __future__ import annotations

import importlib
from typing import Any

from quire.core.errors import ConfigError

REFERENCE = "reference"
"""In the place of an instruction set's name: compute with torch, not with the compiled kernels."""


def kernels_module() -> Any | None:
    """`_kernels`, or None if this installation was made without a compiler."""
    try:
        return importlib.import_module("quire.ops.cpu._kernels")
    except ModuleNotFoundError:  # one that is there but cannot be loaded is a fault, and is raised
        return None


def usable_isas() -> tuple[str, ...]:
    """Instruction sets that are compiled in and run here, worst to best; none without the compiled module."""
    module = kernels_module()
    return () if module is None else tuple(module.isas())


def open_backend(threads: int | None, isa: str | None) -> Any:
    """A pool of `threads` (default: one per core that may be used) and the kernels of `isa` (default: the best that
    runs here). Raises ConfigError for an instruction set that this installation or processor does not have."""
    module = kernels_module()
    assert module is not None, "asked before `unfit` was"
    usable = usable_isas()
    if isa is not None and isa not in usable:
        raise ConfigError(
            f"The instruction set {isa!r} cannot be used on this machine.",
            param="isa",
            remedy=f"It can be {', '.join(usable)} or {REFERENCE}.",
        )
    return module.Backend(threads or module.default_threads(), isa or usable[-1])
