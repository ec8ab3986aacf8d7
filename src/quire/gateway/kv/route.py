"""`GET /kv-events`: what each endpoint's KV events come to, and what is wrong with them. `quire doctor` reads it."""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.gateway.kv.health import KVFinding, KVHealth
from quire.gateway.kv.subscriptions import KVSubscriptions

PATH: Final = "/kv-events"


class KVStatus(msgspec.Struct, frozen=True):
    """By endpoint; `findings` is empty if all is well. `blocks` of all endpoints, `keys` different ones among them."""

    endpoints: dict[str, KVHealth]
    findings: list[KVFinding]
    blocks: int
    keys: int
    queries: int


def kv_route(subscriptions: KVSubscriptions) -> Route:
    """For the gateway's application, beside its other routes."""

    async def answer(_: Request) -> Response:
        index = subscriptions.index
        status = KVStatus(index.health(), subscriptions.findings(), index.num_blocks, index.num_keys, index.queries)
        return Response(msgspec.json.encode(status), media_type="application/json")

    return Route(PATH, answer, methods=["GET"])
