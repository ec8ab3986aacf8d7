"""Scorers that look at what an endpoint holds or was made for: prefixes, lengths, labels."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Conclusion, Filter, Observer, Parameters, Scorer
from quire.gateway.request import InferenceRequest, PrefixMatch

NO_MATCH = PrefixMatch(0, 0.0)


def matches_of(request: InferenceRequest, producer: str) -> Mapping[str, PrefixMatch]:
    """What the named producer found; without a name, what the last one did."""
    if producer:
        return request.prefix.get(producer, {})
    return next(reversed(request.prefix.values()), {}) if request.prefix else {}


def match_ratio(request: InferenceRequest, match: PrefixMatch) -> float:
    return min(match.weighted_tokens / request.prompt_tokens, 1.0) if request.prompt_tokens else 0.0


class PrefixCacheParameters(Parameters, frozen=True):
    prefix_match_info_producer_name: str = ""
    prefix_length_weight: float = 0.0
    max_model_len: int = 8192


class PrefixCacheScorer(Scorer):
    """`prefix-cache-scorer`: the share of the prompt that is there; optionally also how long that is."""

    def __init__(self, parameters: PrefixCacheParameters) -> None:
        if not 0.0 <= parameters.prefix_length_weight <= 1.0:
            raise ConfigError(
                f"prefix-cache-scorer: prefixLengthWeight is {parameters.prefix_length_weight}.",
                param="plugins",
                remedy="It is from 0 to 1.",
            )
        if parameters.max_model_len <= 0:
            raise ConfigError(
                f"prefix-cache-scorer: maxModelLen is {parameters.max_model_len}.",
                param="plugins",
                remedy="It is in tokens, above 0.",
            )
        self.producer = parameters.prefix_match_info_producer_name
        self._length_weight = parameters.prefix_length_weight
        self._max_model_len = parameters.max_model_len

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        matches = matches_of(request, self.producer)
        return [self._one(request, matches.get(endpoint.key, NO_MATCH)) for endpoint in candidates]

    def _one(self, request: InferenceRequest, match: PrefixMatch) -> float:
        ratio = match_ratio(request, match)
        if not self._length_weight:
            return ratio
        length = min(match.weighted_tokens / self._max_model_len, 1.0) ** 2
        return self._length_weight * length + (1.0 - self._length_weight) * ratio


class NoHitLruParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("prefixPluginType", "prefixPluginName"), "llm-d never used it either"
    )
    prefix_match_info_producer_name: str = ""
    lru_size: int = 1024


class NoHitLru(Scorer, Observer):
    """`no-hit-lru-scorer`: prompts that nobody holds go to who has got the fewest such of late: 1 for who never had
    one, down to 0 for who had the last. Where somebody holds the prompt all are 0.5."""

    def __init__(self, parameters: NoHitLruParameters) -> None:
        self._producer = parameters.prefix_match_info_producer_name
        self._size = parameters.lru_size if parameters.lru_size > 0 else NoHitLruParameters().lru_size
        self._order: OrderedDict[str, None] = OrderedDict()

    def _is_cold(self, request: InferenceRequest) -> bool:
        return not any(match.tokens for match in matches_of(request, self._producer).values())

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        if not self._is_cold(request):
            return [0.5] * len(candidates)
        if len(candidates) == 1:
            return [1.0]
        rank = {key: index for index, key in enumerate(self._order)}
        never = [endpoint.key for endpoint in candidates if endpoint.key not in rank]
        used = sorted((endpoint.key for endpoint in candidates if endpoint.key in rank), key=rank.__getitem__)
        place = {key: index for index, key in enumerate([*never, *used])}
        return [1.0 - place[endpoint.key] / (len(candidates) - 1) for endpoint in candidates]

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        if self._is_cold(request):
            self._order[endpoint.key] = None
            self._order.move_to_end(endpoint.key)
            while len(self._order) > self._size:
                self._order.popitem(last=False)


class ContextLengthParameters(Parameters, frozen=True):
    label: str = "llm-d.ai/context-length-range"
    enable_filtering: bool = False


_RANGE = re.compile(r"\s*(\d{1,12})\s*-\s*(\d{1,12})\s*", re.ASCII)


class ContextLengthAware(Scorer, Filter):
    """`context-length-aware`: endpoints say by a label for which prompts they are (`0-2048` tokens). Inside the range
    above 0.3, the tighter and the further below its end the better; outside below 0.3, the nearer the better. Without
    a label 0.5; a label that is no range is 0, and left out by the filter."""

    def __init__(self, label: str, *, filtering: bool) -> None:
        if not label:
            raise ConfigError("context-length-aware: label is empty.", param="plugins", remedy="Name the label.")
        self._label = label
        self._filtering = filtering

    def _range(self, value: str) -> tuple[int, int] | None:
        found = _RANGE.fullmatch(value)
        if found is None or int(found[1]) > int(found[2]):
            return None
        return int(found[1]), int(found[2])

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return [self._one(request.prompt_tokens, endpoint.labels.get(self._label)) for endpoint in candidates]

    def _one(self, tokens: int, label: str | None) -> float:
        if label is None:
            return 0.5
        limits = self._range(label)
        if limits is None:
            return 0.0
        low, high = limits
        if not low <= tokens <= high:
            return 0.3 / (1.0 + max(low - tokens, tokens - high) / 1000)
        if low == high:
            return 1.0
        width = 1.0 / (1.0 + (high - low) / 10_000)
        return 0.3 + 0.7 * (0.7 * width + 0.3 * (high - tokens) / (high - low))

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        if not self._filtering:
            return candidates
        return [one for one in candidates if self._holds(request.prompt_tokens, one.labels.get(self._label))]

    def _holds(self, tokens: int, label: str | None) -> bool:
        if label is None:
            return True
        limits = self._range(label)
        return limits is not None and limits[0] <= tokens <= limits[1]


class HeaderLabelParameters(Parameters, frozen=True):
    header_name: str = ""
    label_key: str = ""


class HeaderLabelAffinity(Scorer):
    """`header-label-affinity-scorer`: 1 where the label has the header's value."""

    def __init__(self, header: str, label: str) -> None:
        if not header or not label:
            raise ConfigError(
                "header-label-affinity-scorer lacks headerName or labelKey.", param="plugins", remedy="Give both."
            )
        self._header = header.lower()
        self._label = label

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        wanted = request.headers.get(self._header)
        return [float(bool(wanted) and endpoint.labels.get(self._label) == wanted) for endpoint in candidates]
