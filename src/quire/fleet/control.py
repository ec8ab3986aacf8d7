"""The control plane: follow the events, carry out the plan, record what is seen. All it knows is in the journal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

from quire.core.errors import QuireError
from quire.fleet import endpoints, events, launch
from quire.fleet.address import url, within_reach
from quire.fleet.apply import apply
from quire.fleet.directory import ServiceDirectory
from quire.fleet.events import AnyEvent
from quire.fleet.journal import SNAPSHOT_EVERY, Journal
from quire.fleet.plan import Action, Drain, Kill, Start, Stop, plan
from quire.fleet.probe import Probe
from quire.fleet.provider import Provider
from quire.fleet.spec import GATEWAY
from quire.fleet.state import FleetState, Replica

TICK = 0.1
GIB = 2**30
PROBE_EVERY = {"starting": 0.2, "ready": 1.0, "unready": 1.0, "draining": 0.2}
"""Seconds between probes, by phase."""
FAILED_PROBES = 3
"""In a row, before a ready replica counts as unready: one slow answer is no illness."""
DRAIN_SETTLE = 1.0
"""Seconds of draining before its idleness is believed: the gateway has to have read the endpoints file."""


class ControlPlane:
    """Runs one service. `environ` is what its processes inherit; `on_event` sees each event as it is applied.
    `alone`: nobody else has to reach the journal meanwhile, see there.

    While nothing can be written, on a full disk, what happens is kept in memory, and written down once that is
    possible: what runs is seen to, and stopped if that is asked for.
    """

    def __init__(
        self,
        directory: ServiceDirectory,
        provider: Provider,
        *,
        environ: Mapping[str, str],
        clock: Callable[[], float] = time.time,
        on_event: Callable[[AnyEvent, FleetState], None] | None = None,
        alone: bool = False,
    ) -> None:
        self._directory = directory
        self._provider = provider
        self._environ = environ
        self._clock = clock
        self._on_event = on_event
        self._journal = Journal(directory.database, alone=alone)
        self._seq, self.state = self._journal.load()
        self._snapshot_seq = self._seq
        self._unwritten: list[AnyEvent] = []
        """Applied to the state, and not in the journal yet."""
        self._troubles: set[str] = set()
        self._policy: tuple[dict[str, Any], ...] | None = None
        self._written: list[endpoints.Endpoint] | None = None
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._cores = len(os.sched_getaffinity(0))

    async def run(self, until: Callable[[FleetState], bool]) -> None:
        """Work until `until(state)`; whatever runs then, runs on."""
        probe = Probe()
        try:
            self._resume()
            while True:
                self._observe()
                self._follow()
                for action in plan(self.state, self._clock()):
                    self._perform(action)
                self._follow()
                self._tell_gateway()
                self._look_after_probes(probe)
                if until(self.state):
                    return
                await asyncio.sleep(TICK)
        finally:
            for task in self._probes.values():
                task.cancel()
            await asyncio.gather(*self._probes.values(), return_exceptions=True)
            await probe.close()
            self._journal.close()

    # --- events ---------------------------------------------------------------------------------------------

    def record(self, event: AnyEvent) -> None:
        if not self._unwritten:
            with self._as_far_as_possible("the journal"):
                self._journal.append(event)
                return
        self._unwritten.append(event)
        self._apply(event)

    def _follow(self) -> None:
        for seq, event in self._journal.after(self._seq):
            self._seq = seq
            self._apply(event)
        with self._as_far_as_possible("the journal"):
            if self._unwritten:
                self._journal.append(*self._unwritten)
                self._unwritten.clear()
                self._seq, self.state = self._journal.load()  # the order in which the next control plane will see it
            if self._seq - self._snapshot_seq >= SNAPSHOT_EVERY:
                self._journal.compact(self._seq, self.state)
                self._snapshot_seq = self._seq

    def _apply(self, event: AnyEvent) -> None:
        self.state = apply(self.state, event)
        if self._on_event is not None:
            self._on_event(event, self.state)

    @contextlib.contextmanager
    def _as_far_as_possible(self, what: str) -> Iterator[None]:
        """What cannot be written is told once, and tried again: the processes have to be seen to, whatever happens."""
        try:
            yield
        except (QuireError, OSError) as error:
            if what not in self._troubles:
                self._log_error(f"{what} cannot be written; going on without", error)
            self._troubles.add(what)
        else:
            self._troubles.discard(what)

    def _log_error(self, message: str, error: BaseException | None, **more: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may have gone
            structlog.get_logger().error(message, error=str(error) or repr(error), **more)

    # --- what runs ------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """An earlier control plane may have died between deciding on a stop or a kill and sending it."""
        for replica in self.state.replicas.values():
            if replica.killed:
                self._provider.kill(replica.name)
            elif replica.phase == "stopping":
                self._provider.stop(replica.name)

    def _observe(self) -> None:
        """Compare what should run with what does: ends, numbers of processes, and what nobody knows of."""
        found = self._provider.processes()
        for replica in self.state.replicas.values():
            if not replica.has_process:
                continue
            seen = found.get(replica.name)
            if seen is not None and seen.running and seen.start != replica.starts:
                self._provider.kill(replica.name)  # its start was never written down, and would be decided again
            elif seen is None or seen.start != replica.starts:
                self._ended(replica, None, None)
            elif not seen.running:
                self._ended(replica, seen.returncode, seen.error)
            elif seen.pid is not None and seen.pid != replica.pid:
                self.record(events.ProcessStarted(at=self._clock(), replica=replica.name, pid=seen.pid))
        for name, seen in found.items():
            if name not in self.state.replicas:
                if seen.running:
                    self._provider.kill(name)
                else:
                    self._provider.forget(name)

    def _ended(self, replica: Replica, returncode: int | None, error: str | None) -> None:
        self.record(events.ProcessExited(at=self._clock(), replica=replica.name, returncode=returncode, error=error))

    def _perform(self, action: Action) -> None:
        now = self._clock()
        match action:
            case Start():
                self._start(action, now)
            case Drain():
                self.record(
                    events.DrainDecided(at=now, replica=action.replica, deadline=action.deadline, reason=action.reason)
                )
            case Stop():
                self.record(
                    events.StopDecided(at=now, replica=action.replica, deadline=action.deadline, reason=action.reason)
                )
                self._provider.stop(action.replica)
            case Kill():
                self.record(events.KillDecided(at=now, replica=action.replica, reason=action.reason))
                self._provider.kill(action.replica)

    def _start(self, action: Start, now: float) -> None:
        assert self.state.spec is not None
        spec = action.role
        engines = sum(role.replicas for role in self.state.spec.roles if role.role != GATEWAY)
        self._follow()
        taken = frozenset(replica.port for replica in self.state.replicas.values())
        self.record(
            events.StartDecided(
                at=now,
                replica=action.replica,
                role=spec.role,
                revision=spec.revision,
                port=spec.port if spec.port is not None else self._provider.free_port(taken),
                threads=launch.threads_for(spec, engines, self._cores, self._environ),
            )
        )
        self._follow()
        replica = self.state.replicas[action.replica]
        endpoints_file = self._directory.endpoints_file
        if spec.role == GATEWAY:
            self._tell_gateway()
        order = launch.launch(
            replica,
            spec,
            engines=max(engines, 1),
            endpoints_file=endpoints_file,
            environ=self._environ,
            free_ports=lambda: self._two_ports(taken),
        )
        try:
            self._provider.start(order)
        except OSError as error:
            self._ended(replica, None, f"It could not be started: {error}.")

    def _two_ports(self, taken: frozenset[int]) -> tuple[int, int]:
        first = self._provider.free_port(taken)
        return first, self._provider.free_port(taken | {first})

    def _tell_gateway(self) -> None:
        if self.state.spec is None:
            return
        found = endpoints.endpoints(self.state)
        gateway = self.state.spec.role(GATEWAY)
        with self._as_far_as_possible("what the gateway reads"):
            if found != self._written:
                endpoints.write(self._directory.endpoints_file, found)
                self._written = found
            if gateway is not None and gateway.documents != self._policy:
                launch.write_policy(launch.policy_file(self._directory.endpoints_file), gateway)
                self._policy = gateway.documents

    # --- how they are ---------------------------------------------------------------------------------------

    def _look_after_probes(self, probe: Probe) -> None:
        for name, task in list(self._probes.items()):
            if task.done():
                del self._probes[name]
                if not task.cancelled() and task.exception() is not None:
                    self._log_error("probing failed", task.exception(), replica=name)
        for name, replica in self.state.replicas.items():
            if name not in self._probes and replica.phase in PROBE_EVERY:
                self._probes[name] = asyncio.create_task(self._watch(name, replica.starts, probe))

    async def _watch(self, name: str, start: int, probe: Probe) -> None:
        """Probe one process for as long as it is there."""
        failed = 0
        while True:
            replica = self.state.replicas.get(name)
            if replica is None or replica.starts != start or replica.phase not in PROBE_EVERY:
                return
            if replica.phase == "draining":
                await self._probe_draining(replica, probe)
            else:
                trouble = await probe.trouble(
                    self._url(replica), engine=replica.role != GATEWAY, api_key=self._api_key(replica)
                )
                failed = 0 if trouble is None else failed + 1
                self._watch_memory(replica)
                replica = self.state.replicas.get(name)
                if replica is None or replica.starts != start:
                    return
                if trouble is None and replica.phase in ("starting", "unready"):
                    self.record(events.BecameReady(at=self._clock(), replica=name))
                elif trouble is not None and failed >= FAILED_PROBES and replica.phase == "ready":
                    self.record(events.BecameUnready(at=self._clock(), replica=name, reason=trouble))
            await asyncio.sleep(PROBE_EVERY.get(replica.phase, 0))

    def _watch_memory(self, replica: Replica) -> None:
        spec = self.state.spec_of(replica)
        if spec is None or spec.memory is None or replica.over_limit is not None:
            return
        held = self._provider.memory(replica.name)
        if held > spec.memory:
            reason = f"It holds {held / GIB:.2f} GiB of memory, more than its limit of {spec.memory / GIB:.2f} GiB."
            self.record(events.WentOverLimit(at=self._clock(), replica=replica.name, reason=reason))

    async def _probe_draining(self, replica: Replica, probe: Probe) -> None:
        if replica.idle or 0 <= self._clock() - replica.since < DRAIN_SETTLE:
            return
        if await probe.in_flight(self._url(replica), self._api_key(replica)) == 0:
            self.record(events.BecameIdle(at=self._clock(), replica=replica.name))

    def _url(self, replica: Replica) -> str:
        spec = self.state.spec_of(replica)
        return url(within_reach("" if spec is None else spec.host), replica.port)

    def _api_key(self, replica: Replica) -> str | None:
        spec = self.state.spec_of(replica)
        return None if spec is None else launch.api_key(spec, self._environ)
