"""How long the proxy waits, how much it holds, and how often it tries."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.gateway.resilience.settings import ResilienceSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """Times in seconds, sizes in bytes."""

    connect_timeout: float = 5.0
    first_byte_timeout: float = 600.0
    """From sending the request to the first byte of the answer's body."""
    idle_timeout: float = 120.0
    """Between two pieces of an answer."""
    total_timeout: float = 3600.0
    """From the request's arrival to the end of its answer, tries and queueing included."""
    max_retries: int = 2
    max_body: int = 8 * 1024 * 1024
    max_buffered_answer: int = 8 * 1024 * 1024
    """An answer that is no stream is held until it is whole, if it is no larger; else it is passed on as it comes."""
    max_held: int = 1024 * 1024 * 1024
    """Request bodies and held answers of all calls together. Beyond it requests are refused, and answers passed on
    without being held."""
    max_answer_head: int = 64 * 1024
    max_answer_headers: int = 128
    max_connections: int = 4096
    """Open at one endpoint."""
    max_idle_connections: int = 256
    """Kept for reuse at one endpoint."""
    keep_alive: float = 4.0
    """Seconds that an idle connection is kept; less than the five after which uvicorn closes it."""
    verify_tls: bool = True
    """Check the certificates of endpoints with https."""
    trust_subset: bool = False
    """Let requests say by a header which endpoints they may go to."""
    resilience: ResilienceSettings = field(default_factory=ResilienceSettings)
