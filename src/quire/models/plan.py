"""What a model takes and what fits, told from config.json and the headers of the weight files alone.

The sizes are the engine's own: the same ledger (`cache/ledger.py`) sizes the KV pool when an engine starts. The decode
rate is what memory allows: a step reads every weight and the KV of its requests once. The prefill rate is a rough guess
from a product of matrices. Both are measured in a moment, and come out low on a machine that is busy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from quire.cache.groups import ALL_OF_THE_PAST, token_capacity
from quire.cache.ledger import KVLedger, available_memory
from quire.config.engine import EngineConfig
from quire.config.sizes import Sizes, sizes_of
from quire.core.errors import CheckpointError, UnknownArchitecture
from quire.core.json_file import shorten
from quire.models.arch import Arch
from quire.models.checkpoint import Checkpoint
from quire.models.dtype import resolve_dtype
from quire.models.fallback.choice import by_transformers
from quire.models.fit import DTYPE_BYTES, Fit, build_ledger, format_bytes, judge
from quire.models.machine import measure_bandwidth, measure_flops
from quire.models.parameters import Parameter, elements_per_row, list_parameters
from quire.models.serving import check_wish, identify_served, read_serving
from quire.models.shapes import Shapes, guess_shapes, shapes_of
from quire.models.slots import EMBEDDING, HEAD, PER_LAYER_EMBEDDING
from quire.ops.cpu.library import REFERENCE, usable_isas
from quire.ops.triton.library import TRITON

CONTEXTS = (1024, 4096)
RATE_CONTEXT = 1024
RATE_BATCHES = (1, 8, 32)

_FLOATS = ("F64", "F32", "F16", "BF16")  # these are converted to the dtype that is run; the others stay as stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes in bytes, lengths in tokens, rates in tokens per second; None where config.json does not tell.

    * `device`: cpu or gpu.
    * `served_by`: quire's own decoder or transformers; None for a model that cannot be run.
    * `weight_bytes_by_dtype` is as stored (the format's names); `weight_bytes` as run, in `dtype` or quantised, and
      `weight_bytes_by_format` the same in its parts (empty where the architecture is unknown).
    * `table_bytes`: the rotary positions' cosines and sines. `captured_bytes`: of a GPU's captured steps and kernels.
    * `longest` is the model's context; `max_model_len` what one request can have here.
    * `kv_bytes_per_token`: of all layers. `kv_groups`: groups of `kv_layers_per_group` layers that share a block table
      (`cache.groups`), by what they see of the past. `num_kv_tokens`: what the KV cache holds of requests so short that
      no window or chunk has hidden any of their tokens.
    * `num_sequences`: how many requests of a length (prompt plus output) the KV cache holds at once.
    * `decode_tokens_per_s`: of so many requests at once, each with `RATE_CONTEXT` tokens, all together.
    * `tasks`: what it does: `generate`, or the tasks of a pooling model; empty where the architecture is unknown.
    * `fits` is about memory; `verdict` says it in words, `suggestions` what to try.
    """

    model: str
    device: str
    architecture: str
    known: bool
    tasks: tuple[str, ...]
    served_by: str | None
    dtype: str
    num_parameters: int
    weight_bytes_by_dtype: Mapping[str, int]
    weight_bytes: int
    weight_bytes_by_format: Mapping[str, int]
    table_bytes: int | None
    activation_bytes: int | None
    captured_bytes: int | None
    kv_bytes_per_token: int | None
    kv_groups: Mapping[str, int]
    kv_layers_per_group: int | None
    memory_available: int
    kv_cache_bytes: int | None
    num_kv_tokens: int | None
    longest: int | None
    max_model_len: int | None
    num_sequences: Mapping[int, int]
    fits: bool
    verdict: str
    suggestions: tuple[str, ...]
    notes: tuple[str, ...]
    bandwidth: float
    flops: float
    decode_tokens_per_s: Mapping[int, float]
    prefill_tokens_per_s: float | None

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Name and value for a table, in reading order."""
        known = "" if self.known else " (unknown architecture)"
        stored = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.weight_bytes_by_dtype.items())
        rows = [
            ("model", self.model),
            ("architecture", f"{self.architecture}{known}"),
            ("tasks", ", ".join(self.tasks) or "unknown"),
            ("served by", self.served_by or "nothing: it cannot be run"),
            ("parameters", f"{self.num_parameters:,}"),
            ("weights as stored", stored or "none"),
            (f"weights as run ({_formats(self)})", format_bytes(self.weight_bytes)),
            ("rotary positions", format_bytes(self.table_bytes)),
            ("activations of one step", format_bytes(self.activation_bytes)),
            *([("captured steps, kernels", format_bytes(self.captured_bytes))] if self.captured_bytes else []),
            ("KV cache per token", format_bytes(self.kv_bytes_per_token)),
            *_group_rows(self),
            (f"memory available, {self.device}", format_bytes(self.memory_available)),
            ("KV cache", f"{format_bytes(self.kv_cache_bytes)} ({_count(self.num_kv_tokens)} tokens)"),
            ("longest request", f"{_count(self.max_model_len)} of the model's {_count(self.longest)} tokens"),
        ]
        rows += [(f"requests of {length:,} tokens", _count(count)) for length, count in self.num_sequences.items()]
        rows.append(("verdict", self.verdict))
        rows += [("suggestion", text) for text in self.suggestions]
        rows += [("note", text) for text in self.notes]
        rows.append(("machine", f"{self.bandwidth / 1e9:,.1f} GB/s, {self.flops / 1e9:,.0f} GFLOP/s"))
        rows += [
            (f"decode, {batch} at once", f"{rate:,.0f} tokens/s at that bandwidth")
            for batch, rate in self.decode_tokens_per_s.items()
        ]
        if self.prefill_tokens_per_s is not None:
            rows.append(("prefill", f"about {self.prefill_tokens_per_s:,.0f} tokens/s at that rate"))
        return rows


def plan_model(
    directory: Path,
    config: EngineConfig,
    *,
    memory_available: int | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    gpu: bool = False,
) -> Plan:
    """The plan for the checkpoint in `directory` under `config`'s limits, on a CPU or a GPU.

    Memory in bytes, bandwidth in bytes/s and flops in operations/s are this machine's CPU's, measured, unless given
    (0.3 s; flops in float32). Raises
    CheckpointError for a checkpoint whose headers are broken. An unknown architecture is planned all the same, as far
    as its config.json names its sizes.
    """
    checkpoint = Checkpoint.open(directory)
    model = _identify(checkpoint, config)
    dtype = resolve_dtype(config.dtype, checkpoint, "cuda" if gpu else "cpu")
    compiled = not gpu and dtype == "bfloat16" and config.isa not in (REFERENCE, TRITON) and bool(usable_isas())
    if model.parameters:
        weights = _weights_as_run(model.parameters, dtype, compiled=compiled)
    else:
        weights = _weights_as_guessed(checkpoint, dtype)
    available = available_memory() if memory_available is None else memory_available
    if bandwidth is None:
        bandwidth = measure_bandwidth(config.threads or len(os.sched_getaffinity(0)))
    if flops is None:
        flops = measure_flops()
    ledger, token_bytes, read_bytes = None, None, 0
    if model.shapes is None:
        fits = weights.run_bytes < available
        fit = Fit(fits, f"The weights {'fit' if fits else 'do not fit'}; the KV cache is unknown.")
    else:
        ledger = build_ledger(
            config, model.shapes, weight_bytes=weights.run_bytes, dtype=dtype, available=available, gpu=gpu
        )
        token_bytes, read_bytes = _kv_bytes(ledger, model.shapes)
        fit = judge(ledger, dtype=dtype, runnable=model.served_by is not None)
    cache = _cache(config, ledger if fit.fits else None)
    return Plan(
        model=str(directory),
        device="gpu" if gpu else "cpu",
        architecture=model.name,
        known=model.known,
        tasks=_tasks(model.arch),
        served_by=model.served_by,
        dtype=dtype,
        num_parameters=sum(tensor.num_elements for tensor in checkpoint.tensors.values()),
        weight_bytes_by_dtype=_bytes_by_dtype(checkpoint),
        weight_bytes=weights.run_bytes,
        weight_bytes_by_format=weights.by_format,
        table_bytes=ledger.table_bytes if ledger else None,
        activation_bytes=ledger.activation_bytes if ledger else None,
        captured_bytes=ledger.captured_bytes if ledger else None,
        kv_bytes_per_token=token_bytes,
        kv_groups=_count_groups(ledger) if ledger else {},
        kv_layers_per_group=ledger.groups.layers_per_group if ledger else None,
        memory_available=available,
        kv_cache_bytes=cache.num_bytes,
        num_kv_tokens=cache.num_tokens,
        longest=ledger.longest if ledger else None,
        max_model_len=cache.max_model_len,
        num_sequences=cache.num_sequences,
        fits=fit.fits,
        verdict=fit.verdict,
        suggestions=fit.suggestions,
        notes=model.notes,
        bandwidth=bandwidth,
        flops=flops,
        decode_tokens_per_s=_decode_rates(sizes_of(config, gpu=gpu), weights, read_bytes, bandwidth),
        prefill_tokens_per_s=flops / (2 * weights.step_elements) if weights.step_elements else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What config.json tells. `known`: the architecture is one of ours, or of transformers; `served_by` is None for one
    that cannot be run, and `arch` for one that is not ours."""

    name: str
    known: bool
    served_by: str | None = None
    arch: Arch | None = None
    parameters: Sequence[Parameter] = ()
    shapes: Shapes | None
    notes: tuple[str, ...] = ()


