"""The gRPC server of the external processing door."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import structlog
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc

from quire.core.errors import ConfigError, QuireError
from quire.gateway.errors import ShuttingDown
from quire.gateway.extproc.messages import Message, Response
from quire.gateway.extproc.stream import Door, ExchangeStream

LAST_WORDS = 1.0
"""Seconds to tell Envoy that the gateway stops."""


class Processor(ext_proc.ExternalProcessorServicer):  # type: ignore[misc]  # generated without types
    def __init__(self, door: Door) -> None:
        self._door = door
        self._open: set[ExchangeStream] = set()

    def end(self) -> None:
        """Tell every stream that is open that the gateway stops."""
        for exchange in self._open:
            exchange.break_off(ShuttingDown("The gateway is stopping.", remedy="Try again.", retry_after=1.0))

    async def Process(  # noqa: N802 - the service's name
        self, request_iterator: AsyncIterator[Message], context: Any
    ) -> AsyncIterator[Response]:
        exchange = ExchangeStream(self._door)
        self._open.add(exchange)
        messages = aiter(request_iterator)
        try:
            while (message := await exchange.next_of(messages)) is not None:
                async for response in exchange.answer(message):
                    yield response
        except QuireError as error:
            if not exchange.ended:
                yield exchange.refuse(error)
        except Exception:  # one request's trouble; Envoy does with it as its failure mode says
            structlog.get_logger().exception("ext_proc_failed")
            await context.abort(grpc.StatusCode.INTERNAL, "the picker failed; see its log")
        finally:
            self._open.discard(exchange)
            exchange.close()


class ExtProcServer:
    def __init__(self, door: Door, host: str, port: int, *, max_streams: int) -> None:
        """A stream that comes when `max_streams` are open is refused with RESOURCE_EXHAUSTED."""
        self._processor = Processor(door)
        options = [("grpc.max_receive_message_length", door.max_body_bytes + 1024 * 1024)]
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=max_streams)
        ext_proc.add_ExternalProcessorServicer_to_server(self._processor, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"The external processing door cannot listen on {address}.",
                param="extproc_port",
                remedy="Choose another --extproc-port; 0 takes a free one.",
            ) from error

    async def start(self) -> None:
        started = time.monotonic()
        await self._server.start()
        structlog.get_logger().info("ext_proc_listens", port=self.port, seconds=round(time.monotonic() - started, 3))

    async def stop(self, grace: float) -> None:
        """Streams get `grace` seconds to end. Those that are left are then told so, as their requests are."""
        ending = asyncio.get_running_loop().call_later(grace, self._processor.end)
        try:
            await self._server.stop(grace + LAST_WORDS)
        finally:
            ending.cancel()
