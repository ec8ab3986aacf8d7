"""The engine as a process of its own: `python -m quire.engine.process`.

The parent writes one JSON line to our stdin, `{"socket": path, "config": {EngineConfig fields}}`, and keeps the pipe
open: when it closes, the parent is gone and we go too. Everything else travels as `wire.rpc` messages over the socket.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import zmq

from quire.config.engine import EngineConfig
from quire.config.kv_events import read_kv_events
from quire.core.errors import EngineStartFailed, QuireError
from quire.core.request import EngineOutput
from quire.core.threads import limit_spinning
from quire.engine.early import EarlyWeights
from quire.engine.kv_publisher import KVEventPublisher
from quire.wire.rpc import (
    MAX_MESSAGE_BYTES,
    STATS_INTERVAL,
    Cancel,
    Outputs,
    Ready,
    StartFailed,
    Submit,
    decode_to_engine,
    encode,
)

if TYPE_CHECKING:
    from quire.engine.loop import Engine

NOTHING_TO_RUN_MS = 2
"""How long to wait for news when requests wait but none can run yet; spares a spinning core."""


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """The line on stdin."""

    socket: str
    config: EngineConfig


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent drains us.
    # Importing makes very many objects and next to no garbage: looking for it would take a tenth of the start.
    gc.disable()
    limit_spinning()  # before torch is loaded, which is why nothing above imports it
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket, contextlib.ExitStack() as closing:
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(f"ipc://{order.socket}")
        try:
            early = EarlyWeights(order.config)
            kv_events = open_kv_events(order.config, context)
            if kv_events is not None:
                closing.callback(kv_events.close)
            # Late, so that an import that fails is reported to the parent like any other failure to start.
            from quire.engine.build import build_engine

            engine = build_engine(order.config, early=early, kv_events=kv_events)
        except QuireError as error:
            socket.send(encode(StartFailed(error.to_info())))
            return 1
        except Exception as error:
            traceback.print_exc()
            from quire.engine.device import device_fault

            why = device_fault(error) or f"{type(error).__name__}: {error}"
            failed = EngineStartFailed(f"The engine could not start: {why}")
            socket.send(encode(StartFailed(failed.to_info())))
            return 1
        gc.freeze()  # what has been loaded stays: the collector need not walk through it between steps
        gc.enable()
        socket.send(encode(Ready(engine.info, os.getpid())))
        try:
            serve(engine, socket)
        except RuntimeError as error:
            from quire.engine.device import device_fault

            fault = device_fault(error)
            if fault is None:
                raise
            print(f"quire: {fault}", file=sys.stderr)
            return 1
    return 0


def open_kv_events(config: EngineConfig, context: zmq.Context[zmq.Socket[bytes]]) -> KVEventPublisher | None:
    """What publishes KV events, if they are wanted. The front end has filled in where and under which topic."""
    wanted = read_kv_events(config.kv_events_config)
    return (
        KVEventPublisher(wanted.resolved("127.0.0.1", "127.0.0.1", 0, config.model), context)
        if wanted.enabled
        else None
    )


def serve(engine: Engine, socket: zmq.Socket[bytes]) -> None:
    """Step while there is work, sleep while there is none, and never be silent for longer than `STATS_INTERVAL`."""
    next_stats = time.monotonic()
    was_busy = True
    while True:
        now = time.monotonic()
        idles = was_busy and not engine.has_work
        if now >= next_stats or idles:
            socket.send(encode(engine.stats()))
            next_stats = now + STATS_INTERVAL
        if engine.has_work:
            was_busy = True
            wait_ms = NOTHING_TO_RUN_MS if engine.stalled else 0
        else:
            if idles:
                engine.check_integrity()
            was_busy = False
            wait_ms = max(0, int((next_stats - now) * 1000) + 1)
        if not turn(engine, socket, wait_ms):
            return


def turn(engine: Engine, socket: zmq.Socket[bytes], wait_ms: int) -> bool:
    """Take what has come, waiting for it at most `wait_ms`; step, if there is work; tell what that brought. False when
    told to stop."""
    outputs: list[EngineOutput] = []
    if not _take_messages(engine, socket, wait_ms, outputs):
        return False
    if engine.has_work:
        outputs.extend(engine.step())
    send(socket, outputs)
    return True


def send(socket: zmq.Socket[bytes], outputs: list[EngineOutput]) -> None:
    for part in in_messages(outputs):
        socket.send(encode(Outputs(part)))


def in_messages(outputs: list[EngineOutput], max_bytes: int = MAX_MESSAGE_BYTES // 2) -> Iterator[list[EngineOutput]]:
    """In order, cut where what has been pooled comes to more than `max_bytes`: one that is larger alone has a message
    of its own. Tokens are never so many."""
    first = size = 0
    for index, output in enumerate(outputs):
        if output.pooled is not None:
            own = len(output.pooled.data)
            if size and size + own > max_bytes:
                yield outputs[first:index]
                first, size = index, 0
            size += own
    if outputs:
        yield outputs[first:]


def _take_messages(engine: Engine, socket: zmq.Socket[bytes], wait_ms: int, outputs: list[EngineOutput]) -> bool:
    """Handle what has come, waiting for the first message at most `wait_ms`. False when told to stop."""
    while socket.poll(wait_ms):
        wait_ms = 0
        message = decode_to_engine(socket.recv())
        if isinstance(message, Submit):
            answers = [engine.submit(request) for request in message.requests]
        elif isinstance(message, Cancel):
            answers = [engine.cancel(request_id) for request_id in message.request_ids]
        else:
            return False
        outputs.extend(answer for answer in answers if answer is not None)
    return True


def _leave_with_parent() -> None:
    # Not sys.stdin: at exit the interpreter would wait for its lock, which this blocked thread holds.
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
