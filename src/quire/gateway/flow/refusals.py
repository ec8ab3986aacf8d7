"""What a caller is told whose request the queue did not serve."""

from __future__ import annotations

from quire.gateway.errors import Dropped, Evicted, Expired, NoEndpoint, QueueCapacity, Saturated
from quire.gateway.flow.queue import Rejection
from quire.gateway.request import InferenceRequest


def refusal(
    request: InferenceRequest, reason: Rejection, *, waiting: int, waited: float, retry_after: float
) -> Dropped:
    """`waiting` requests are in the queue, this one was for `waited` seconds."""
    model, priority = request.target_model or request.model, request.priority
    match reason:
        case Rejection.CAPACITY:
            return QueueCapacity(
                f"The queue for priority {priority} is full: {waiting} requests wait.", retry_after=retry_after
            )
        case Rejection.SATURATED:
            return Saturated(
                f"The endpoints of {model!r} are full, and requests of priority {priority} do not wait for room.",
                retry_after=retry_after,
            )
        case Rejection.DISPLACED:
            return Evicted(
                f"The queue was full after {waited:.1f} s, and a request of priority above {priority} took the place.",
                retry_after=retry_after,
            )
        case Rejection.EXPIRED:
            return Expired(f"The endpoints of {model!r} had no room for {waited:.1f} s.", retry_after=retry_after)
        case Rejection.NO_ENDPOINT:
            return NoEndpoint(f"For {waited:.1f} s no endpoint served the model {model!r}.", retry_after=retry_after)


def given_way(request: InferenceRequest, *, retry_after: float) -> Dropped:
    """It was in flight."""
    return Evicted(
        f"The endpoints of {request.target_model or request.model!r} are full, and a request of priority above "
        f"{request.priority} took the place of this one.",
        retry_after=retry_after,
    )
