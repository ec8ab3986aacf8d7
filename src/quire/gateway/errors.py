"""Why the gateway did not serve a request, or an endpoint did not."""

from __future__ import annotations

from typing import ClassVar, Final

from quire.core.errors import EngineError, Refusal

DROPPED_HEADER: Final = "x-llm-d-request-dropped-reason"


class Dropped(Refusal):
    """Turned away by the gateway. `reason` goes out as `x-llm-d-request-dropped-reason`."""

    reason: ClassVar[str] = "rejected-other"
    code = "dropped"
    status = 503


class Saturated(Dropped):
    """No endpoint has room, and the queue neither."""

    reason = "rejected-saturated"
    code = "saturated"
    status = 429


class QueueCapacity(Dropped):
    """The queue of the request's priority is full, in requests or in bytes."""

    reason = "rejected-capacity"
    code = "queue_capacity"
    status = 429


class Expired(Dropped):
    """It waited as long as it may."""

    reason = "rejected-ttl-expired"
    code = "queue_ttl_expired"
    status = 429


class Evicted(Dropped):
    """Pushed out by requests of higher priority."""

    reason = "evicted-priority"
    code = "evicted"
    status = 429


class NoEndpoint(Dropped):
    """No endpoint can serve it: none is known, healthy, or has the model."""

    reason = "rejected-no-endpoints"
    code = "no_endpoint"
    status = 503


class ShuttingDown(Dropped):
    """The gateway stops."""

    reason = "rejected-shutting-down"
    code = "shutting_down"
    status = 503


class UpstreamError(EngineError):
    """An endpoint failed, and no other could take over. `kind` is `Outcome.error`'s word for how."""

    code = "upstream_error"
    status = 502

    def __init__(
        self,
        message: str,
        *,
        kind: str = "failed",
        param: str | None = None,
        remedy: str | None = None,
        retry_after: float | None = 1.0,
    ) -> None:
        super().__init__(message, param=param, remedy=remedy, retry_after=retry_after)
        self.kind = kind


class UpstreamTimeout(UpstreamError):
    """An endpoint did not connect, begin, go on or end in time."""

    code = "upstream_timeout"
    status = 504
