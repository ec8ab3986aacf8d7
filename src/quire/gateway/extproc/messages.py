"""What is said to Envoy.

Sources: envoy/service/ext_proc/v3/external_processor.proto, and the endpoint picker protocol of the Gateway API
Inference Extension (docs/proposals/004-endpoint-picker-protocol): the chosen address goes out twice, as a header and as
dynamic metadata under `envoy.lb`; an outer gateway may narrow the choice under `envoy.lb.subset_hint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

from quire.core.errors import QuireError
from quire.gateway.errors import DROPPED_HEADER, Dropped
from quire.web.answers import error_headers, error_json

DESTINATION: Final = "x-gateway-destination-endpoint"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
SERVED: Final = "x-gateway-destination-endpoint-served"
LB_METADATA: Final = "envoy.lb"
SUBSET_METADATA: Final = "envoy.lb.subset_hint"
CHUNK: Final = 62_000
"""Envoy takes up to 64 KiB in one piece of a streamed body."""

Response = Any  # the generated messages have no types
Message = Any


def headers_of(message: Message) -> dict[str, str]:
    """Names in lower case; pseudo headers stay (`:path`)."""
    found: dict[str, str] = {}
    for header in message.request_headers.headers.headers:
        value = header.raw_value.decode("latin-1") if header.raw_value else header.value
        found[header.key.lower()] = value
    return found


def subset_of(message: Message) -> frozenset[str] | None:
    """Addresses that may be chosen; None: any."""
    hint = message.metadata_context.filter_metadata.get(SUBSET_METADATA)
    if hint is None or SUBSET not in hint.fields:
        return None
    value = hint.fields[SUBSET]
    texts = [item.string_value for item in value.list_value.values] or value.string_value.split(",")
    return frozenset(text.strip() for text in texts if text.strip())


def _set(pairs: Mapping[str, str]) -> Any:
    overwrite = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    options = [
        base_pb2.HeaderValueOption(
            header=base_pb2.HeaderValue(key=key, raw_value=value.encode("latin-1", "replace")), append_action=overwrite
        )
        for key, value in pairs.items()
    ]
    return ext_proc.HeaderMutation(set_headers=options)


def chosen_headers(addresses: Iterable[str], extra: Mapping[str, str], body: bytes | None) -> Any:
    """The change to the request's headers. `body`: the rewritten one, whose length changes."""
    pairs = {DESTINATION: ",".join(addresses), **extra}
    if body is not None:
        pairs["content-length"] = str(len(body))
    return _set(pairs)


def with_destination(response: Response, addresses: Iterable[str]) -> Response:
    response.dynamic_metadata.update({LB_METADATA: {DESTINATION: ",".join(addresses)}})
    return response


def request_headers(mutation: Any = None) -> Response:
    common = ext_proc.CommonResponse(header_mutation=mutation, clear_route_cache=mutation is not None)
    return ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse(response=common))


def request_body(mutation: Any, body: bytes | None) -> Response:
    """For a buffered body: headers can still be changed."""
    common = ext_proc.CommonResponse(header_mutation=mutation, clear_route_cache=True)
    if body is not None:
        common.body_mutation.body = body
    return ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse(response=common))


def streamed(body: bytes, *, end: bool, response: bool) -> list[Response]:
    """A body (or a piece of one) given back in a full-duplex stream."""
    pieces = [body[at : at + CHUNK] for at in range(0, len(body), CHUNK)] or [b""]
    made = []
    for index, piece in enumerate(pieces):
        last = end and index == len(pieces) - 1
        mutation = ext_proc.BodyMutation(
            streamed_response=ext_proc.StreamedBodyResponse(body=piece, end_of_stream=last)
        )
        common = ext_proc.BodyResponse(response=ext_proc.CommonResponse(body_mutation=mutation))
        made.append(
            ext_proc.ProcessingResponse(response_body=common)
            if response
            else ext_proc.ProcessingResponse(request_body=common)
        )
    return made


def response_headers(pairs: Mapping[str, str]) -> Response:
    common = ext_proc.CommonResponse(header_mutation=_set(pairs))
    return ext_proc.ProcessingResponse(response_headers=ext_proc.HeadersResponse(response=common))


def response_body() -> Response:
    return ext_proc.ProcessingResponse(response_body=ext_proc.BodyResponse())


def trailers(*, response: bool) -> Response:
    if response:
        return ext_proc.ProcessingResponse(response_trailers=ext_proc.TrailersResponse())
    return ext_proc.ProcessingResponse(request_trailers=ext_proc.TrailersResponse())


def refused(error: QuireError, path: str) -> Response:
    """An answer of the gateway's own, in the shape of the API that was called."""
    pairs = {"content-type": "application/json", **error_headers(error)}
    if isinstance(error, Dropped):
        pairs[DROPPED_HEADER] = error.reason
    immediate = ext_proc.ImmediateResponse(headers=_set(pairs), body=error_json(error, path), details=error.code)
    immediate.status.code = error.status
    return ext_proc.ProcessingResponse(immediate_response=immediate)