def _identify(checkpoint: Checkpoint, config: EngineConfig) -> _Model:
    name = _architecture(checkpoint)
    try:
        serving = read_serving(config)
        if by_transformers(checkpoint.config, config.model_impl):
            check_wish(checkpoint, serving)
            return _of_transformers(name, checkpoint, config)
        served = identify_served(checkpoint, serving)
        checkpoint, family, arch = served.checkpoint, served.family, served.arch
        parameters = list_parameters(checkpoint, family, arch, quantization=config.quantization)
    except CheckpointError as error:
        known = not isinstance(error, UnknownArchitecture)
        shapes = guess_shapes(checkpoint.config)
        notes = [f"It cannot be run: {error.message}" if known else f"Unknown architecture. {error.remedy}"]
        notes.append(
            "Its sizes are estimates, by the usual names in config.json."
            if shapes
            else "config.json does not name the sizes that the KV cache depends on."
        )
        return _Model(name=name, known=known, shapes=shapes, notes=tuple(notes))
    longest = arch.longest_context
    notes = []
    if config.max_model_len is not None and config.max_model_len > longest:
        notes.append(f"It will not start: max_model_len is {config.max_model_len}, its positions end at {longest}.")
    shapes = shapes_of(arch)
    return _Model(
        name=name, known=True, served_by="quire", arch=arch, parameters=parameters, shapes=shapes, notes=tuple(notes)
    )


