"""A text file that a command is given to read."""

from __future__ import annotations

from pathlib import Path

from quire.core.errors import ConfigError

MAX_TEXT_BYTES = 64 << 20


def read_text(path: Path, *, param: str) -> str:
    """The file's first `MAX_TEXT_BYTES`, as UTF-8. Raises ConfigError that names `param`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.", param=param, remedy="Name a readable text file."
        ) from error
    return data.decode("utf-8", errors="replace")
