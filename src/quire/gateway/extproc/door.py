"""The external processing door, put together of the same parts as the proxy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quire.gateway.director import Director
from quire.gateway.extproc.stream import Door
from quire.gateway.parse import parse, with_model
from quire.gateway.proxy.holding import Holding
from quire.gateway.proxy.usage import Usage
from quire.gateway.request import Api, InferenceRequest
from quire.web.limits import request_id_of

MAX_HELD = 1024 * 1024 * 1024


def make_door(
    director: Director,
    *,
    hooks: Sequence[Callable[[InferenceRequest], None]] = (),
    max_body_bytes: int,
    max_held: int = MAX_HELD,
) -> Door:
    """`hooks` see each request before it is admitted: traffic policy, tenants. `max_held` bytes at most are held of
    the bodies of all streams."""

    def read(path: str, headers: Mapping[str, str], body: bytes) -> InferenceRequest:
        named = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
        request_id = request_id_of({"headers": named}).decode()
        request = parse(request_id, path.partition("?")[0], named, body, director.clock())
        for hook in hooks:
            hook(request)
        return request

    def rewritten(request: InferenceRequest) -> bytes | None:
        was_read = request.model or request.api is not Api.OTHER  # else it may be no JSON
        if not was_read or request.target_model in ("", request.model):
            return None
        return with_model(request.body, request.target_model)

    return Door(
        director=director,
        read=read,
        rewritten=rewritten,
        usage=_usage,
        max_body_bytes=max_body_bytes,
        holding=Holding(max_held),
    )


def _usage(tail: bytes) -> tuple[int | None, int | None]:
    usage = Usage()
    usage.whole(tail)
    return usage.output_tokens, usage.cached_tokens
