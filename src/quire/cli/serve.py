"""`quire serve`: start the engine's process first, and the API server while it comes up."""

from __future__ import annotations

from quire.cli.flags import ConfigFile, EngineFlags, ServerFlags, settings
from quire.config.engine import EngineConfig
from quire.config.server import ServerConfig


def serve(
    model: str | None = None,
    *,
    config: ConfigFile = None,
    engine: EngineFlags = None,
    server: ServerFlags = None,
) -> None:
    """Serve a model behind an OpenAI-compatible API.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    """
    print(settings(EngineConfig, engine, config=config, model=model))
    print(settings(ServerConfig, server, config=config))
