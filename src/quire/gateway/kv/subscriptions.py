"""One subscriber for each endpoint that tells its KV events, for as long as the pool has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog
import zmq
import zmq.asyncio

from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.kv.health import Expected, KVFinding, diagnose
from quire.gateway.kv.index import KVIndex
from quire.gateway.kv.subscriber import KVEventSubscriber, Patience

PORT_LABEL: Final = "quire.ai/kv-events-port"
REPLAY_PORT_LABEL: Final = "quire.ai/kv-replay-port"
RETRY_SECONDS = 1.0
MAX_SOCKETS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class EventPorts:
    """Where an endpoint tells its KV events. The host is always the endpoint's own: what a server says of itself must
    not make the gateway connect to somebody else."""

    events: int
    replay: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortsOf:
    """The ports of an endpoint: by its labels, else as its metrics page says (quire's does), else those of the
    configuration, if it has any."""

    events: int | None = None
    replay: int | None = None

    def __call__(self, endpoint: Endpoint) -> EventPorts | None:
        labelled = _port(endpoint.labels.get(PORT_LABEL))
        if labelled is not None:
            return EventPorts(events=labelled, replay=_port(endpoint.labels.get(REPLAY_PORT_LABEL)))
        metrics = endpoint.metrics
        if metrics is not None and metrics.kv_events_port is not None:
            return EventPorts(events=metrics.kv_events_port, replay=metrics.kv_replay_port)
        return None if self.events is None else EventPorts(events=self.events, replay=self.replay)


def _port(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 6 and 0 < int(text) < 65_536 else None


@dataclass(slots=True)
class KVSubscriptions:
    """`start` and `stop` on the gateway's loop. `refresh` an endpoint when its labels or metrics are new."""

    pool: Pool
    index: KVIndex
    context: zmq.asyncio.Context
    ports: Callable[[Endpoint], EventPorts | None] = field(default_factory=PortsOf)
    patience: Patience = field(default_factory=Patience)
    _tasks: dict[str, tuple[EventPorts, asyncio.Task[None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Each endpoint takes three, one that watches the connection among them; ZeroMQ allows 1023 unless told before
        # the first is made.
        self.context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)

    def start(self) -> None:
        self.pool.watch(self.refresh, self._left)

    async def stop(self) -> None:
        tasks = [task for _ports, task in self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def refresh(self, endpoint: Endpoint) -> None:
        """Hear an endpoint that tells where to, if it is not heard yet."""
        ports = self.ports(endpoint)
        known = self._tasks.get(endpoint.key)
        if ports is None or (known is not None and known[0] == ports):
            return
        if known is not None:
            known[1].cancel()
        self._tasks[endpoint.key] = ports, asyncio.create_task(self._hear(endpoint, ports))

    def findings(self) -> list[KVFinding]:
        """What is wrong with the events of the endpoints; nothing where none tells any, and none were configured."""
        heard = {key: health for key, health in self.index.health().items() if key in self._tasks}
        if not heard:
            return []
        expected = {
            endpoint.key: Expected(
                block_size=None if endpoint.metrics is None else endpoint.metrics.block_size, models=endpoint.models
            )
            for endpoint in self.pool.all
        }
        silent = [
            KVFinding(
                endpoint=endpoint.key,
                status="warn",
                detail="It does not say where it tells its KV events, though others do.",
                remedy=f"Enable them in the engine; if it is not quire's, label the endpoint {PORT_LABEL}.",
            )
            for endpoint in self.pool.all
            if endpoint.key not in self._tasks
        ]
        return [*diagnose(heard, expected), *silent]

    def _left(self, endpoint: Endpoint) -> None:
        known = self._tasks.pop(endpoint.key, None)
        if known is not None:
            known[1].cancel()
        self.index.remove(endpoint.key)

    async def _hear(self, endpoint: Endpoint, ports: EventPorts) -> None:
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        subscriber = KVEventSubscriber(
            endpoint.key,
            self.index,
            self.context,
            address=f"tcp://{host}:{ports.events}",
            replay_address=None if ports.replay is None else f"tcp://{host}:{ports.replay}",
            patience=self.patience,
        )
        while True:
            try:
                await subscriber.run()
            except Exception:  # a fault of ours must not end the hearing for good
                structlog.get_logger().exception("kv_events_subscriber_failed", endpoint=endpoint.key)
                await asyncio.sleep(RETRY_SECONDS)
