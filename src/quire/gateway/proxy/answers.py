"""The gateway's own answers, in the shape of the API that was called."""

from __future__ import annotations

from starlette.responses import Response

from quire.core.errors import QuireError
from quire.gateway.errors import DROPPED_HEADER, Dropped
from quire.gateway.request import Api
from quire.web.answers import ANTHROPIC_PATH, error_headers, error_json


def error_answer(error: QuireError, path: str, request_id: str) -> Response:
    headers = {"x-request-id": request_id, **error_headers(error)}
    if isinstance(error, Dropped):
        headers[DROPPED_HEADER] = error.reason
    return Response(error_json(error, path), error.status, headers, media_type="application/json")


def broken_stream(error: QuireError, api: Api) -> bytes:
    """The last event of a stream that cannot go on."""
    name = b"event: error\n" if api in (Api.MESSAGES, Api.RESPONSES) else b""
    path = ANTHROPIC_PATH if api is Api.MESSAGES else ""
    return name + b"data: " + error_json(error, path) + b"\n\n"
