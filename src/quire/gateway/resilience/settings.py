"""When an endpoint counts as broken, and how much is done twice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ResilienceSettings:
    """Times in seconds, shares from 0 to 1."""

    retry_share: float = 0.2
    """Retries allowed as a share of requests, so that a storm of them cannot follow an outage."""
    retry_burst: int = 20
    """Retries allowed beyond that at once."""
    consecutive_failures: int = 5
    """In a row, after which an endpoint is ejected."""
    failure_share: float = 0.5
    """Of the attempts of the last `window` seconds, above which an endpoint is ejected …"""
    min_attempts: int = 20
    """… if there were at least so many."""
    window: float = 10.0
    ejection: float = 2.0
    """The first time; doubled each time that it is needed again within a window."""
    max_ejection: float = 60.0
    max_ejected_share: float = 0.5
    """Of all endpoints, at most so many are ejected by what requests met; one that is known alone never is."""
    health_interval: float = 2.0
    health_timeout: float = 5.0
    unhealthy_after: int = 3
    """Failed looks at /health in a row."""
    models_interval: float = 10.0
    """Between two looks at /v1/models."""
    hedge_delay: float | None = None
    """Ask a second endpoint when the first has not begun to answer after so long; None: never."""
    hedge_quantile: float | None = None
    """Instead, or at least, wait until so large a share of the last answers had begun: 0.95."""
    hedge_share: float = 0.05
    """Of requests, that may be asked twice."""
