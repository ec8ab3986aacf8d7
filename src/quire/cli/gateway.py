"""`quire gateway`: one address before many model servers."""

from __future__ import annotations

from dataclasses import asdict

from quire.cli.flags import ConfigFile, GatewayFlags, settings
from quire.config.gateway import GatewayConfig


def gateway(*, config: ConfigFile = None, gateway: GatewayFlags = None) -> int:
    """Route requests to quire, vLLM, SGLang and TGI servers: by prefix, by load, by policy."""
    wanted = settings(GatewayConfig, gateway, config=config)

    import asyncio

    import structlog
    import uvloop

    from quire.config.logs import configure_logs
    from quire.gateway.run import run

    configure_logs(wanted.value.log_level, as_json=wanted.value.log_json)
    told = {name: value for name, value in asdict(wanted.value).items() if wanted.sources[name] != "default"}
    structlog.get_logger().info("settings", **(told | ({"api_key": "***"} if "api_key" in told else {})))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(wanted.value))
