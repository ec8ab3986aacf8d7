"""Reading the small JSON files of a checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path

from quire.core.errors import BadValue, MissingFile


def read_text(path: Path) -> str:
    """The file's text; `MissingFile` when it is not there, `BadValue` when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(
            f"{path} is missing.", remedy="Fetch the checkpoint again, with all its JSON files."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} cannot be read: {error}.", remedy="Fetch the file again.") from None


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in a file. Errors as of `read_text`, and `BadValue` for anything but an object."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadValue(f"{path} is not valid JSON: {error}.", remedy="Fetch the file again.") from None
    if not isinstance(value, dict):
        raise BadValue(f"{path} holds {type(value).__name__}, expected a JSON object.", remedy="Fetch the file again.")
    return value


def read_optional_json_object(path: Path) -> dict[str, object]:
    """As `read_json_object`, but a file that is not there reads as an empty object."""
    return read_json_object(path) if path.is_file() else {}
