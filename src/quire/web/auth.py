"""The API key: with one set, every path but /health asks for it."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from quire.core.errors import ConfigError, Unauthorized
from quire.web.answers import error_response

OPEN_PATHS = frozenset({"/health"})


class ApiKey:
    """ASGI middleware. Denies by default: a path that does not exist is refused as well."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        if not key.strip():
            # Often a variable that is not set: the operator means to guard the server, and everybody would get in.
            raise ConfigError("api_key is empty.", param="api_key", remedy="Give a key, or leave --api-key out.")
        self._app = app
        self._key = key.strip().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        error = Unauthorized(
            "The API key is missing or wrong.", remedy="Send it as Authorization: Bearer KEY, or as x-api-key: KEY."
        )
        await error_response(error, scope["path"])(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        given = [(name, value) for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")]
        if len(given) != 1:
            return False
        name, value = given[0]
        scheme, _, key = value.partition(b" ") if name == b"authorization" else (b"bearer", b"", value)
        # Compared in constant time: how long it takes tells nothing about how much of a guess was right.
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
