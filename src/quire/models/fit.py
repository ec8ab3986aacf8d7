"""Whether a model fits the memory that is there, and which flags would change that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from quire.cache.groups import group_layers
from quire.cache.ledger import GIB, KERNELS_BYTES, MOST_CAPTURED_TOKENS, KVLedger, activation_bytes
from quire.config.engine import EngineConfig
from quire.config.sizes import Sizes, sizes_of
from quire.core.errors import NotEnoughMemory
from quire.core.kv_format import resolve_kv_dtype
from quire.models.shapes import Shapes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Fit:
    """`verdict` in words; `suggestions` are flags, or what is missing."""

    fits: bool
    verdict: str
    suggestions: tuple[str, ...] = ()


def build_ledger(
    config: EngineConfig, shapes: Shapes, *, weight_bytes: int, dtype: str, available: int, gpu: bool = False
) -> KVLedger:
    """The ledger of an engine with these settings and a model of these sizes. `plan` asks before the model is loaded,
    the engine afterwards; `available` is without its weights and tables either way, on the `gpu` if there is one."""
    sizes = sizes_of(config, gpu=gpu)
    groups = group_layers(shapes.layers, config.max_model_len or shapes.longest)
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, dtype)
    bytes_per_block = shapes.kv_bytes_per_block(kv_dtype, config.block_size, groups.layers_per_group)
    kv_cache_memory = None if config.kv_cache_memory is None else int(config.kv_cache_memory * GIB)
    if config.num_kv_blocks is not None:
        kv_cache_memory = config.num_kv_blocks * bytes_per_block
    largest = step_tokens(sizes, config, shapes)

    def activations(tokens: int) -> int:
        return activation_bytes(
            max_num_batched_tokens=tokens,
            hidden_size=shapes.hidden_size,
            intermediate_size=shapes.intermediate_size,
            attention_size=shapes.attention_size,
            kv_size=max(sum(count * width for count, width in rows) for rows in shapes.kv_rows) // 2,
            vocab_size=shapes.vocab_size,
            dtype_bytes=DTYPE_BYTES[dtype],
        )

    captured = 0 if config.enforce_eager else activations(max(sizes.max_num_seqs, min(MOST_CAPTURED_TOKENS, largest)))
    return KVLedger(
        memory_available=available - (0 if gpu else int(config.swap_space * GIB)),
        weight_bytes=weight_bytes,
        activation_bytes=activations(largest),
        kv_bytes_per_block=bytes_per_block,
        groups=groups,
        step_tokens=largest,
        block_size=config.block_size,
        longest=shapes.longest,
        max_num_seqs=sizes.max_num_seqs,
        memory_utilization=sizes.memory_utilization,
        kv_cache_memory=kv_cache_memory,
        required_len=config.max_model_len,
        table_bytes=shapes.table_bytes(config.max_model_len or shapes.longest),
        captured_bytes=captured + KERNELS_BYTES if gpu else 0,
    )


def step_tokens(sizes: Sizes, config: EngineConfig, shapes: Shapes) -> int:
    """Of the largest step: as asked for, or more if a prompt must be computed whole."""
    if not shapes.whole_prompts:
        return sizes.max_num_batched_tokens
    return max(sizes.max_num_batched_tokens, config.max_model_len or shapes.longest)


def judge(ledger: KVLedger, *, dtype: str, runnable: bool) -> Fit:
    """What the ledger says of the model, in words, and what to try. `runnable`: whether the engine has its family."""
    try:
        ledger.check()
    except NotEnoughMemory as error:
        return Fit(False, f"Does not fit: {error.message.splitlines()[0]}", _remedies(ledger, dtype))
    verb = "Fits" if runnable else "Would fit, if it could be run"
    wanted = ledger.required_len or ledger.longest
    if ledger.max_model_len >= wanted:
        return Fit(True, f"{verb}, with the whole context of {wanted:,} tokens.")
    shorter = f"{verb}, with {ledger.max_model_len:,} of the model's {ledger.longest:,} tokens of context."
    return Fit(True, shorter, _for_length(ledger, ledger.longest))


def _remedies(ledger: KVLedger, dtype: str) -> tuple[str, ...]:
    found: list[str] = []
    if ledger.kv_cache_memory is not None and ledger.kv_cache_memory > ledger.memory_left:
        room = _floor(ledger.memory_left / GIB)
        if room > 0 and room * GIB >= _bytes_for(ledger, ledger.smallest_len):
            found.append(f"--kv-cache-memory {room:g}")
    elif ledger.memory_left > 0:
        found.extend(_for_length(ledger, ledger.smallest_len))
        length = _length_that_fits(ledger) if ledger.required_len else 0
        if length:
            found.append(f"--max-model-len {length}")
    if dtype == "float32":
        found.append("--dtype bfloat16")
    if ledger.step_tokens > 256 and ledger.activation_bytes > ledger.memory_available // 10:
        found.append("--max-num-batched-tokens 256")
    missing = _bytes_for(ledger, ledger.smallest_len) - ledger.memory_left
    if missing > 0:
        found.append(f"{format_bytes(missing)} more memory")
    return tuple(found)


def _length_that_fits(ledger: KVLedger) -> int:
    """What `max_model_len` may be; 0 if nothing."""
    length = ledger.capacity
    while length > 0:
        fitting = _for_context(ledger, length).capacity
        if fitting >= length:
            break
        length = fitting
    return length


def _for_context(ledger: KVLedger, length: int) -> KVLedger:
    """The ledger if `max_model_len` is `length`: in a shorter context fewer windows matter, and groups are larger."""
    groups = group_layers(ledger.groups.counts, length)
    bytes_per_block = ledger.kv_bytes_per_block * groups.layers_per_group // ledger.groups.layers_per_group
    return replace(ledger, required_len=length, groups=groups, kv_bytes_per_block=bytes_per_block)


def _for_length(ledger: KVLedger, length: int) -> tuple[str, ...]:
    """The flag that gives one request room for `length` tokens, if memory has it."""
    needed = _bytes_for(ledger, length)
    if ledger.kv_cache_memory is not None:
        room = _ceil(needed / GIB)  # rounded up, it may be more than there is
        return (f"--kv-cache-memory {room:g}",) if room * GIB <= ledger.memory_left else ()
    share = _ceil(needed / ledger.memory_left)
    return (f"--memory-utilization {share:g}",) if share <= 0.95 else ()


def _bytes_for(ledger: KVLedger, length: int) -> int:
    return (ledger.blocks_for(length) + 1) * ledger.kv_bytes_per_block


def _ceil(value: float) -> float:
    return math.ceil(value * 100) / 100


def _floor(value: float) -> float:
    return math.floor(value * 100) / 100


def format_bytes(num_bytes: int | None) -> str:
    """With a binary unit."""
    if num_bytes is None:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes} bytes"
