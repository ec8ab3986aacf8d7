"""Connections to endpoints: opened, kept for reuse, bounded."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from quire.gateway.endpoint import Endpoint
from quire.gateway.errors import UpstreamError, UpstreamTimeout
from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.proxy.upstream import Connection, HeadLimits


@dataclass(slots=True)
class _AtEndpoint:
    idle: deque[Connection] = field(default_factory=deque)
    open: set[Connection] = field(default_factory=set)
    """In use, or idle."""
    num_opening: int = 0


class Connections:
    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self._limits = HeadLimits(max_bytes=settings.max_answer_head, max_headers=settings.max_answer_headers)
        self._by_key: dict[str, _AtEndpoint] = {}
        self._tls: ssl.SSLContext | None = None
        self._closed = False

    async def acquire(self, endpoint: Endpoint, *, fresh: bool = False) -> Connection:
        """An idle connection (unless `fresh`), else a new one. Raises `UpstreamError`."""
        if self._closed:
            raise _stopping()
        held = self._by_key.get(endpoint.key)
        if held is None:
            held = self._by_key[endpoint.key] = _AtEndpoint()
        oldest = asyncio.get_running_loop().time() - self._settings.keep_alive
        while held.idle and not fresh:
            connection = held.idle.pop()
            if connection.open and connection.idle_since > oldest:
                connection.reused = True
                return connection
            connection.abort()
        if len(held.open) + held.num_opening >= self._settings.max_connections:
            most = self._settings.max_connections
            raise UpstreamError(f"Endpoint {endpoint.name} has {most} open connections already.", kind="connections")
        return await self._open(endpoint, held)

    async def _open(self, endpoint: Endpoint, held: _AtEndpoint) -> Connection:
        held.num_opening += 1
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                _, connection = await asyncio.get_running_loop().create_connection(
                    partial(Connection, endpoint.name, self._limits, partial(self._lost, held)),
                    endpoint.host,
                    endpoint.port,
                    ssl=self._tls_context() if endpoint.scheme == "https" else None,
                )
        except TimeoutError:
            seconds = self._settings.connect_timeout
            raise UpstreamTimeout(
                f"Endpoint {endpoint.name} did not connect in {seconds:g} s.", kind="connect"
            ) from None
        except (OSError, UnicodeError) as error:  # a name that no DNS can hold
            raise UpstreamError(f"Endpoint {endpoint.name} cannot be reached: {error}.", kind="connect") from None
        finally:
            held.num_opening -= 1
        if self._closed:
            connection.abort()
            raise _stopping()
        if connection.open:
            held.open.add(connection)
        return connection

    def release(self, endpoint: Endpoint, connection: Connection) -> None:
        """After its answer was read to the end."""
        connection.finish()
        held = self._by_key.get(endpoint.key)
        known = held is not None and connection in held.open  # else its endpoint left, or moved
        usable = connection.reusable and connection.open and connection.sent
        if held is None or not known or not usable or self._is_full(held):
            connection.abort()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        held.idle.append(connection)

    def _is_full(self, held: _AtEndpoint) -> bool:
        oldest = asyncio.get_running_loop().time() - self._settings.keep_alive
        while held.idle and held.idle[0].idle_since < oldest:
            held.idle.popleft().abort()
        return len(held.idle) >= self._settings.max_idle_connections

    @staticmethod
    def _lost(held: _AtEndpoint, connection: Connection) -> None:
        held.open.discard(connection)
        if not connection.busy and connection in held.idle:
            held.idle.remove(connection)

    def forget(self, endpoint: Endpoint) -> None:
        """It left: idle connections are closed, those in use when they are done."""
        held = self._by_key.pop(endpoint.key, None)
        while held is not None and held.idle:
            held.idle.pop().abort()

    def close(self) -> None:
        """Close all, and open no more. Whoever waits for an answer gets an `UpstreamError`."""
        self._closed = True
        for held in self._by_key.values():
            while held.idle:
                held.idle.pop().abort()
            for connection in tuple(held.open):
                connection.fail(_stopping())
        self._by_key.clear()

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            if not self._settings.verify_tls:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        return self._tls


def _stopping() -> UpstreamError:
    return UpstreamError("The gateway is stopping.", kind="stopped", remedy="Ask again.")
