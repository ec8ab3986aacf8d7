"""`approx-prefix-cache-producer`: which endpoint was sent which prefixes lately.

A prompt is cut into blocks of tokens, or of four bytes for each token where it was not tokenised; each block's key
chains from the one before, the first from the model and the cache salt. Keys are Python's own hashes: SipHash under a
key that is drawn when the process starts, so that nobody outside can make two prompts collide, and fast. What an
endpoint really evicted is not known; its LRU here is as large as the cache that it reports.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Conclusion, Observer, Parameters, Producer, Services
from quire.gateway.request import InferenceRequest, Outcome, PrefixMatch

BYTES_PER_TOKEN: Final = 4
MIN_BLOCK_TOKENS: Final = 64
DEFAULT_CAPACITY: Final = 31_250
MAX_KEYS: Final = 4_000_000
"""Over all endpoints: some 400 MB."""


class PrefixParameters(Parameters, frozen=True):
    auto_tune: bool = True
    block_size_tokens: int = 0
    max_prefix_blocks_to_match: int = 0
    max_prefix_tokens_to_match: int = 131_072
    lru_capacity_per_server: int = 0
    block_size: int = 0
    """Deprecated by llm-d: in bytes."""


class PrefixIndex:
    """Keys of blocks by endpoint, each endpoint's the last `capacity` that it was sent."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._holders: dict[int, set[str]] = {}
        self._kept: dict[str, OrderedDict[int, None]] = {}
        self._max_keys = max_keys
        self._num_keys = 0

    def __len__(self) -> int:
        return self._num_keys

    def match(self, keys: Sequence[int]) -> dict[str, int]:
        """By endpoint: how many of the keys it has, from the first on without a gap."""
        found: dict[str, int] = {}
        alive: set[str] | None = None
        for count, key in enumerate(keys):
            holders = self._holders.get(key)
            still = set() if holders is None else set(holders) if alive is None else alive & holders
            for lost in (alive or set()) - still:
                found[lost] = count
            alive = still
            if not still:
                return found
        return found | dict.fromkeys(alive or (), len(keys))

    def add(self, endpoint: str, keys: Sequence[int], capacity: int) -> None:
        """The endpoint has these now, used last. The end of a prompt goes before its beginning."""
        kept = self._kept.setdefault(endpoint, OrderedDict())
        for key in reversed(keys):
            if key in kept:
                kept.move_to_end(key)
            else:
                kept[key] = None
                self._holders.setdefault(key, set()).add(endpoint)
                self._num_keys += 1
        while len(kept) > capacity:
            self._drop(endpoint, kept)
        while self._num_keys > self._max_keys:
            most = max(self._kept, key=lambda name: len(self._kept[name]))
            self._drop(most, self._kept[most])

    def _drop(self, endpoint: str, kept: OrderedDict[int, None]) -> None:
        key, _ = kept.popitem(last=False)
        self._num_keys -= 1
        holders = self._holders[key]
        holders.discard(endpoint)
        if not holders:
            del self._holders[key]

    def remove(self, endpoint: str) -> None:
        kept = self._kept.get(endpoint)
        while kept:
            self._drop(endpoint, kept)
        self._kept.pop(endpoint, None)


def block_keys(request: InferenceRequest, block_tokens: int, max_blocks: int) -> list[int]:
    """Of the full blocks of the prompt."""
    key = hash((request.target_model, request.cache_salt))
    keys: list[int] = []
    ids = request.token_ids if request.token_ids is not None else request.prompt_token_ids
    if ids is not None:
        for start in range(0, min(len(ids) // block_tokens, max_blocks) * block_tokens, block_tokens):
            key = hash((key, tuple(ids[start : start + block_tokens])))
            keys.append(key)
        return keys
    prompt, size = request.prompt, block_tokens * BYTES_PER_TOKEN
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
        self._parameters = parameters
        self._index = PrefixIndex()
        wanted = parameters.block_size_tokens or parameters.block_size // BYTES_PER_TOKEN
        self._block_tokens = max(wanted, 1) if wanted else 0
        self._pool = services.pool
        self._keys: OrderedDict[str, list[int]] = OrderedDict()
        """By request id, of requests that were not sent yet."""
        services.pool.watch(lambda _: None, lambda endpoint: self._index.remove(endpoint.key))

    def block_tokens(self) -> int:
        if self._block_tokens and not self._parameters.auto_tune:
            return self._block_tokens
        reported = [one.metrics.block_size for one in self._pool if one.metrics and one.metrics.block_size]
        if reported:
            return max(*reported, MIN_BLOCK_TOKENS) if not self._block_tokens else max(*reported, self._block_tokens)
        return self._block_tokens or MIN_BLOCK_TOKENS

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        size = self.block_tokens()
        most = self._parameters.max_prefix_tokens_to_match // size or self._parameters.max_prefix_blocks_to_match
        keys = block_keys(request, size, most or 2**31)
        self._keys[request.id] = keys
        while len(self._keys) > 65_536:
            self._keys.popitem(last=False)
        request.prefix[self.name] = self._matches(request, keys, size)

    def _matches(self, request: InferenceRequest, keys: Sequence[int], size: int) -> Mapping[str, PrefixMatch]:
        """Blocks may be of bytes: what counts is their share of the prompt."""
        length = prompt_length(request)
        found: dict[str, PrefixMatch] = {}
        for key, count in self._index.match(keys).items():
            tokens = round(request.prompt_tokens * min(count * size / length, 1.0))
            found[key] = PrefixMatch(tokens, float(tokens))
        return found

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        keys = self._keys.pop(request.id, None)
        if keys:
            self._index.add(endpoint.key, keys, self._capacity(endpoint))
            self._keys[request.id] = keys  # it may go elsewhere yet
            self._keys.move_to_end(request.id, last=False)

    def _capacity(self, endpoint: Endpoint) -> int:
        metrics = endpoint.metrics
        if self._parameters.auto_tune and metrics is not None and metrics.num_blocks and metrics.block_size:
            return max(metrics.num_blocks * metrics.block_size // self.block_tokens(), 1)
        return self._parameters.lru_capacity_per_server or DEFAULT_CAPACITY

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        if outcome.ok:
            self._keys.pop(request.id, None)
