"""ASGI middleware around everything: bounded bodies, and an answer in the API's shape whatever goes wrong."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.core.errors import Cancelled, QuireError, RequestTooLarge
from quire.web.answers import error_response, for_status

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class BodyLimit:
    """Refuses a body of more than `max_bytes`, by its Content-Length or as it comes."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value[:20]) > self._max_bytes):
                raise self._too_large()
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, bounded, send)

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"The body is larger than {self._max_bytes} bytes.", remedy="Send less, or raise --max-body-bytes."
        )


class ErrorBoundary:
    """Turns what is raised within into an answer, counts requests, and gives each an id.

    An exception that is not ours is a fault of the server: it is logged, and tells the client nothing.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        """`count` is told the route and the status of each request (0: none was sent)."""
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["app"] = self  # tells Starlette's routes to raise their 404 and 405 rather than to answer them
        status = 0
        request_id = request_id_of(scope)

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except ClientDisconnect:
            status = status or Cancelled.status
        except Exception as error:
            if status:
                structlog.get_logger().exception("a handler failed after it had begun to answer", path=scope["path"])
                raise
            response = error_response(self._as_ours(error, scope), scope["path"])
            if isinstance(error, HTTPException) and error.headers:
                response.headers.update(error.headers)  # Allow, which a 405 has to have
            await response(scope, receive, counted)
        finally:
            route = scope.get("route")
            self._count(getattr(route, "path", "unmatched"), status)

    @staticmethod
    def _as_ours(error: Exception, scope: Scope) -> QuireError:
        if isinstance(error, QuireError):
            return error
        if isinstance(error, HTTPException):
            return for_status(error.status_code, scope["path"][:200])
        structlog.get_logger().error("a handler failed", path=scope["path"], exc_info=error)
        return QuireError("Something went wrong in the server.", remedy="See its log.")


def request_id_of(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return uuid.uuid4().hex.encode()
