"""/health: is it worth keeping this process? /ready: should it get requests now? /version."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

import quire
from quire.serve.answers import json_response
from quire.serve.service import Service
from quire.serve.supervision import EngineState
from quire.wire.tokenize import HealthResponse, VersionResponse


class Health:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _: Request) -> Response:
        """200 unless the engine has been given up; an engine that starts or hangs is being seen to."""
        return self._response(self._status(), healthy=self._service.engine.state is not EngineState.FAILED)

    async def ready(self, _: Request) -> Response:
        """200 only with an engine whose heartbeat is fresh."""
        status = self._status()
        return self._response(status, healthy=status == "ok")

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

    def _response(self, status: str, *, healthy: bool) -> Response:
        engine = self._service.engine
        failure = engine.failure
        body = HealthResponse(
            status=status,
            heartbeat_age_seconds=engine.heartbeat_age(),
            engine_restarts=engine.restarts,
            detail=None if failure is None else str(failure),
        )
        return json_response(body, 200 if healthy else 503, None if healthy else {"retry-after": "1"})
