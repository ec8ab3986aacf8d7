"""`approx-prefix-cache-producer`: which endpoint was sent which prefixes lately.

A prompt is cut into blocks of tokens, or of four bytes for each token where it was not tokenised; each block's key
chains from the one before, the first from the model and the cache salt. Keys are Python's own hashes of bytes: SipHash
under a key that is drawn when the process starts, so that nobody outside can make two prompts collide, and fast.

What an endpoint really evicted is not known. Its LRU here is as large as the cache that it reports; of one that
reports no size, as large as its answers let it seem: they tell how much of a prompt was cached.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Conclusion, Observer, Parameters, Producer, Services
from quire.gateway.producers.prefix_index import PrefixIndex
from quire.gateway.request import InferenceRequest, Outcome, PrefixMatch

BYTES_PER_TOKEN: Final = 4
MIN_BLOCK_TOKENS: Final = 64
MAX_TOKENS: Final = 131_072
MAX_BLOCK_TOKENS: Final = 256
"""However large the blocks that an endpoint reports: what is shared within one block counts for nothing."""
DEFAULT_CAPACITY: Final = 31_250
MIN_CAPACITY: Final = 64
CORRECTION: Final = 0.03
"""Of the capacity, for each answer that says that it is wrong."""


class PrefixParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {"prefixHashSource": "prefixes are always hashed from the request"}
    auto_tune: bool = True
    block_size_tokens: int = 0
    max_prefix_blocks_to_match: int = 0
    max_prefix_tokens_to_match: int | None = None
    """Goes before the number of blocks, unless it is 0. None: as many as are given in blocks, else `MAX_TOKENS`."""
    lru_capacity_per_server: int = 0
    block_size: int = 0
    """Deprecated by llm-d: in bytes."""


def block_keys(request: InferenceRequest, block_tokens: int, max_blocks: int) -> list[int]:
    """Of the full blocks of the prompt."""
    known = request.token_ids is not None or request.prompt_token_ids is not None
    if request.token_ids is not None and request.prompt_token_ids is None:
        prompt = array("I", request.token_ids[: max_blocks * block_tokens]).tobytes()
    else:
        prompt = request.prompt  # the bytes of the ids, where ids were sent
    size = block_tokens * BYTES_PER_TOKEN
    key = hash((request.target_model, request.cache_salt, known))
    keys: list[int] = []
    for start in range(0, min(len(prompt) // size, max_blocks) * size, size):
        key = hash((key, prompt[start : start + size]))
        keys.append(key)
    return keys


def prompt_length(request: InferenceRequest) -> float:
    """In tokens, as blocks count them."""
    ids = request.token_ids if request.token_ids is not None else request.prompt_token_ids
    return len(ids) if ids is not None else len(request.prompt) / BYTES_PER_TOKEN


class ApproxPrefix(Producer, Observer):
    def __init__(self, parameters: PrefixParameters, services: Services) -> None:
        self.name = "approx-prefix-cache-producer"
        self._parameters = parameters
        self._index = PrefixIndex()
        if parameters.max_prefix_tokens_to_match and parameters.max_prefix_blocks_to_match:
            services.warn(
                f"plugin {self.name}: maxPrefixBlocksToMatch has no effect: maxPrefixTokensToMatch goes before it"
            )
        wanted = parameters.block_size_tokens or parameters.block_size // BYTES_PER_TOKEN
        self._block_tokens = max(wanted, 1) if wanted else 0
        self._pool = services.pool
        self._room: dict[str, float] = {}
        """By endpoint that reports no size: blocks, once an answer showed that it holds fewer than thought."""
        services.pool.watch(lambda _: None, self._left)

    def _left(self, endpoint: Endpoint) -> None:
        self._index.remove(endpoint.key)
        self._room.pop(endpoint.key, None)

    def block_tokens(self) -> int:
        if self._block_tokens and not self._parameters.auto_tune:
            return self._block_tokens
        reported = [one.metrics.block_size for one in self._pool if one.metrics and one.metrics.block_size]
        return max(min(max(reported, default=0), MAX_BLOCK_TOKENS), self._block_tokens or MIN_BLOCK_TOKENS)

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        size = self.block_tokens()
        keys = block_keys(request, size, self._max_blocks(size))
        request.attributes[self.name] = keys
        request.prefix[self.name] = self._matches(request, keys, size)

    def _max_blocks(self, size: int) -> int:
        tokens, blocks = self._parameters.max_prefix_tokens_to_match, self._parameters.max_prefix_blocks_to_match
        if tokens is None:
            tokens = 0 if blocks else MAX_TOKENS
        return tokens // size or blocks or 2**31 // size

    def _matches(self, request: InferenceRequest, keys: Sequence[int], size: int) -> Mapping[str, PrefixMatch]:
        """Blocks may be of bytes: what counts is their share of the prompt."""
        length = prompt_length(request)
        found: dict[str, PrefixMatch] = {}
        for key, count in self._index.match(keys).items():
            tokens = round(request.prompt_tokens * min(count * size / length, 1.0))
            found[key] = PrefixMatch(tokens, float(tokens))
        return found

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        keys = request.attributes.get(self.name)
        if isinstance(keys, list) and keys:
            self._index.add(endpoint.key, keys, self._reported(endpoint) or self._assumed(endpoint))

    def _reported(self, endpoint: Endpoint) -> int:
        """Blocks that its cache holds; 0 where that is not known, or not wanted."""
        metrics = endpoint.metrics
        if not self._parameters.auto_tune or metrics is None or not metrics.num_blocks or not metrics.block_size:
            return 0
        return max(metrics.num_blocks * metrics.block_size // self.block_tokens(), 1)

    def _assumed(self, endpoint: Endpoint) -> int:
        most = self._parameters.lru_capacity_per_server or DEFAULT_CAPACITY
        return min(most, int(self._room.get(endpoint.key, most)))

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        """Where the answer says how much was cached, the room assumed is corrected: less than what is kept here, if
        something was thought to be there and was not; more, if it was there and not known."""
        if (
            not outcome.ok
            or outcome.cached_tokens is None
            or not self._parameters.auto_tune
            or self._reported(endpoint)
            or self._pool.get(endpoint.key) is not endpoint
        ):
            return
        match = request.prefix.get(self.name, {}).get(endpoint.key)
        thought, slack = 0 if match is None else match.tokens, self.block_tokens()
        key, assumed = endpoint.key, self._assumed(endpoint)
        if outcome.cached_tokens < thought // 2 - slack:
            self._room[key] = max(min(self._index.size(key), assumed) * (1.0 - CORRECTION), MIN_CAPACITY)
        elif outcome.cached_tokens > 2 * thought + slack and key in self._room:
            self._room[key] *= 1.0 + CORRECTION
