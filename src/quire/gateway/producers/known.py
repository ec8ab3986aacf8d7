"""Producers whose work the gateway does anyway: their names are accepted, so that configurations need no change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Parameters, Producer
from quire.gateway.request import InferenceRequest


class InflightLoadParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {
        "includeOutputTokens": "prompts and the output that is expected are always counted",
        "tokenEstimator": "tokens are counted by the token-producer",
    }


class InflightLoad(Producer):
    """`inflight-load-producer`: the director counts what is open at each endpoint (`Endpoint.load`)."""

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        return


class SessionIdParameters(Parameters, frozen=True):
    header_name: str = ""
    cookie_name: str = ""


class SessionId(Producer):
    """`session-id-producer`: from another header than those that the parser knows."""

    def __init__(self, header: str, cookie: str) -> None:
        self._header = header.lower()
        self._cookie = cookie

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        found = request.headers.get(self._header, "") if self._header else ""
        if not found and self._cookie:
            for pair in request.headers.get("cookie", "").split(";"):
                name, _, value = pair.strip().partition("=")
                if name == self._cookie:
                    found = value
        if found:
            request.session_id = found[:512]
