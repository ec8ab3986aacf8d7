"""What there is in Triton. Triton itself is imported when an implementation is built."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from quire.ops.op import Implementation
from quire.ops.target import Target

_NOTE_OF_SAMPLING = "on the device, without sorting the vocabulary"
# op, module here, class, its method ("" for the object itself), what `quire kernels` says
_SERVED = (
    ("attention", "attention", "TritonAttention", "", "split decodes and tiles of prompts, in one order"),
    ("activation", "rows", "TritonActivation", "activation", "a piece of a row per program, in float32"),
    ("add_layer_norm", "rows", "TritonNorm", "add_layer_norm", "whole rows per program, in float32"),
    ("add_rms_norm", "rows", "TritonNorm", "add_rms_norm", "whole rows per program, in float32"),
    ("draw", "sampling", "TritonSampling", "draw", _NOTE_OF_SAMPLING),
    ("embedding", "rows", "TritonEmbedding", "", "a piece of a row per program"),
    ("gated_activation", "rows", "TritonActivation", "gated_activation", "a piece of a row per program, in float32"),
    ("latent_attention", "latent", "TritonLatentAttention", "", "split decodes and tiles of prompts, in one order"),
    ("layer_norm", "rows", "TritonNorm", "layer_norm", "whole rows per program, in float32"),
    ("rms_norm", "rows", "TritonNorm", "rms_norm", "whole rows per program, in float32"),
    ("rope", "rows", "TritonRope", "", "some heads of a row per program, in float32"),
    ("linear", "linear", "TritonLinear", "", "summed in float32, in parts of k that the weight's shape decides"),
    ("linear_fp8", "linear", "TritonLinear", "", "8-bit floats, widened on the way to the matrix unit"),
    ("linear_fp8_rows", "linear", "TritonLinear", "", "8-bit floats by 8-bit floats, summed in float32"),
    ("linear_int4", "int4", "TritonInt4Linear", "", "8-bit rows by 4-bit weights, exact within a group or span"),
    ("linear_int8", "linear", "TritonLinear", "", "8-bit rows by 8-bit weights, summed in whole numbers"),
    ("moe", "moe", "TritonMoe", "", "experts' products in one launch, of every format"),
    ("sample", "sampling", "TritonSampling", "sample", _NOTE_OF_SAMPLING),
    ("token_logprobs", "sampling", "TritonSampling", "token_logprobs", _NOTE_OF_SAMPLING),
)


def implementations() -> list[Implementation]:
    return [
        Implementation(
            op=op,
            backend="triton",
            build=_builder(module, name, method),
            unfit=Target.unfit_for_fp8_rows if op == "linear_fp8_rows" else Target.unfit_for_triton,
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
