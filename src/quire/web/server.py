"""A listening HTTP server: its socket, its limits, and the orders to stop it."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from dataclasses import dataclass, field
from functools import partial

import structlog
import uvicorn
from starlette.types import ASGIApp

from quire.config.server import ListenConfig
from quire.core.errors import ConfigError
from quire.web.protocol import ConnectionLimits, GuardedProtocol

WRITE_TIMEOUT = 60.0
BACKLOG = 1024


@dataclass(slots=True)
class StopOrders:
    """Two orders: stop when the running requests are done, and stop at once."""

    drain: asyncio.Event = field(default_factory=asyncio.Event)
    now: asyncio.Event = field(default_factory=asyncio.Event)

    def give(self) -> None:
        """The first call asks to drain, the second to stop at once."""
        (self.now if self.drain.is_set() else self.drain).set()

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """To SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.give)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers (draining comes first, and is ours), and telling when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


def bind(config: ListenConfig) -> socket.socket:
    """The socket to listen on. Raises `ConfigError` if the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror}.",
            param="port",
            remedy="Choose another --port; 0 takes a free one.",
        ) from None
    listener.setblocking(False)
    return listener


def allow_open_files(wanted: int) -> None:
    """Raise this process's limit so that `max_connections` can be reached; as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            structlog.get_logger().warning("fewer connections than configured", open_files=most)


def url(config: ListenConfig, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"


def uvicorn_config(app: ASGIApp, config: ListenConfig) -> uvicorn.Config:
    """Bounds on connections and slow clients; no access log. Raises `ConfigError` for TLS that cannot be."""
    limits = ConnectionLimits(
        read_timeout=config.request_read_timeout,
        write_timeout=WRITE_TIMEOUT,
        max_connections=config.max_connections,
    )
    try:
        made = uvicorn.Config(
            app,
            http=partial(GuardedProtocol, limits=limits),  # type: ignore[arg-type]  # called like the class
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=2,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
        made.load()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"TLS cannot be set up with {config.ssl_certfile}: {error}.",
            param="ssl_certfile",
            remedy="Give a certificate chain and its key in PEM with --ssl-certfile and --ssl-keyfile.",
        ) from None
    return made
