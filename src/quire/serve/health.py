"""/health: is it worth keeping this process? /ready: should it get requests now? /version."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

import quire
from quire.serve.engine_client import headline
from quire.serve.service import Service
from quire.serve.supervision import EngineState
from quire.web.answers import json_response
from quire.wire.tokenize import HealthResponse, VersionResponse


class Health:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _: Request) -> Response:
        """200 unless the engine has been given up; an engine that starts or hangs is being seen to."""
        engine = self._service.engine
        # No key is asked for here, so that the engine's last words are left out.
        detail = None if engine.failure is None else headline(engine.failure)
        return self._response(self._status(), detail, healthy=engine.state is not EngineState.FAILED)

    async def ready(self, _: Request) -> Response:
        """200 only with an engine whose heartbeat is fresh."""
        status, failure = self._status(), self._service.engine.failure
        return self._response(status, None if failure is None else str(failure), healthy=status == "ok")

    async def version(self, _: Request) -> Response:
        return json_response(VersionResponse(version=quire.__version__))

    def _status(self) -> str:
        engine = self._service.engine
        if engine.state is not EngineState.READY:
            return engine.state.value
        if self._service.draining:
            return "draining"
        age = engine.heartbeat_age()
        return "ok" if age is not None and age <= self._service.config.heartbeat_timeout else "stale"

    def _response(self, status: str, detail: str | None, *, healthy: bool) -> Response:
        engine = self._service.engine
        body = HealthResponse(
            status=status,
            heartbeat_age_seconds=engine.heartbeat_age(),
            engine_restarts=engine.restarts,
            detail=detail,
        )
        return json_response(body, 200 if healthy else 503, None if healthy else {"retry-after": "1"})
