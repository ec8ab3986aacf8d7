"""Hears one engine's KV events and keeps the index as the engine's cache is.

What was missed is asked for at the replay port. Where that cannot be had, what is known of the endpoint is given up
(a resync): better to know little than to know wrongly. So it is, too, when another engine answers at the address.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from quire.gateway.kv.index import KVIndex
from quire.gateway.kv.sequence import BatchSequence, Turn
from quire.wire.kv_events import (
    MAX_PAYLOAD_BYTES,
    BadKVEvents,
    KVEventBatch,
    decode_batch,
    decode_sequence,
    encode_sequence,
    read_replay,
)

MAX_WAITING = 2_000
"""Batches that wait to be read; more are lost, and then asked for."""
MAX_TOPIC = 1024
READS_AT_ONCE = 64
"""Batches read in a row before others have their turn."""
MAX_REPLAYED = 200_000
MAX_REPLAYED_BYTES = 256 * 1024 * 1024
_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
_DISCONNECTED = zmq.EVENT_DISCONNECTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds: for the next answer of a replay, for all of one, until one is tried again after one that failed."""

    answer: float = 2.0
    replay: float = 60.0
    retry: float = 5.0


class ReplayFailed(Exception):
    """The replay port gave no answer, a wrong one, or too much."""


class KVEventSubscriber:
    """`run` until cancelled. `address` and `replay_address` are ZeroMQ addresses.

    It listens to whatever topic there is: who tells is known by the address, and a topic that is not as expected must
    not make the events vanish.
    """

    def __init__(
        self,
        endpoint: str,
        index: KVIndex,
        context: zmq.asyncio.Context,
        *,
        address: str,
        replay_address: str | None = None,
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._index = index
        self._context = context
        self._address = address
        self._replay_address = replay_address
        self._patience = patience
        self._clock = clock
        self._sequence = BatchSequence()
        self._no_replay_before = -float("inf")
        self.health = index.add(endpoint)
        self.health.address = address

    async def run(self) -> None:
        """Forgets the endpoint's blocks when it ends."""
        hearing = self._context.socket(zmq.SUB)
        watching: zmq.asyncio.Socket | None = None
        try:
            hearing.setsockopt(zmq.LINGER, 0)
            hearing.setsockopt(zmq.RCVHWM, MAX_WAITING)
            hearing.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
            hearing.setsockopt(zmq.RECONNECT_IVL, 100)
            hearing.setsockopt(zmq.RECONNECT_IVL_MAX, 5_000)
            hearing.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
            hearing.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
            hearing.setsockopt(zmq.IPV6, "[" in self._address)
            hearing.setsockopt(zmq.SUBSCRIBE, b"")
            watching = hearing.get_monitor_socket(_CONNECTED | _DISCONNECTED)
            hearing.connect(self._address)
            await self._hear(hearing, watching)
        finally:
            self.health.connected = False
            self._index.clear(self._endpoint)
            hearing.disable_monitor()
            if watching is not None:
                watching.close(linger=0)
            hearing.close(linger=0)

    async def _hear(self, hearing: zmq.asyncio.Socket, watching: zmq.asyncio.Socket) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(hearing, zmq.POLLIN)
        poller.register(watching, zmq.POLLIN)
        # What is there is read without a future for each message.
        batches: zmq.Socket[bytes] = zmq.Socket.shadow(hearing)
        connections: zmq.Socket[bytes] = zmq.Socket.shadow(watching)
        while True:
            await poller.poll()
            for _ in range(READS_AT_ONCE):
                # The connection first: a batch that was sent over it may be another engine's.
                while int(connections.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                    await self._notice(connections.recv_multipart())
                try:
                    frames = batches.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                await self._receive(frames)
            await asyncio.sleep(0)

    async def _notice(self, message: list[bytes]) -> None:
        """The connection is there, or no longer."""
        self.health.connected = parse_monitor_message(message)["event"] != _DISCONNECTED
        if self.health.connected:
            await self._meet()

    # --- live batches -------------------------------------------------------------------------------------------

    async def _receive(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 3:
                raise BadKVEvents(f"a message of {len(frames)} frames")
            number = decode_sequence(frames[1])
            if number < 0:
                raise BadKVEvents(f"the sequence {number}")
        except BadKVEvents as error:
            self._note_bad(error)
            return
        self._note_topic(frames[0])
        batch = self._decode(frames[2])
        turn = self._sequence.judge(number, 0.0 if batch is None else batch.ts)
        if turn is Turn.REPEATED:
            self.health.repeated += 1
            return
        if turn is Turn.RESTARTED:
            self._begin_anew()
            turn = Turn.FIRST if number else Turn.NEXT
        last = self._sequence.number
        if turn is Turn.GAP:
            assert last is not None
            self.health.missed += number - last - 1
        if turn is not Turn.NEXT:
            await self._catch_up(0 if last is None else last + 1)
            last = self._sequence.number
            if last is not None and number > last + 1:  # a gap is left
                self._resync()
        if last is None or number > last:  # else the replay had it
            self._take(number, batch, frames[2])

    def _decode(self, payload: bytes) -> KVEventBatch | None:
        try:
            return decode_batch(payload)
        except BadKVEvents as error:
            self._note_bad(error)
            return None

    def _take(self, number: int, batch: KVEventBatch | None, payload: bytes) -> None:
        """A batch that cannot be read may have been of removals: nothing is certain after it."""
        if batch is None:
            self._resync()
        else:
            self._index.apply(self._endpoint, batch)
        self._sequence.take(number, 0.0 if batch is None else batch.ts, payload)

    def _note_topic(self, topic: bytes) -> None:
        self.health.last_topic = topic[:MAX_TOPIC].decode(errors="replace")

    def _note_bad(self, error: BadKVEvents) -> None:
        self.health.bad_messages += 1
        if self.health.bad_messages == 1:
            structlog.get_logger().warning("kv_events_unreadable", endpoint=self._endpoint, error=str(error))

    def _resync(self) -> None:
        self.health.resyncs += 1
        self._index.clear(self._endpoint)

    def _begin_anew(self) -> None:
        self.health.restarts += 1
        self._index.clear(self._endpoint)
        self._sequence.forget()

    # --- what was missed ----------------------------------------------------------------------------------------

    async def _meet(self) -> None:
        """There is a connection: find out what was missed, and whether it is to the same engine."""
        last = self._sequence.number
        if last is None:
            await self._catch_up(0)
            return
        if self._replay_address is None:
            self._sequence.forget()
            self._resync()
            return
        try:
            same = False
            async with contextlib.aclosing(self._replay(self._replay_address, last)) as answers:
                async for number, payload in answers:
                    if not same and not self._sequence.is_last(number, payload):
                        break
                    same = True
                    self._take_replayed(number, payload)
        except ReplayFailed:
            self._sequence.forget()
            self._resync()
            return
        if not same:
            self._begin_anew()
            await self._catch_up(0)

    async def _catch_up(self, first: int) -> None:
        """Take in what the replay port has from `first` on. Where it does not reach back so far, and something is
        known already, that is given up."""
        if self._replay_address is None:
            return
        try:
            async with contextlib.aclosing(self._replay(self._replay_address, first)) as answers:
                async for number, payload in answers:
                    self._take_replayed(number, payload)
        except ReplayFailed as error:
            structlog.get_logger().info("kv_events_not_replayed", endpoint=self._endpoint, reason=str(error))

    def _take_replayed(self, number: int, payload: bytes) -> None:
        last = self._sequence.number
        if last is not None and number <= last:
            return
        if last is not None and number != last + 1:
            self._resync()
        self._take(number, self._decode(payload), payload)
        self.health.replayed += 1

    async def _replay(self, address: str, first: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Batches from the replay port. Raises `ReplayFailed`."""
        if self._clock() < self._no_replay_before:
            raise ReplayFailed("the last one failed a moment ago")
        try:
            async with contextlib.aclosing(self._ask(address, first)) as answers:
                async for answer in answers:
                    yield answer
        except ReplayFailed:
            self._no_replay_before = self._clock() + self._patience.retry
            raise

    async def _ask(self, address: str, first: int) -> AsyncGenerator[tuple[int, bytes], None]:
        asking = self._context.socket(zmq.DEALER)
        try:
            asking.setsockopt(zmq.LINGER, 0)
            asking.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
            asking.setsockopt(zmq.IPV6, "[" in address)
            asking.connect(address)
            await asking.send_multipart([b"", encode_sequence(first)])
            until = self._clock() + self._patience.replay
            count = size = 0
            while True:
                async with asyncio.timeout(self._patience.answer):
                    frames = await asking.recv_multipart()
                answer = read_replay(frames)
                if answer is None:
                    return
                if len(frames) == 4:
                    self._note_topic(frames[1])
                count, size = count + 1, size + len(answer[1])
                if count > MAX_REPLAYED or size > MAX_REPLAYED_BYTES or self._clock() > until:
                    raise ReplayFailed(f"no end after {count} batches")
                yield answer
                if count % READS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        except TimeoutError:
            raise ReplayFailed(f"no answer within {self._patience.answer:g} s") from None
        except BadKVEvents as error:
            self._note_bad(error)
            raise ReplayFailed(str(error)) from None
        finally:
            asking.close(linger=0)
