"""Copies of calls for a shadow: sent beside the first, through the same connections, outside of flow control."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from quire.gateway.errors import UpstreamError
from quire.gateway.proxy.attempt import Try
from quire.gateway.proxy.call import Call
from quire.gateway.proxy.forward import Forwarder
from quire.gateway.proxy.upstream import Waits
from quire.gateway.request import InferenceRequest
from quire.gateway.traffic.policy import Target
from quire.gateway.traffic.shadow import Mirror, Shadow

Shadowed = Callable[[InferenceRequest], tuple[Target, bool] | None]
"""The shadow of a request, and whether answers are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirrors:
    forwarder: Forwarder
    shadow: Shadow
    shadowed: Shadowed

    def begin(self, call: Call) -> Mirror | None:
        wanted = self.shadowed(call.request)
        if wanted is None:
            return None
        target, compare = wanted
        return self.shadow.begin(call.request, target, lambda: self._send(call, target), compare=compare)

    async def _send(self, call: Call, target: Target) -> AsyncIterator[bytes]:
        """Raises `Dropped` and `UpstreamError`."""
        forwarder, request = self.forwarder, _copy(call.request, target)
        choice = forwarder.director.choose_again(request)
        copy = Call(request, call.scope, call.send, call.deadline, call.holding)
        current = Try(forwarder.director, request, choice)
        settings = forwarder.settings
        waits = Waits(first_byte=settings.first_byte_timeout, idle=settings.idle_timeout, total=settings.total_timeout)
        try:
            current.answer = answer = await forwarder.connections.acquire(current.endpoint, fresh=True)
            answer.send(copy.message(current.endpoint, choice.conclusion), waits)
            await answer.begin()
            if answer.status >= 400:
                raise ShadowRefused(answer.status)
            forwarder.director.first_byte(request, current.attempt)
            while piece := await answer.read():
                current.usage.see(piece)
                yield piece
            current.usage.end()
            current.error = ""
        except UpstreamError as error:
            current.error = error.kind
            raise
        finally:
            current.close(forwarder.connections)


class ShadowRefused(Exception):
    """The shadow's endpoint answered with an error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"it answered {status}")


def _copy(request: InferenceRequest, target: Target) -> InferenceRequest:
    return replace(
        request,
        id=f"{request.id}-shadow",
        target_model=target.model,
        selector=target.selector,
        fallbacks=(),
        predictions={},
        attributes={},
    )
