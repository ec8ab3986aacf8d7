"""From a configuration to an engine that can step: load, size, wire. The one place that reads `EngineConfig`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from quire.cache.groups import token_capacity
from quire.cache.journal import CacheJournal
from quire.cache.ledger import GIB, MOST_CAPTURED_TOKENS, KVLedger
from quire.cache.pool import BlockPool
from quire.config.engine import EngineConfig
from quire.config.kv_events import read_kv_events
from quire.config.sizes import sizes_of
from quire.core.errors import ConfigError
from quire.core.model_info import KVEventsInfo, ModelInfo
from quire.engine.device import make_current, memory_for, resolve_device
from quire.engine.early import EarlyWeights, engine_threads, packed_early
from quire.engine.graphs import CudaGraphs, Direct
from quire.engine.kv_publisher import KVEventPublisher
from quire.engine.loop import Engine
from quire.engine.padded import most_padded
from quire.engine.runner import Ahead, Runner
from quire.engine.warm_up import LargestStep
from quire.models.fit import build_ledger, step_tokens
from quire.models.load import LoadedModel, load_model
from quire.models.serving import read_serving
from quire.models.shapes import shapes_of, sights_of
from quire.nn.host_kv import HostKV
from quire.ops.cpu.library import usable_isas
from quire.sched.state import SchedulerLimits, SchedulerState
from quire.text.defaults import eos_token_ids

ASSUMED_FLOPS_PER_CORE = 50e9
"""What a core computes in a prefill, for weighing a swap against computing again. An order of magnitude suffices."""
ASSUMED_FLOPS_PER_GPU = 100e12
ASSUMED_COPY_BYTES_PER_SECOND = 8e9
LONGEST_STEP_SECONDS = 20.0
"""A step that is estimated to take longer gets fewer tokens: the steps are the heartbeat, and silence means death."""
FEWEST_STEP_TOKENS = 128
MAX_NAMES_TOLD = 8


def build_engine(
    config: EngineConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
    early: EarlyWeights | None = None,
    kv_events: KVEventPublisher | None = None,
) -> Engine:
    """`config.model` is a local directory. Raises the `QuireError` that says what is wrong with it or a setting.

    `early`: what was begun with this configuration before torch was imported. `kv_events`: where what is in the prefix
    cache is to be told.
    """
    directory = Path(config.model)
    device = resolve_device(config.device)
    gpu = device.type != "cpu"
    make_current(device)
    sizes = sizes_of(config, gpu=gpu)
    num_threads = engine_threads(config)
    torch.set_num_threads(num_threads)
    packed = None if gpu else packed_early(config) if early is None else early.result()
    if config.packed_weights_cache is not None and packed is None:
        print(
            "quire: packed_weights_cache has no effect: the compiled kernels do not serve this model.", file=sys.stderr
        )
    model = load_model(
        directory,
        dtype=config.dtype,
        quantization=config.quantization,
        device=str(device),
        max_model_len=config.max_model_len,
        threads=num_threads,
        isa=config.isa,
        kv_cache_dtype=config.kv_cache_dtype,
        early=packed,
        serving=read_serving(config),
        model_impl=config.model_impl,
    )
    if any(choice.op == "linear" and choice.implementation == "cpu" for choice in model.decoder.kernels.choices):
        # The kernels have threads of their own; a second pool for what little is left to torch would be in their way.
        torch.set_num_threads(1)
    elif gpu:
        _tell_without_triton(model)
    elif model.dtype == torch.bfloat16 and not usable_isas():
        print("quire: there are no compiled kernels in this installation; computing with torch.", file=sys.stderr)
    if model.served_by != "quire":
        print(f"quire: {model.arch.architecture} is served by {model.served_by}.", file=sys.stderr)
    _tell_unexpected(model)
    ledger = size_cache(config, model)
    num_blocks = config.num_kv_blocks or ledger.num_blocks
    groups, places = ledger.groups, ledger.groups.places(sights_of(model.arch))
    capacity = token_capacity(groups.sights, num_blocks - 1, config.block_size, model.max_model_len)
    max_model_len = min(model.max_model_len, capacity)
    kv = model.new_kv_cache(num_blocks, config.block_size, places=places)
    host_blocks = int(config.swap_space * GIB) // ledger.kv_bytes_per_block
    # Small test models keep the EOS of the tokenizer they were cut from, which their vocabulary may not reach.
    eos = tuple(token_id for token_id in eos_token_ids(directory) if token_id < model.arch.vocab_size)
    flops_per_token = 2 * model.elements_per_row
    seconds_per_token = flops_per_token / (ASSUMED_FLOPS_PER_GPU if gpu else num_threads * ASSUMED_FLOPS_PER_CORE)
    step = _step_tokens(step_tokens(sizes, config, shapes_of(model.arch)), seconds_per_token)
    if not model.arch.causal:  # a prompt is computed in one step
        max_model_len = min(max_model_len, step)
    pooling = model.arch.pooling
    limits = SchedulerLimits(
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=step,
        max_model_len=max_model_len,
        eos_token_ids=eos,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
        scheduling_policy=config.scheduling_policy,
        swap=config.preemption,
        recompute_seconds_per_token=seconds_per_token,
        pooled_rows={} if pooling is None else {task: pooling.rows(task) for task in pooling.tasks},
        whole_prompts=not model.arch.causal,
        swap_seconds_per_block=ledger.kv_bytes_per_block / ASSUMED_COPY_BYTES_PER_SECOND,
    )
    caches = config.enable_prefix_caching and model.arch.causal
    _tell_no_events(config, kv_events, caches)
    journal = None if kv_events is None else CacheJournal(config.block_size, groups.sights)
    state = SchedulerState(
        limits,
        BlockPool(num_blocks, config.block_size, caches, groups.sights, journal),
        # One more for the host pool's own null block.
        BlockPool(host_blocks + 1, config.block_size, False) if host_blocks else None,
    )
    runner = Runner(
        model=model,
        kv=kv,
        host_kv=HostKV(kv, host_blocks + 1) if host_blocks else None,
        eos_token_ids=eos,
        ahead=_ahead(config, model, limits),
    )
    if gpu:
        largest = LargestStep(tokens=step, longest=max_model_len, rows=limits.max_running)
        runner.warm_up(largest, clock)
    info = _info(config, model, limits, num_blocks, None if kv_events is None else kv_events.info)
    return Engine(info=info, state=state, runner=runner, clock=clock, kv_events=kv_events)


def _ahead(config: EngineConfig, model: LoadedModel, limits: SchedulerLimits) -> Ahead | None:
    on_gpu = model.device.type != "cpu"
    if not (on_gpu if config.async_scheduling is None else config.async_scheduling):
        return None
    captures = model.device.type == "cuda" and not config.enforce_eager
    most = min(MOST_CAPTURED_TOKENS, limits.max_num_batched_tokens)
    return Ahead(
        steps=1,
        seats=limits.max_running,
        longest=limits.max_model_len,
        graphs=CudaGraphs() if captures else Direct(),
        padded=most_padded(model.elements_per_row, model.arch.num_layers, most) if captures else 0,
    )


def _info(
    config: EngineConfig,
    model: LoadedModel,
    limits: SchedulerLimits,
    num_blocks: int,
    kv_events: KVEventsInfo | None,
) -> ModelInfo:
    return ModelInfo(
        max_model_len=limits.max_model_len,
        vocab_size=model.arch.vocab_size,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=tuple(limits.eos_token_ids),
        dtype=_dtype_name(model),
        architecture=model.arch.architecture,
        weight_bytes=model.weight_bytes,
        kv_bytes_per_token=model.kv_bytes_per_block(config.block_size) // config.block_size,
        max_num_queued_reqs=limits.max_num_queued_reqs,
        max_num_queued_tokens=limits.max_num_queued_tokens,
        max_logprobs=config.max_logprobs,
        pooling=None if model.arch.pooling is None else model.arch.pooling.info,
        num_token_types=model.arch.num_token_types,
        kv_events=kv_events,
    )


def _step_tokens(wanted: int, seconds_per_token: float) -> int:
    """Tokens of the largest step: `wanted`, or fewer on a machine that is slow for this model, which is then told."""
    affordable = max(FEWEST_STEP_TOKENS, int(LONGEST_STEP_SECONDS / seconds_per_token))
    if wanted > affordable:
        print(
            f"quire: max_num_batched_tokens is lowered from {wanted} to {affordable}: a larger step of this model "
            f"could take over {LONGEST_STEP_SECONDS:g} s here.",
            file=sys.stderr,
        )
    return min(wanted, affordable)


def size_cache(config: EngineConfig, model: LoadedModel) -> KVLedger:
    """The ledger of this model on this machine, checked: raises `NotEnoughMemory` if it cannot work."""
    if config.num_kv_blocks is not None and config.num_kv_blocks < 2:
        raise ConfigError(
            f"num_kv_blocks is {config.num_kv_blocks}.", param="num_kv_blocks", remedy="It must be at least 2."
        )
    ledger = build_ledger(
        config,
        shapes_of(model.arch),
        weight_bytes=model.weight_bytes,
        dtype=_dtype_name(model),
        available=memory_for(model.device) + model.converted_bytes + model.decoder.table_bytes,
        gpu=model.device.type != "cpu",
    )
    if config.num_kv_blocks is None:
        ledger.check()
    return ledger


def _dtype_name(model: LoadedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _tell_without_triton(model: LoadedModel) -> None:
    kernels = model.decoder.kernels
    if kernels.served_by("linear") != "triton":
        reason = next(choice.reason for choice in kernels.choices if choice.op == "linear")
        print(f"quire: computing with torch's own operations, slowly: {reason}.", file=sys.stderr)


def _tell_no_events(config: EngineConfig, kv_events: KVEventPublisher | None, caches: bool) -> None:
    """Events were asked for, and none will come."""
    if read_kv_events(config.kv_events_config).enabled and (kv_events is None or not caches):
        why = "there is no prefix cache" if not caches else "only `quire serve` publishes events"
        print(f"quire: kv_events_config has no effect: {why}.", file=sys.stderr)


def _tell_unexpected(model: LoadedModel) -> None:
    names = model.unexpected_tensors
    if names:
        shown = ", ".join(names[:MAX_NAMES_TOLD]) + (", …" if len(names) > MAX_NAMES_TOLD else "")
        print(
            f"quire: {len(names)} tensors of the checkpoint have no place in {model.arch.architecture} and are not "
            f"used: {shown}",
            file=sys.stderr,
        )
