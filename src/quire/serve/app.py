"""The ASGI application: which path goes where, and what is around all of them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from quire.serve.anthropic_messages import Messages
from quire.serve.embeddings import Embeddings
from quire.serve.health import Health
from quire.serve.metrics import CONTENT_TYPE
from quire.serve.openai_chat import ChatCompletions
from quire.serve.openai_completions import Completions
from quire.serve.openai_models import Models
from quire.serve.openapi import Docs
from quire.serve.scoring import Scoring
from quire.serve.service import Service
from quire.serve.tokenize import Tokenization
from quire.web.auth import ApiKey
from quire.web.limits import BodyLimit, ErrorBoundary


def build_app(service: Service) -> ASGIApp:
    """From the outside in: errors, the API key, the bound on bodies, the routes."""
    app: ASGIApp = Router(_routes(service), redirect_slashes=False)
    app = BodyLimit(app, service.config.max_body_bytes)
    if service.config.api_key is not None:
        app = ApiKey(app, service.config.api_key)
    return ErrorBoundary(app, service.metrics.http_request)


def _routes(service: Service) -> list[Route]:
    chat, completions, models = ChatCompletions(service), Completions(service), Models(service)
    messages = Messages(service)
    embeddings, scoring = Embeddings(service), Scoring(service)
    tokenization, health, docs = Tokenization(service), Health(service), Docs(service)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return [
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
        Route("/pooling", embeddings.pooling, methods=["POST"]),
        Route("/classify", embeddings.classify, methods=["POST"]),
        *(Route(path, scoring.score, methods=["POST"]) for path in ("/score", "/v1/score")),
        *(Route(path, scoring.rerank, methods=["POST"]) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{model:path}", models.get, methods=["GET"]),
        Route("/tokenize", tokenization.tokenize, methods=["POST"]),
        Route("/detokenize", tokenization.detokenize, methods=["POST"]),
        Route("/health", health.health, methods=["GET"]),
        Route("/ready", health.ready, methods=["GET"]),
        Route("/version", health.version, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", docs.openapi, methods=["GET"]),
        Route("/docs", docs.page, methods=["GET"]),
    ]
