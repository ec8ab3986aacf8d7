"""Publishes KV events from a thread of its own: a step never waits for it.

The engine numbers a batch and puts it into a queue. What does not fit is dropped, and its number with it: a gap in the
sequence by which readers know. So is what cannot be published, which is told on stderr. What was published is kept for
replay, up to `buffer_steps` batches and `MAX_BUFFER_BYTES`; what was replayed and not taken is bounded by
`MAX_REPLAY_BYTES`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from quire.config.kv_events import PARAM, KVEventsConfig
from quire.core.errors import ConfigError
from quire.core.model_info import KVEventsInfo
from quire.wire.kv_events import END_OF_REPLAY, KVCacheEvent, KVEventBatch, encode_batch, encode_sequence

MAX_BUFFER_BYTES = 64 * 1024 * 1024
MAX_REPLAY_BYTES = 2 * MAX_BUFFER_BYTES
"""Of answers that readers have yet to take, all together; each reader has a half at most. Beyond it requests wait."""
MESSAGE_BYTES = 512
REPLAY_BYTES = 4096
"""What a message that waits costs beside its payload, and what a replay does beside its messages."""
MAX_ASKED = 64
"""Readers whose requests wait; those of more are not answered."""
LOOK_MS = 50
"""How often it is looked, while requests wait, whether there is room now."""
SILENCE_MS = 30_000
"""A reader whose machine takes nothing for so long is disconnected, and what waits for it is freed."""
MAX_REQUEST_BYTES = 4096
"""Of what a reader may send: a topic to subscribe to, or a sequence number."""


@dataclass(frozen=True, slots=True)
class _Replay:
    client: bytes
    size: int
    end: zmq.MessageTracker
    """Done when the last message of it has gone out, or can no longer."""


_Batch = tuple[int, float, Sequence[KVCacheEvent]]


class KVEventPublisher:
    """`publish`, `close` and the counters are for the engine's one thread.

    `config` is resolved (`KVEventsConfig.resolved`). Raises `ConfigError` if an endpoint cannot be had.
    """

    def __init__(
        self, config: KVEventsConfig, context: zmq.Context[zmq.Socket[bytes]], *, clock: Callable[[], float] = time.time
    ) -> None:
        assert config.endpoint is not None
        assert config.topic is not None
        self._topic = config.topic.encode()
        self._clock = clock
        self._max_queue_size = config.max_queue_size
        self._queue: deque[_Batch | None] = deque()
        self._buffer: deque[tuple[int, bytes]] = deque()
        self._buffer_steps = config.buffer_steps
        self._buffer_bytes = 0
        self._next_sequence = 0
        self._num_refused = 0
        self._num_failed = 0  # the publisher's thread counts these
        self._num_faults = 0
        self._ended = False
        self._replays: list[_Replay] = []
        self._asked: dict[bytes, int] = {}
        """By reader: the first sequence that it wants, of requests that wait for room."""
        with contextlib.ExitStack() as undo:
            self._publishing = _open(context, zmq.PUB, config.endpoint, config.hwm, binds=config.binds)
            undo.callback(self._publishing.close, 0)
            self._replaying: zmq.Socket[bytes] | None = None
            if config.replay_endpoint is not None:
                # Without a bound of its own: what waits in it is counted; see `_has_room`.
                self._replaying = _open(context, zmq.ROUTER, config.replay_endpoint, 0, binds=True)
            undo.pop_all()
        self.info = KVEventsInfo(
            endpoint=_address(self._publishing, config.endpoint),
            topic=config.topic,
            replay_endpoint=None if self._replaying is None else _address(self._replaying, config.replay_endpoint),
        )
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    @property
    def num_published(self) -> int:
        """Batches handed over to be published."""
        return self._next_sequence - self.num_dropped

    @property
    def num_dropped(self) -> int:
        """Batches that found the queue full, or could not be published."""
        return self._num_refused + self._num_failed

    def publish(self, events: Sequence[KVCacheEvent]) -> None:
        """Hand over what one step changed. Takes no longer for many events than for few."""
        sequence = self._next_sequence
        self._next_sequence += 1
        if self._ended or len(self._queue) >= self._max_queue_size:
            self._num_refused += 1
            return
        self._queue.append((sequence, self._clock(), events))
        self._wake()

    def close(self) -> None:
        """Publish what waits, and end."""
        self._queue.append(None)
        self._wake()
        self._thread.join()
        self._bell.close()
        self._ring.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been rung already
            self._ring.send(b"\0")

    # --- on the publisher's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        if self._replaying is not None:
            poller.register(self._replaying, zmq.POLLIN)
        try:
            while self._publish_all():
                poller.poll(LOOK_MS if self._asked else None)
                with contextlib.suppress(BlockingIOError):
                    self._bell.recv(4096)
                if self._replaying is not None:
                    self._try(self._answer, self._replaying, what="a request for a replay could not be answered")
        except Exception:
            self._ended = True
            while self._queue:
                self._num_failed += self._queue.popleft() is not None
            print("quire: KV events are published no more, until the engine is started anew:", file=sys.stderr)
            traceback.print_exc()
        finally:
            self._publishing.close(linger=1000)
            if self._replaying is not None:
                self._replaying.close(linger=0)

    def _publish_all(self) -> bool:
        """What is in the queue; False once it was closed. A batch that cannot be published is one that was lost."""
        while self._queue:
            batch = self._queue.popleft()
            if batch is None:
                return False
            if not self._try(self._publish, *batch, what=f"batch {batch[0]} of KV events could not be published"):
                self._num_failed += 1
        return True

    def _try(self, act: Callable[..., None], *given: object, what: str) -> bool:
        """Whether it went well. A fault is told: the first, the second, the fourth …"""
        try:
            act(*given)
        except Exception:
            self._num_faults += 1
            if self._num_faults.bit_count() == 1:
                print(f"quire: {what} (fault {self._num_faults}):", file=sys.stderr)
                traceback.print_exc()
            return False
        return True

    def _publish(self, sequence: int, ts: float, events: Sequence[KVCacheEvent]) -> None:
        payload = encode_batch(KVEventBatch(ts, events, 0))
        self._publishing.send_multipart((self._topic, encode_sequence(sequence), payload))
        if self._replaying is not None:
            self._keep(sequence, payload)

    def _keep(self, sequence: int, payload: bytes) -> None:
        self._buffer.append((sequence, payload))
        self._buffer_bytes += len(payload)
        while len(self._buffer) > self._buffer_steps or self._buffer_bytes > MAX_BUFFER_BYTES:
            _sequence, oldest = self._buffer.popleft()
            self._buffer_bytes -= len(oldest)

    def _answer(self, replaying: zmq.Socket[bytes]) -> None:
        """One request, if there is one, so that events never wait for many; and those for which there is room now."""
        waiting = [one for one in self._replays if not one.end.done]
        if len(waiting) < len(self._replays):
            self._replays = waiting
            for client in list(self._asked):
                self._replay(replaying, client, self._asked.pop(client))
        try:
            frames = replaying.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        if len(frames) == 3 and not frames[1] and len(frames[2]) == 8:
            self._replay(replaying, frames[0], int.from_bytes(frames[2], "big"))
        # Another does not speak the protocol, and would not understand an answer.

    def _replay(self, replaying: zmq.Socket[bytes], client: bytes, first: int) -> None:
        batches = [batch for batch in self._buffer if batch[0] >= first]
        size = sum(len(payload) for _, payload in batches) + MESSAGE_BYTES * len(batches) + REPLAY_BYTES
        if not self._has_room(client, size):
            if client in self._asked or len(self._asked) < MAX_ASKED:
                self._asked[client] = first
            return
        end = zmq.Frame(END_OF_REPLAY, track=True, copy=False)
        try:
            for sequence, payload in batches:
                answer = (client, b"", self._topic, encode_sequence(sequence), payload)
                replaying.send_multipart(answer, zmq.NOBLOCK)
            replaying.send_multipart((client, b"", b"", end, b""), zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # else the reader has gone, and what waited for it
                raise
            return
        assert isinstance(end.tracker, zmq.MessageTracker)
        self._replays.append(_Replay(client, size, end.tracker))

    def _has_room(self, client: bytes, size: int) -> bool:
        """Whether so much more may wait for the reader. One that waits for nothing yet may have any replay there is
        room for; where nothing waits for anybody, there is."""
        theirs = sum(one.size for one in self._replays if one.client == client)
        waiting = sum(one.size for one in self._replays)
        return (not theirs or theirs + size <= MAX_REPLAY_BYTES // 2) and (
            not waiting or waiting + size <= MAX_REPLAY_BYTES
        )


def _open(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str, hwm: int, *, binds: bool
) -> zmq.Socket[bytes]:
    opened = context.socket(kind)
    opened.setsockopt(zmq.SNDHWM, hwm)
    opened.setsockopt(zmq.LINGER, 0)
    opened.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
    opened.setsockopt(zmq.IPV6, "[" in endpoint or "::" in endpoint)
    if kind == zmq.ROUTER:
        opened.setsockopt(zmq.ROUTER_MANDATORY, 1)
        opened.setsockopt(zmq.TCP_MAXRT, SILENCE_MS)
    try:
        if binds:
            opened.bind(endpoint)
        else:
            opened.connect(endpoint)
    except zmq.ZMQError as error:
        opened.close()
        raise ConfigError(
            f"KV events cannot be published at {endpoint}: {zmq.strerror(error.errno or 0)}.",
            param=PARAM,
            remedy="Name another endpoint, such as tcp://*:5560; each engine needs one of its own.",
        ) from None
    return opened


def _address(bound: zmq.Socket[bytes], asked: str | None) -> str:
    """With the port that a * stood for."""
    last = bound.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(last, bytes)
    return last.rstrip(b"\0").decode() or asked or ""