def _of_transformers(name: str, checkpoint: Checkpoint, config: EngineConfig) -> _Model:
    from quire.models.fallback.known import know

    text = know(checkpoint, config.quantization).config.get_text_config(decoder=True)
    notes = [
        "Served by transformers, whose code is slower than quire's own. Its sizes are estimates: attention is looked "
        "at when the model is loaded, and a model that paged attention cannot serve is refused then."
    ]
    return _Model(
        name=name, known=True, served_by="transformers", shapes=guess_shapes(text.to_dict()), notes=tuple(notes)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cache:
    num_bytes: int | None = None
    num_tokens: int | None = None
    max_model_len: int | None = None
    num_sequences: Mapping[int, int]


def _cache(config: EngineConfig, ledger: KVLedger | None) -> _Cache:
    """What the KV cache holds; nothing is said of one that is unknown or does not fit. Block 0 is nobody's."""
    if ledger is None:
        return _Cache(num_sequences={})
    num_blocks = config.num_kv_blocks or ledger.num_blocks
    sights = ledger.groups.sights
    wanted = ledger.required_len or ledger.longest
    max_model_len = token_capacity(sights, num_blocks - 1, config.block_size, wanted)
    lengths = sorted({*(length for length in CONTEXTS if length < max_model_len), max_model_len})
    return _Cache(
        num_bytes=num_blocks * ledger.kv_bytes_per_block,
        num_tokens=(num_blocks - 1) // len(sights) * config.block_size,
        max_model_len=max_model_len,
        num_sequences={length: ledger.num_sequences(length, num_blocks) for length in lengths},
    )


def _kv_bytes(ledger: KVLedger, shapes: Shapes) -> tuple[int, int]:
    """K and V of one token in all layers; and what one token, after `RATE_CONTEXT` - 1 others, reads of them all."""
    size, per_block = ledger.groups.layers_per_group * ledger.block_size, ledger.kv_bytes_per_block
    read = sum(count * min(RATE_CONTEXT, sight.reach or RATE_CONTEXT) for sight, count in shapes.layers.items())
    return sum(shapes.layers.values()) * per_block // size, read * per_block // size


def _count_groups(ledger: KVLedger) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sight in ledger.groups.sights:
        counts[str(sight)] = counts.get(str(sight), 0) + 1
    return counts


def _group_rows(plan: Plan) -> list[tuple[str, str]]:
    """Nothing where all layers see all of the past."""
    if plan.kv_groups in ({}, {str(ALL_OF_THE_PAST): 1}):
        return []
    size = plan.kv_layers_per_group
    groups = ", ".join(f"{count} with {sight}" for sight, count in plan.kv_groups.items())
    return [(f"KV groups of {size} layers", f"{groups}; what is out of sight is freed")]


@dataclass(frozen=True, slots=True)
class _Weights:
    """Bytes held when run; bytes and elements that every step reads (an input embedding of its own is looked up)."""

    run_bytes: int
    step_bytes: int
    step_elements: int
    by_format: Mapping[str, int] = field(default_factory=dict)


def _weights_as_run(parameters: Sequence[Parameter], dtype: str, *, compiled: bool) -> _Weights:
    dtype_bytes = DTYPE_BYTES[dtype]
    by_format: dict[str, int] = {}
    for parameter in parameters:
        name = parameter.scheme.format if parameter.scheme else dtype
        by_format[name] = by_format.get(name, 0) + parameter.nbytes(dtype_bytes, compiled=compiled)
    head = any(parameter.path == HEAD for parameter in parameters)
    looked_up = {PER_LAYER_EMBEDDING, EMBEDDING} if head else {PER_LAYER_EMBEDDING}
    read = [parameter for parameter in parameters if parameter.path not in looked_up]
    return _Weights(
        run_bytes=sum(by_format.values()),
        step_bytes=sum(parameter.nbytes(dtype_bytes, compiled=compiled) for parameter in read),
        step_elements=elements_per_row(read),
        by_format=by_format,
    )


def _weights_as_guessed(checkpoint: Checkpoint, dtype: str) -> _Weights:
    """Of a model that cannot be run: by the usual names of its tensors, quantised ones as they are stored."""
    run_bytes = step_bytes = step_elements = 0
    head = any(name.endswith("lm_head.weight") for name in checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        size = tensor.num_elements * DTYPE_BYTES[dtype] if tensor.dtype in _FLOATS else tensor.nbytes
        run_bytes += size
        if not (head and "embed_tokens" in name):
            step_bytes += size
            step_elements += tensor.num_elements
    return _Weights(run_bytes, step_bytes, step_elements)


def _tasks(arch: Arch | None) -> tuple[str, ...]:
    if arch is None:
        return ()
    return ("generate",) if arch.pooling is None else tuple(task.value for task in arch.pooling.tasks)


def _formats(plan: Plan) -> str:
    if len(plan.weight_bytes_by_format) < 2:
        return plan.dtype
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.weight_bytes_by_format.items())


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return shorten(names[0], 100)
    return "unnamed"


def _bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _decode_rates(sizes: Sizes, weights: _Weights, read_bytes: int, bandwidth: float) -> dict[int, float]:
    """By memory alone: the arithmetic measured on a CPU is numpy's in float32, which is no bound on other dtypes.
    `read_bytes`: of KV, per request."""
    if not weights.step_bytes:
        return {}
    most = sizes.max_num_seqs
    batches = sorted(batch for batch in {*RATE_BATCHES, most} if batch <= most)
    return {batch: batch * bandwidth / (weights.step_bytes + batch * read_bytes) for batch in batches}


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
