"""What the gateway says of itself: metrics, endpoints, why a request went where it went."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.core.errors import NotFound
from quire.gateway.endpoint import Endpoint
from quire.gateway.kv.route import kv_route
from quire.gateway.metrics import CONTENT_TYPE
from quire.gateway.parts import Parts
from quire.web.answers import error_response


def own_routes(parts: Parts) -> list[Route]:
    async def metrics(_: Request) -> Response:
        return Response(parts.metrics.text(), media_type=CONTENT_TYPE)

    async def explain(request: Request) -> Response:
        request_id = request.path_params["request_id"]
        told = parts.explainer.explain(request_id)
        if told is None:
            shown = request_id[:128]
            error = NotFound(f"Nothing is remembered of the request {shown!r}.", remedy="Ask sooner.")
            return error_response(error, request.url.path)
        return _json(told)

    async def endpoints(_: Request) -> Response:
        return _json({"endpoints": [describe(endpoint, parts.clock()) for endpoint in parts.pool]})

    return [
        Route("/metrics", metrics, methods=["GET"]),
        Route("/explain/{request_id}", explain, methods=["GET"]),
        Route("/endpoints", endpoints, methods=["GET"]),
        kv_route(parts.subscriptions),
    ]


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def describe(endpoint: Endpoint, now: float) -> dict[str, Any]:
    """One endpoint as it is seen now."""
    metrics = endpoint.metrics
    told: dict[str, Any] = {
        "name": endpoint.key,
        "address": endpoint.address,
        "labels": dict(endpoint.labels),
        "models": None if endpoint.models is None else sorted(endpoint.models),
        "available": endpoint.available,
        "draining": endpoint.draining,
        "open_requests": endpoint.load.requests,
        "open_tokens": endpoint.load.tokens,
        "open_prefill_tokens": endpoint.load.prefill_tokens,
    }
    if metrics is not None:
        told["metrics"] = {
            "age_seconds": round(now - metrics.time, 3),
            "waiting": metrics.waiting,
            "running": metrics.running,
            "kv_usage": metrics.kv_usage,
        }
    return told
