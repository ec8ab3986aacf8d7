"""Where a served engine's KV events go: what its operator left open follows from the server's address and name."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

from quire.config.engine import EngineConfig
from quire.config.kv_events import ANYWHERE, read_kv_events
from quire.config.server import ServerConfig


def place_kv_events(engine: EngineConfig, server: ServerConfig) -> tuple[EngineConfig, socket.socket | None]:
    """The engine's settings with an endpoint and a topic in them, if it is to publish.

    The default topic has the server's port. If that is any free one, it is taken now: the socket that listens on it.
    """
    events = read_kv_events(engine.kv_events_config)
    if not events.enabled:
        return engine, None
    listener, port = None, server.port
    if port == 0 and events.topic is None:
        from quire.web.server import bind

        listener = bind(server)
        port = listener.getsockname()[1]
    host = server.host if server.host in ANYWHERE else numeric(server.host)
    reachable = own_address() if host in ANYWHERE else host
    placed = events.resolved(host, reachable, port, server.served_model_name or engine.model)
    return replace(engine, kv_events_config=placed.to_json()), listener


def numeric(host: str) -> str:
    """The address that a name stands for, as ZeroMQ wants it; the name where there is none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return host


def own_address() -> str:
    """By which others reach this machine: `POD_IP`, which Kubernetes manifests set, or the address of the way out."""
    if told := os.environ.get("POD_IP"):
        return told
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation: sends nothing, but chooses a way
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
