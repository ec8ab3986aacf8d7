"""The gateway's own answers, in the shape of the API that was called."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from quire.core.errors import QuireError
from quire.gateway.errors import DROPPED_HEADER, Dropped
from quire.gateway.request import Api
from quire.web.answers import encode_json, error_body, error_headers

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class AnthropicDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct, tag_field="type", tag="error"):
    """docs.anthropic.com, API reference, Errors."""

    error: AnthropicDetail


def error_json(error: QuireError, api: Api) -> bytes:
    if api is not Api.MESSAGES:
        return encode_json(error_body(error))
    kind = _ANTHROPIC_TYPES.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    return encode_json(AnthropicError(AnthropicDetail(kind, str(error))))


def error_answer(error: QuireError, api: Api, request_id: str) -> Response:
    headers = {"x-request-id": request_id, **error_headers(error)}
    if isinstance(error, Dropped):
        headers[DROPPED_HEADER] = error.reason
    return Response(error_json(error, api), error.status, headers, media_type="application/json")


def broken_stream(error: QuireError, api: Api) -> bytes:
    """The last event of a stream that cannot go on."""
    name = b"event: error\n" if api in (Api.MESSAGES, Api.RESPONSES) else b""
    return name + b"data: " + error_json(error, api) + b"\n\n"
