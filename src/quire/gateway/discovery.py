"""Where endpoints come from: a list of URLs, a file, a name in DNS. Each is read again and again; what it said last
stands while it cannot be read.

The file has the form of llm-d's file discovery: `endpoints:` with `name`, `address`, `port`, and optionally
`namespace` and `labels`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import structlog

from quire.config.documents import read_documents
from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint, Pool

MAX_ENDPOINTS: Final = 4096
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


class Source(ABC):
    """Endpoints from one place. `name` tells its endpoints from those of other sources."""

    name: str
    interval: float

    @abstractmethod
    async def read(self) -> Sequence[Endpoint] | None:
        """All that there are now; None: as last time. Raises `ConfigError` or `OSError`."""


@dataclass(slots=True)
class UrlList(Source):
    """`http://host:port,…`; names are `host:port`."""

    urls: str
    name: str = "list"
    interval: float = 3600.0

    async def read(self) -> Sequence[Endpoint]:
        return [endpoint_of_url(url.strip()) for url in self.urls.split(",") if url.strip()]


@dataclass(slots=True)
class EndpointsFile(Source):
    path: Path
    name: str = "file"
    interval: float = 0.2
    _seen: tuple[int, int, int] | None = None

    async def read(self) -> Sequence[Endpoint] | None:
        status = self.path.stat()
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen == self._seen:
            return None
        endpoints = read_endpoints(self.path)
        self._seen = seen
        return endpoints


@dataclass(slots=True)
class DnsName(Source):
    """Each address of a name is an endpoint, called by the address."""

    target: str
    """name:port"""
    name: str = "dns"
    interval: float = 5.0

    async def read(self) -> Sequence[Endpoint]:
        host, port = host_and_port(self.target)
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = sorted({str(address[0]) for *_, address in found})
        return [Endpoint(address.replace(":", "-"), address, port) for address in addresses]


class _FileEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str
    address: str
    port: str | int
    namespace: str = "default"
    scheme: str = "http"
    labels: dict[str, str] = {}


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    endpoints: list[_FileEntry] = []


def read_endpoints(path: Path) -> list[Endpoint]:
    """Raises `ConfigError` that names the entry."""
    documents = read_documents(path)
    if len(documents) > 1:
        raise ConfigError(f"{path} has {len(documents)} documents.", remedy="Write one, with the list 'endpoints'.")
    try:
        entries = msgspec.convert(documents[0] if documents else {}, _File).endpoints
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}.", remedy="Each endpoint has a name, an address and a port.") from error
    if len(entries) > MAX_ENDPOINTS:
        raise ConfigError(f"{path} has {len(entries)} endpoints.", remedy=f"At most {MAX_ENDPOINTS} are followed.")
    made = [_endpoint(entry, path) for entry in entries]
    keys = [endpoint.key for endpoint in made]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"{path} has two endpoints {min(twice)!r}.", remedy="Give each its own name.")
    return made


def _endpoint(entry: _FileEntry, path: Path) -> Endpoint:
    port = str(entry.port)
    if not (port.isdecimal() and 0 < int(port[:6]) < 65_536):
        raise ConfigError(f"{path}: endpoint {entry.name!r} has the port {entry.port!r}.", remedy="1 to 65535.")
    if not (_NAME.fullmatch(entry.name) and _NAME.fullmatch(entry.namespace)):
        raise ConfigError(
            f"{path}: {entry.namespace!r}/{entry.name!r} cannot be an endpoint's name.",
            remedy="Use letters, digits, '.', '_' and '-', at most 253 of them.",
        )
    if not is_host(entry.address):
        raise ConfigError(
            f"{path}: endpoint {entry.name!r} has the address {entry.address!r}.", remedy="An IP or name."
        )
    if entry.scheme not in ("http", "https"):
        raise ConfigError(f"{path}: endpoint {entry.name!r} has the scheme {entry.scheme!r}.", remedy="http or https.")
    return Endpoint(
        entry.name, entry.address, int(port), namespace=entry.namespace, scheme=entry.scheme, labels=entry.labels
    )


def endpoint_of_url(url: str) -> Endpoint:
    """Raises `ConfigError`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not is_host(host) or parts.path.strip("/"):
        raise ConfigError(
            f"{url!r} is not the address of a model server.", param="endpoints", remedy="Write it as http://host:port."
        )
    port = port or (443 if parts.scheme == "https" else 80)
    return Endpoint(f"{host.replace(':', '-')}-{port}", host, port, scheme=parts.scheme)


def host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not is_host(host) or not port.isdecimal() or not 0 < int(port[:6]) < 65_536:
        raise ConfigError(f"{text!r} is not a name and a port.", remedy="Write it as name:port.")
    return host, int(port)


def is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _NAME.fullmatch(text) is not None
    return True


@dataclass(slots=True)
class Discovery:
    """Keeps the pool as its sources say. An endpoint leaves when the source that named it no longer does."""

    pool: Pool
    sources: Sequence[Source]
    _owned: dict[str, set[str]] = field(default_factory=dict)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """The first reading of each source must succeed, but a name need not resolve yet. Raises `ConfigError`."""
        for source in self.sources:
            try:
                self.reconcile(source, await source.read())
            except OSError as error:
                if not isinstance(source, DnsName):
                    raise ConfigError(f"{source.name}: {error}.", remedy="Name something that can be read.") from error
                structlog.get_logger().warning("no_such_name_yet", source=source.name, error=str(error))
        self._tasks = [asyncio.create_task(self._follow(source)) for source in self.sources]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, source: Source) -> None:
        last = ""
        while True:
            await asyncio.sleep(source.interval)
            try:
                self.reconcile(source, await source.read())
                last = ""
            except (ConfigError, OSError) as error:
                if str(error) != last:  # once, not five times a second
                    structlog.get_logger().warning("endpoints_unreadable", source=source.name, error=str(error))
                last = str(error)

    def reconcile(self, source: Source, endpoints: Sequence[Endpoint] | None) -> None:
        if endpoints is None:
            return
        owned = self._owned.setdefault(source.name, set())
        wanted = {endpoint.key for endpoint in endpoints}
        for key in owned - wanted:
            self.pool.remove(key)
        for endpoint in endpoints:
            self.pool.put(endpoint)
        self._owned[source.name] = wanted
