"""What a running engine tells its front end about the model it serves."""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.pooling import PoolingInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsInfo:
    """Where an engine publishes its KV events (ZeroMQ addresses, as bound), and under which topic."""

    endpoint: str
    topic: str
    replay_endpoint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """`eos_token_ids` end a sequence unless the request ignores them; bytes are of what the engine holds. `pooling`:
    None for a model that generates text. `num_token_types`: kinds of tokens that it tells apart by
    `EngineRequest.token_type_ids`; 0 or 1 for none. `max_num_queued_reqs` and `max_num_queued_tokens`: of what waits
    for a place in a step; more is refused. `kv_events`: None if there are none."""

    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    architecture: str
    weight_bytes: int
    kv_bytes_per_token: int
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 4_000_000
    max_logprobs: int = 20
    pooling: PoolingInfo | None = None
    num_token_types: int = 0
    kv_events: KVEventsInfo | None = None
