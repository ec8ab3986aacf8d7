"""What a front end and its engine say to each other: msgpack of these tagged structs, over a Unix socket.

Front end → engine: `Submit`, `Cancel`, `Stop`. Engine → front end: `Ready` or `StartFailed` once, then `Outputs`
after a step that produced any, and `Stats` at least every `STATS_INTERVAL` seconds: the engine's heartbeat, sent by
the thread that runs the steps, so that an engine which hangs falls silent.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from quire.core.errors import ErrorInfo
from quire.core.model_info import ModelInfo
from quire.core.request import EngineOutput, EngineRequest

STATS_INTERVAL = 0.5
MAX_MESSAGE_BYTES = 256 * 1024 * 1024


class Submit(msgspec.Struct, tag=True, frozen=True):
    requests: Sequence[EngineRequest]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    request_ids: Sequence[str]


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End the process once told; running requests are dropped (the front end has drained before)."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    model: ModelInfo
    pid: int


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    error: ErrorInfo


class Outputs(msgspec.Struct, tag=True, frozen=True):
    outputs: Sequence[EngineOutput]


class Stats(msgspec.Struct, tag=True, frozen=True):
    """Counters are totals since the engine started; gauges are of now.

    `prefill_seconds_per_token`, `decode_seconds_per_step` and `decode_seconds_per_sequence` are of late steps, 0 until
    there was one. `kv_event_batches`: published, those that were dropped (`kv_event_batches_dropped`) not among them.
    """

    step: int
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    num_swaps: int
    prompt_tokens: int
    generation_tokens: int
    iteration_tokens: Sequence[int] = ()
    """Tokens of each step since the last `Stats`."""
    num_cached_blocks: int = 0
    prefill_seconds_per_token: float = 0.0
    decode_seconds_per_step: float = 0.0
    decode_seconds_per_sequence: float = 0.0
    kv_event_batches: int = 0
    kv_event_batches_dropped: int = 0


ToEngine = Submit | Cancel | Stop
FromEngine = Ready | StartFailed | Outputs | Stats

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Raises `msgspec.DecodeError` for anything else than one of ours."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Raises `msgspec.DecodeError` for anything else than one of ours."""
    return _from_engine.decode(data)
