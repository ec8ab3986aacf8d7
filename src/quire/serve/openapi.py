"""/openapi.json, made from the types of the API, and /docs, a page that shows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import quire
from quire.serve.service import Service
from quire.wire.anthropic import AnthropicMessage, CountTokensRequest, MessagesRequest, TokenCount
from quire.wire.anthropic_errors import AnthropicError
from quire.wire.openai import ErrorResponse, Model, ModelList
from quire.wire.openai_chat import ChatCompletion, ChatCompletionRequest
from quire.wire.openai_completions import Completion, CompletionRequest
from quire.wire.pooling import (
    ClassificationList,
    ClassifyRequest,
    EmbeddingList,
    EmbeddingRequest,
    PoolingList,
    PoolingRequest,
    RerankList,
    RerankRequest,
    ScoreList,
    ScoreRequest,
)
from quire.wire.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    HealthResponse,
    TokenizeRequest,
    TokenizeResponse,
    VersionResponse,
)

JSON = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    path: str
    summary: str
    response: type[msgspec.Struct] | str
    """A type, or the media type of a text."""
    request: type[msgspec.Struct] | None = None
    error: type[msgspec.Struct] = ErrorResponse
    streams: bool = False
    not_ready: bool = False
    """Answers 503 with the same shape while there is no engine."""


OPERATIONS = (
    Operation(
        path="/v1/chat/completions",
        summary="Answer a conversation.",
        request=ChatCompletionRequest,
        response=ChatCompletion,
        streams=True,
    ),
    Operation(
        path="/v1/messages",
        summary="Answer a conversation, in Anthropic's form.",
        request=MessagesRequest,
        response=AnthropicMessage,
        error=AnthropicError,
        streams=True,
    ),
    Operation(
        path="/v1/messages/count_tokens",
        summary="How many tokens such a conversation has.",
        request=CountTokensRequest,
        response=TokenCount,
        error=AnthropicError,
    ),
    Operation(
        path="/v1/completions", summary="Continue a text.", request=CompletionRequest, response=Completion, streams=True
    ),
    Operation(path="/v1/embeddings", summary="Texts as vectors.", request=EmbeddingRequest, response=EmbeddingList),
    Operation(
        path="/pooling",
        summary="What a pooling model makes of texts, by the name of its task.",
        request=PoolingRequest,
        response=PoolingList,
    ),
    Operation(path="/classify", summary="Texts by label.", request=ClassifyRequest, response=ClassificationList),
    *(
        Operation(path=path, summary="How well pairs of texts fit.", request=ScoreRequest, response=ScoreList)
        for path in ("/score", "/v1/score")
    ),
    *(
        Operation(path=path, summary="Documents, best first.", request=RerankRequest, response=RerankList)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
    Operation(path="/v1/models", summary="The models served here.", response=ModelList),
    Operation(path="/v1/models/{model}", summary="One model.", response=Model),
    Operation(
        path="/tokenize",
        summary="A text or conversation as tokens.",
        request=TokenizeRequest,
        response=TokenizeResponse,
    ),
    Operation(path="/detokenize", summary="Tokens as text.", request=DetokenizeRequest, response=DetokenizeResponse),
    Operation(path="/health", summary="Is the process worth keeping?", response=HealthResponse, not_ready=True),
    Operation(path="/ready", summary="Should it get requests now?", response=HealthResponse, not_ready=True),
    Operation(path="/version", summary="The version of quire.", response=VersionResponse),
    Operation(path="/metrics", summary="Prometheus metrics.", response="text/plain"),
    Operation(path="/openapi.json", summary="This description.", response=JSON),
    Operation(path="/docs", summary="This description as a page.", response="text/html"),
)


def describe(operations: tuple[Operation, ...], *, with_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    types: list[type[msgspec.Struct]] = [ErrorResponse, AnthropicError]
    for operation in operations:
        types.extend(kind for kind in (operation.request, operation.response) if isinstance(kind, type))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    references = dict(zip(types, schemas, strict=True))
    paths = {operation.path: _path_item(operation, references, with_key=with_key) for operation in operations}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "quire", "version": quire.__version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _path_item(operation: Operation, references: dict[Any, Any], *, with_key: bool) -> dict[str, Any]:
    def content(kind: type[msgspec.Struct] | str) -> dict[str, Any]:
        return {kind: {}} if isinstance(kind, str) else {JSON: {"schema": references[kind]}}

    answer = content(operation.response)
    if operation.streams:
        answer["text/event-stream"] = {}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": answer},
            "4XX": {"description": "The request is at fault.", "content": content(operation.error)},
            "5XX": {"description": "The server is at fault, or busy.", "content": content(operation.error)},
        },
    }
    if operation.not_ready:
        described["responses"]["503"] = {"description": "No.", "content": content(operation.response)}
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": content(operation.request)}
    if "{" in operation.path:
        described["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if with_key and operation.path != "/health":
        described["security"] = [{"key": []}]
    return {"get" if operation.request is None else "post": described}


class Docs:
    def __init__(self, service: Service) -> None:
        self._with_key = service.config.api_key is not None

    @cached_property
    def _document(self) -> bytes:
        return msgspec.json.encode(describe(OPERATIONS, with_key=self._with_key))

    async def openapi(self, _: Request) -> Response:
        return Response(self._document, media_type=JSON)

    async def page(self, _: Request) -> Response:
        template = files("quire.serve").joinpath("docs.html").read_text(encoding="utf-8")
        # In a script element "</" could end the script; JSON may write it with an escape.
        document = self._document.decode().replace("</", "<\\/")
        return Response(template.replace("{{document}}", document), media_type="text/html")
