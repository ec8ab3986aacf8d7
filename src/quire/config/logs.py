"""How the server's log looks: lines for people, or JSON."""

from __future__ import annotations

import logging
import sys

import structlog

from quire.core.errors import ConfigError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logs(level: str, *, as_json: bool) -> None:
    """To stderr. Raises `ConfigError` for a level that there is not."""
    if level not in LEVELS:
        raise ConfigError(f"log_level is {level!r}.", param="log_level", remedy=f"Use one of {', '.join(LEVELS)}.")
    renderer = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # uvicorn's own words are about what strangers send; they matter when one looks for something.
    logging.getLogger("uvicorn.error").setLevel(logging.DEBUG if level == "debug" else logging.CRITICAL)
