"""HTTP answers: JSON objects, and for everything that goes wrong the error object of the API that was called."""

from __future__ import annotations

import math
from typing import Final

import msgspec
from starlette.responses import Response

from quire.core.errors import NotFound, QuireError, RequestError, Unauthorized
from quire.wire.anthropic_errors import anthropic_error
from quire.wire.openai import ErrorDetail, ErrorResponse

ANTHROPIC_PATH: Final = "/v1/messages"
_encoder = msgspec.json.Encoder()
_TYPES: dict[int, str] = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def encode_json(value: msgspec.Struct) -> bytes:
    return _encoder.encode(value)


def json_response(value: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(value), status, headers, media_type="application/json")


def error_body(error: QuireError) -> ErrorResponse:
    """The message of an error of ours is for the caller as it is; other exceptions never come here."""
    kind = _TYPES.get(error.status)
    if kind is None:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    detail = ErrorDetail(message=str(error), type=kind, param=error.param, code=error.code)
    return ErrorResponse(error=detail)


def error_json(error: QuireError, path: str) -> bytes:
    """In Anthropic's shape under /v1/messages, else in OpenAI's."""
    if path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/"):
        return encode_json(anthropic_error(error.status, str(error)))
    return encode_json(error_body(error))


def error_headers(error: QuireError) -> dict[str, str]:
    """The headers that go with it: when to come back, how to say who one is."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: QuireError, path: str) -> Response:
    return Response(error_json(error, path), error.status, error_headers(error), media_type="application/json")


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    status = 405


class RequestTimeout(RequestError):
    """The client took too long to send its request."""

    code = "request_timeout"
    status = 408


class HeadersTooLarge(RequestError):
    code = "headers_too_large"
    status = 431


def for_status(status: int, what: str) -> QuireError:
    """An error of ours for a status that the router chose."""
    if status == 404:
        return NotFound(f"There is nothing at {what}.", remedy="See /docs for what there is.")
    if status == 405:
        return MethodNotAllowed(f"{what} does not take this method.", remedy="See /docs for the methods it takes.")
    return RequestError(f"{what} was refused with status {status}.")
