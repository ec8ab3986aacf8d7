"""The gRPC server of the external processing door."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import structlog
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc

from quire.core.errors import ConfigError, QuireError
from quire.gateway.extproc.messages import Message, Response
from quire.gateway.extproc.stream import Door, ExchangeStream


class Processor(ext_proc.ExternalProcessorServicer):  # type: ignore[misc]  # generated without types
    def __init__(self, door: Door) -> None:
        self._door = door

    async def Process(  # noqa: N802 - the service's name
        self, request_iterator: AsyncIterator[Message], context: Any
    ) -> AsyncIterator[Response]:
        exchange = ExchangeStream(self._door)
        try:
            async for message in request_iterator:
                try:
                    async for response in exchange.answer(message):
                        yield response
                except QuireError as error:
                    yield exchange.refuse(error)
                    return
                except Exception:  # one request's trouble; Envoy does with it as its failure mode says
                    structlog.get_logger().exception("ext_proc_failed")
                    await context.abort(grpc.StatusCode.INTERNAL, "the picker failed; see its log")
        finally:
            exchange.close()


class ExtProcServer:
    def __init__(self, door: Door, host: str, port: int) -> None:
        options = [("grpc.max_receive_message_length", door.max_body_bytes + 1024 * 1024)]
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=None)
        ext_proc.add_ExternalProcessorServicer_to_server(Processor(door), self._server)
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
        """Streams get `grace` seconds to end."""
        await self._server.stop(grace)
