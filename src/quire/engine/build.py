"""From a configuration to an engine that can step: load, size, wire. The one place that reads `EngineConfig`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from quire.cache.ledger import GIB, KVLedger, activation_bytes, available_memory
from quire.cache.pool import BlockPool
from quire.config.engine import EngineConfig
from quire.core.errors import ConfigError
from quire.core.model_info import ModelInfo
from quire.engine.loop import Engine
from quire.engine.runner import Runner
from quire.models.load import LoadedModel, load_model
from quire.sched.state import SchedulerLimits, SchedulerState
from quire.text.defaults import eos_token_ids

ASSUMED_FLOPS_PER_CORE = 50e9
"""What a core computes in a prefill, for weighing a swap against computing again. An order of magnitude suffices."""
ASSUMED_COPY_BYTES_PER_SECOND = 8e9


def build_engine(config: EngineConfig, *, clock: Callable[[], float] = time.monotonic) -> Engine:
    """`config.model` is a local directory. Raises the `QuireError` that says what is wrong with it or a setting."""
    directory = Path(config.model)
    num_threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    model = load_model(directory, dtype=config.dtype, max_model_len=config.max_model_len)
    ledger = size_cache(config, model)
    num_blocks = config.num_kv_blocks or ledger.num_blocks
    max_model_len = min(ledger.max_model_len, (num_blocks - 1) * config.block_size)
    kv = model.new_kv_cache(num_blocks, config.block_size)
    host_blocks = int(config.swap_space * GIB) // ledger.kv_bytes_per_block
    eos = eos_token_ids(directory)
    flops_per_token = 2 * model.weight_bytes / torch.empty((), dtype=model.dtype).element_size()
    limits = SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        eos_token_ids=eos,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        scheduling_policy=config.scheduling_policy,
        swap=config.preemption,
        recompute_seconds_per_token=flops_per_token / (num_threads * ASSUMED_FLOPS_PER_CORE),
        swap_seconds_per_block=ledger.kv_bytes_per_block / ASSUMED_COPY_BYTES_PER_SECOND,
    )
    state = SchedulerState(
        limits,
        BlockPool(num_blocks, config.block_size, config.enable_prefix_caching),
        # One more for the host pool's own null block.
        BlockPool(host_blocks + 1, config.block_size, False) if host_blocks else None,
    )
    runner = Runner(
        model=model,
        kv=kv,
        host_kv=model.new_kv_cache(host_blocks + 1, config.block_size) if host_blocks else None,
        eos_token_ids=eos,
    )
    info = ModelInfo(
        max_model_len=max_model_len,
        vocab_size=model.arch.vocab_size,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=eos,
        dtype=str(model.dtype).removeprefix("torch."),
        architecture=model.arch.architecture,
        weight_bytes=model.weight_bytes,
        kv_bytes_per_token=ledger.kv_bytes_per_block // config.block_size,
        max_logprobs=config.max_logprobs,
    )
    return Engine(info=info, state=state, runner=runner, clock=clock)


def size_cache(config: EngineConfig, model: LoadedModel) -> KVLedger:
    """The ledger of this model on this machine, checked: raises `NotEnoughMemory` if it cannot work."""
    arch = model.arch
    ledger = KVLedger(
        memory_available=available_memory() - int(config.swap_space * GIB),
        weight_bytes=model.weight_bytes,
        activation_bytes=activation_bytes(
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.intermediate_size,
            attention_size=arch.num_heads * arch.head_dim,
            kv_size=arch.num_kv_heads * arch.head_dim,
            vocab_size=arch.vocab_size,
            dtype_bytes=torch.empty((), dtype=model.dtype).element_size(),
        ),
        kv_bytes_per_block=model.kv_bytes_per_block(config.block_size),
        block_size=config.block_size,
        longest=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        memory_utilization=config.memory_utilization,
        kv_cache_memory=None if config.kv_cache_memory is None else int(config.kv_cache_memory * GIB),
        required_len=config.max_model_len,
    )
    if config.num_kv_blocks is None:
        ledger.check()
    elif config.num_kv_blocks < 2:
        raise ConfigError(
            f"num_kv_blocks is {config.num_kv_blocks}.", param="num_kv_blocks", remedy="It must be at least 2."
        )
    return ledger
