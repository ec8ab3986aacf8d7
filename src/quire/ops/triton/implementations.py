"""What there is in Triton. Triton itself is imported when an implementation is built."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from quire.ops.op import Implementation
from quire.ops.target import Target

# op, module here, class, its method ("" for the object itself), what `quire kernels` says
_SERVED = (
    ("add_rms_norm", "rows", "TritonNorm", "add_rms_norm", "a row per program, in float32"),
    ("attention", "attention", "TritonAttention", "", "split decodes and tiles of prompts, in one order"),
    ("rms_norm", "rows", "TritonNorm", "rms_norm", "a row per program, in float32"),
)


def implementations() -> list[Implementation]:
    return [
        Implementation(
            op=op,
            backend="triton",
            build=_builder(module, name, method),
            unfit=Target.unfit_for_triton,
            preference=100,
            note=note,
        )
        for op, module, name, method, note in _SERVED
    ]


def _builder(module: str, name: str, method: str) -> Callable[[Target], Any]:
    def build(target: Target) -> Any:
        made = getattr(import_module(f"quire.ops.triton.{module}"), name)(target)
        return getattr(made, method) if method else made

    return build
