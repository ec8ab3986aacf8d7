"""`quire serve`: start the engine's process first, and the API server while the engine comes up.

The engine needs most of the time until the first answer (it imports torch and reads weights), so nothing is imported
here before it runs but what it takes to find out what to run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from quire.cli.flags import ConfigFile, EngineFlags, ServerFlags, settings
from quire.cli.kv_events import place_kv_events
from quire.config.engine import EngineConfig
from quire.config.resolve import Resolved
from quire.config.server import ServerConfig

ENGINE_COMMAND = (sys.executable, "-m", "quire.engine.process")
SECRETS = frozenset({"api_key", "hf_token"})


def serve(
    model: str | None = None,
    *,
    config: ConfigFile = None,
    engine: EngineFlags = None,
    server: ServerFlags = None,
) -> int:
    """Serve a model behind an OpenAI-compatible API.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    """
    engine_settings = settings(EngineConfig, engine, config=config, model=model)
    server_settings = settings(ServerConfig, server, config=config)

    from quire.models.source import resolve_model, resolve_tokenizer
    from quire.serve.engine_process import EngineCommand

    wanted = engine_settings.value
    directory = resolve_model(wanted)
    tokenizer = resolve_tokenizer(wanted, directory)
    placed, listener = place_kv_events(wanted, server_settings.value)
    # What has been fetched: the engine needs no network for it.
    local = replace(placed, model=str(directory), tokenizer=None if wanted.tokenizer is None else str(tokenizer))
    command = EngineCommand(argv=ENGINE_COMMAND, config=asdict(local))
    process = command.start()
    try:
        import asyncio

        import structlog
        import uvloop

        from quire.config.logs import configure_logs
        from quire.serve.run import Launch, run

        configure_logs(server_settings.value.log_level, as_json=server_settings.value.log_json)
        structlog.get_logger().info("settings", **chosen(engine_settings), **chosen(server_settings))
        launch = Launch(
            command=command,
            process=process,
            model_dir=directory,
            model_names=(server_settings.value.served_model_name or wanted.model,),
            tokenizer_dir=tokenizer,
            chat_template=Path(wanted.chat_template) if wanted.chat_template is not None else None,
            max_logprobs=wanted.max_logprobs,
            listener=listener,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(server_settings.value, launch))
    finally:
        process.kill()
        process.wait(5)  # its socket's directory goes with it


def chosen(resolved: Resolved[EngineConfig] | Resolved[ServerConfig]) -> Mapping[str, str]:
    """The settings that somebody made, each with its source, for the log; no secret is told."""
    values = asdict(resolved.value)
    return {
        name: f"{'***' if name in SECRETS else values[name]} ({source})"
        for name, source in resolved.sources.items()
        if source != "default"
    }
