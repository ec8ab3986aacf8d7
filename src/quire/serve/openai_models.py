"""/v1/models."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from quire.serve.service import Service
from quire.web.answers import json_response
from quire.wire.openai import Model, ModelList


class Models:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, _: Request) -> Response:
        return json_response(ModelList(data=[self._model(name) for name in self._service.model_names]))

    async def get(self, request: Request) -> Response:
        return json_response(self._model(self._service.check_model(request.path_params["model"])))

    def _model(self, name: str) -> Model:
        info = self._service.engine.model
        return Model(
            id=name,
            created=self._service.started_at,
            root=self._service.model_names[0],
            max_model_len=None if info is None else info.max_model_len,
        )
