"""`precise-prefix-cache-producer`: what engines' KV events say they hold, by the prompt's very tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from quire.gateway.endpoint import Endpoint
from quire.gateway.kv.index import KVIndex
from quire.gateway.plugin import Parameters, Producer, Services
from quire.gateway.request import InferenceRequest

KV_INDEX: Final = "kv_index"


class PreciseParameters(Parameters, frozen=True):
    """llm-d's; block sizes are learnt from the events, and where to hear them from the endpoints (labels, or their own
    metrics page), so that none of these is needed."""

    token_processor_config: Mapping[str, Any] = {}
    kv_events_config: Mapping[str, Any] = {}
    indexer_config: Mapping[str, Any] = {}
    speculative_indexing: bool = False
    speculative_ttl: str = ""


class PrecisePrefix(Producer):
    def __init__(self, parameters: PreciseParameters, services: Services) -> None:
        self._index: KVIndex = services.shared[KV_INDEX]

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        if request.token_ids is not None and self._index.num_blocks:
            request.prefix[self.name] = self._index.lookup(
                request.token_ids, model=request.target_model, cache_salt=request.cache_salt
            )
