"""Scorers that look at what an endpoint holds or was made for: prefixes, sessions, lengths, predicted latency."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal

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
        self.producer = parameters.prefix_match_info_producer_name
        self._length_weight = parameters.prefix_length_weight
        self._max_model_len = max(parameters.max_model_len, 1)

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
    prefix_match_info_producer_name: str = ""
    prefix_plugin_type: str = ""
    prefix_plugin_name: str = ""
    lru_size: int = 1024


class NoHitLru(Scorer, Observer):
    """`no-hit-lru-scorer`: prompts that nobody holds go to who has got the fewest such of late: 1 for who never had
    one, down to 0 for who had the last. Where somebody holds the prompt all are 0.5."""

    def __init__(self, parameters: NoHitLruParameters) -> None:
        self._producer = parameters.prefix_match_info_producer_name or parameters.prefix_plugin_name
        self._size = max(parameters.lru_size, 1)
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


class LatencyParameters(Parameters, frozen=True):
    ttft_weight: float = 0.8
    tpot_weight: float = 0.2
    headroom_selection_strategy: Literal["least", "most"] = "least"


class LatencyScorer(Scorer):
    """`latency-scorer`: by the headroom that predictions leave below the request's objectives. Who meets them is above
    0.5, and among those the tightest is best (`least`) or the widest (`most`); the others by how little they miss.
    Without objectives the fastest is best."""

    def __init__(self, parameters: LatencyParameters) -> None:
        total = parameters.ttft_weight + parameters.tpot_weight
        self._ttft = parameters.ttft_weight / total if total else 0.5
        self._least = parameters.headroom_selection_strategy == "least"

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        headrooms = [self._headroom(request, endpoint) for endpoint in candidates]
        known = [headroom for headroom in headrooms if headroom is not None]
        if not known:
            return [0.5] * len(candidates)
        most, least = max(known), min(known)
        if request.slo_ttft is None and request.slo_tpot is None:
            return [0.0 if h is None else 1.0 if most == least else (h - least) / (most - least) for h in headrooms]
        return [0.0 if headroom is None else self._one(headroom, least, most) for headroom in headrooms]

    def _one(self, headroom: float, least: float, most: float) -> float:
        if headroom >= 0:
            share = headroom / most if most > 0 else 0.0
            return 0.5 + 0.5 * (1.0 - share if self._least else share)
        return 0.5 * (1.0 - headroom / least)

    def _headroom(self, request: InferenceRequest, endpoint: Endpoint) -> float | None:
        predicted = request.predictions.get(endpoint.key)
        if predicted is None:
            return None
        ttft = (request.slo_ttft or 0.0) - predicted.ttft
        tpot = (request.slo_tpot or 0.0) - predicted.tpot
        if request.slo_ttft is not None and request.slo_tpot is not None and min(ttft, tpot) < 0:
            ttft, tpot = min(ttft, 0.0), min(tpot, 0.0)  # what is met does not make up for what is missed
        elif request.slo_ttft is not None and request.slo_tpot is None:
            return ttft
        elif request.slo_tpot is not None and request.slo_ttft is None:
            return tpot
        return self._ttft * ttft + (1.0 - self._ttft) * tpot


class ContextLengthParameters(Parameters, frozen=True):
    label: str = "llm-d.ai/context-length-range"
    enable_filtering: bool = False


_RANGE = re.compile(r"(\d{1,12})-(\d{1,12})")


class ContextLengthAware(Scorer, Filter):
    """`context-length-aware`: endpoints say by a label for which lengths they are (`0-2048`). Inside the range above
    0.3, the tighter the better; outside below it, the nearer the better; without a label 0.5."""

    def __init__(self, label: str, *, filtering: bool) -> None:
        self._label = label
        self._filtering = filtering

    def _range(self, endpoint: Endpoint) -> tuple[int, int] | None:
        found = _RANGE.fullmatch(endpoint.labels.get(self._label, ""))
        return None if found is None else (int(found[1]), int(found[2]))

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return [self._one(request.prompt_tokens, self._range(endpoint)) for endpoint in candidates]

    @staticmethod
    def _one(tokens: int, limits: tuple[int, int] | None) -> float:
        if limits is None:
            return 0.5
        low, high = limits
        if low <= tokens <= high:
            return 0.3 + 0.7 / (1.0 + (high - low) / 8192)
        return 0.3 / (1.0 + min(abs(tokens - low), abs(tokens - high)) / 1024) * 0.999

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        if not self._filtering:
            return candidates
        ranges = [(endpoint, self._range(endpoint)) for endpoint in candidates]
        return [one for one, limits in ranges if limits is None or limits[0] <= request.prompt_tokens <= limits[1]]


class HeaderLabelParameters(Parameters, frozen=True):
    header_name: str = ""
    label: str = ""


class HeaderLabelAffinity(Scorer):
    """`header-label-affinity-scorer`: 1 where the label has the header's value."""

    def __init__(self, header: str, label: str) -> None:
        if not header or not label:
            raise ConfigError(
                "header-label-affinity-scorer lacks headerName or label.", param="plugins", remedy="Give both."
            )
        self._header = header.lower()
        self._label = label

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        wanted = request.headers.get(self._header)
        return [float(wanted is not None and endpoint.labels.get(self._label) == wanted) for endpoint in candidates]
