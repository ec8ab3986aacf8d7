"""Sessions that stay where they were. Definitions: llm-d-router, …/sessionaffinity (a scorer and a filter)."""

from __future__ import annotations

import base64
import binascii
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Conclusion, Filter, Observer, Parameters, Scorer, Services
from quire.gateway.request import InferenceRequest

MAX_SESSIONS = 100_000


class SessionParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("profileName", "evictionSweepSeconds", "missThreshold"),
        "a session is bound to who served it last, until its time",
    )
    algorithm: Literal["encoded_endpoint_header", "session_id_header"] = "encoded_endpoint_header"
    header_name: str = "x-session-token"
    eviction_ttl_seconds: float = 600.0


class SessionBinding(Observer):
    """By the token that an earlier answer carried (the
    endpoint's key in base64), or by the caller's session id, which is bound here to where it was served last."""

    def __init__(self, parameters: SessionParameters, services: Services) -> None:
        self._by_id = parameters.algorithm == "session_id_header"
        self._header = parameters.header_name.lower()
        self._ttl = parameters.eviction_ttl_seconds
        self._clock = services.clock
        self._bound: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        if not self._by_id:
            choice.response_headers[self._header] = base64.b64encode(endpoint.key.encode()).decode()
            return
        session = self._session(request)
        if session:
            self._bound[session] = (endpoint.key, self._clock())
            self._bound.move_to_end(session)
            while len(self._bound) > MAX_SESSIONS:
                self._bound.popitem(last=False)

    def _session(self, request: InferenceRequest) -> str:
        return request.headers.get(self._header) or request.session_id

    def wanted(self, request: InferenceRequest) -> str:
        if self._by_id:
            key, when = self._bound.get(self._session(request), ("", 0.0))
            return key if key and self._clock() - when <= self._ttl else ""
        try:
            return base64.b64decode(request.headers.get(self._header, ""), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return ""


class SessionScorer(SessionBinding, Scorer):
    """`session-affinity-scorer`: 1 for where the session was, 0 for the others."""

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        wanted = self.wanted(request)
        return [float(endpoint.key == wanted) for endpoint in candidates]


class SessionFilter(SessionBinding, Filter):
    """`session-affinity-filter`: only where the session was, while that is a candidate."""

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        wanted = self.wanted(request)
        return [endpoint for endpoint in candidates if endpoint.key == wanted] or candidates
