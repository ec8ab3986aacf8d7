"""What decides how the API server answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """A listening HTTP server, whatever it serves."""

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless told otherwise."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""
    api_key: str | None = None
    """Key that every route but /health asks for (Authorization: Bearer)."""
    ssl_certfile: str | None = None
    """Certificate chain in PEM, for TLS."""
    ssl_keyfile: str | None = None
    """Its private key in PEM."""
    max_body_bytes: int = 8 * 1024 * 1024
    """Largest request body; more is refused with 413."""
    max_connections: int = 1024
    """Most connections at once; more are refused with 503."""
    request_read_timeout: float = 30.0
    """Seconds a client may take to send its request."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_json: bool = False
    """Log in JSON lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(ListenConfig):
    """One API server. Every field is a flag of `quire serve`."""

    served_model_name: str | None = None
    """The name clients use; the model's reference otherwise."""
    heartbeat_timeout: float = 30.0
    """Seconds without a sign from the engine before /ready turns red; twice that restarts it."""
    max_engine_restarts: int = 5
    """Engine deaths in a row, each without one served request between, before giving up."""
    generation_config: bool = True
    """Take sampling defaults from the checkpoint's generation_config.json."""
