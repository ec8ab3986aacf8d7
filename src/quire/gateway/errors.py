"""Why the gateway did not serve a request."""

from __future__ import annotations

from typing import ClassVar, Final

from quire.core.errors import Refusal

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
    code = "queue_full"
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
