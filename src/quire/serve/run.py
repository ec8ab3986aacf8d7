"""One API server from start to end: wire the parts, serve, drain, stop."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import zmq.asyncio

from quire.config.server import ServerConfig
from quire.serve.app import build_app
from quire.serve.engine_client import EngineClient
from quire.serve.engine_process import EngineCommand, EngineProcess
from quire.serve.metrics import Metrics
from quire.serve.service import Service
from quire.serve.supervision import Supervision
from quire.text.defaults import generation_defaults
from quire.text.pooling_prompt import named_prompts
from quire.text.template import ChatTemplate
from quire.text.tokenizer import Tokenizer
from quire.web.server import Server, StopOrders, allow_open_files, bind, url, uvicorn_config


def to_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is served. `process` is the first engine, started by the caller before it imported this module."""

    command: EngineCommand
    process: EngineProcess
    model_dir: Path
    model_names: Sequence[str]
    tokenizer_dir: Path | None = None
    chat_template: Path | None = None
    max_logprobs: int = 20
    announce: Callable[[str], None] = to_stdout
    """Gets the line that says where the server is, once it is ready, and then one for the KV events, if there are."""
    listener: socket.socket | None = None
    """The socket to listen on, if the caller has opened it already; closed at the end."""
    on_listening: Callable[[str], None] | None = None
    """Gets the URL as soon as the server listens, which is before the engine is ready."""


async def run(
    config: ServerConfig, launch: Launch, *, orders: StopOrders | None = None, supervision: Supervision | None = None
) -> int:
    """Serve until told to stop; the exit code. Raises `QuireError` for what the operator has to mend.

    The caller has configured the logs. Without `orders` the process's SIGTERM and SIGINT are the orders.
    """
    if orders is None:
        orders = StopOrders()
        orders.listen(asyncio.get_running_loop())
    allow_open_files(config.max_connections + 256)
    context = zmq.asyncio.Context()
    metrics = Metrics(launch.model_names[0])
    supervision = supervision or Supervision(
        heartbeat_timeout=config.heartbeat_timeout, max_restarts=config.max_engine_restarts
    )
    engine = EngineClient(
        launch.command,
        launch.process,
        context=context,
        listener=metrics,
        supervision=supervision,
    )
    supervising = asyncio.create_task(engine.supervise())
    template: ChatTemplate | None = None
    try:
        template = ChatTemplate.load(launch.model_dir, launch.chat_template)
        service = Service(
            config=config,
            engine=engine,
            tokenizer=Tokenizer.load(launch.tokenizer_dir or launch.model_dir),
            template=template,
            model_names=launch.model_names,
            sampling_defaults=generation_defaults(launch.model_dir) if config.generation_config else {},
            metrics=metrics,
            max_logprobs=launch.max_logprobs,
            pairs_by_template=launch.chat_template is not None,
            named_prompts=named_prompts(launch.model_dir),
            ready_wait=supervision.start_wait,
        )
        metrics.watch(engine.heartbeat_age, lambda: engine.num_in_flight)
        with launch.listener or bind(config) as listener:
            return await _serve(service, listener, launch, orders)
    finally:
        await engine.stop()
        await supervising
        if template is not None:
            template.close()
        context.destroy(linger=0)


async def _serve(
    service: Service,
    listener: socket.socket,
    launch: Launch,
    orders: StopOrders,
) -> int:
    config = service.config
    server = Server(uvicorn_config(build_app(service), config))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    draining = asyncio.create_task(orders.drain.wait())
    hurrying = asyncio.create_task(orders.now.wait())
    readying = asyncio.create_task(service.engine.wait_ready())
    try:
        await server.listening.wait()
        if launch.on_listening is not None:
            launch.on_listening(url(config, listener))
        await asyncio.wait({readying, draining, serving}, return_when=asyncio.FIRST_COMPLETED)
        if readying.done():
            readying.result()  # raises what kept the first engine from starting
            launch.announce(f"quire serves {service.model_names[0]} at {url(config, listener)}")
            if (events := readying.result().kv_events) is not None:
                replay = f", replayed at {events.replay_endpoint}" if events.replay_endpoint else ""
                launch.announce(f"quire tells its KV events at {events.endpoint}{replay}, topic {events.topic}")
            await asyncio.wait({draining, serving}, return_when=asyncio.FIRST_COMPLETED)
        structlog.get_logger().info("stopping", running_calls=service.num_running)
        drained = asyncio.create_task(service.drain(config.shutdown_timeout))
        await asyncio.wait({drained, hurrying, serving}, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        return 0
    finally:
        # The engine first: calls that are still running get a typed error, and end.
        await service.engine.stop()
        server.should_exit = True
        server.force_exit = orders.now.is_set()
        await serving
        for task in (draining, hurrying, readying):
            task.cancel()
        await asyncio.gather(draining, hurrying, readying, return_exceptions=True)
