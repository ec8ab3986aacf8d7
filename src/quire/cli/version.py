"""`quire version`."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from quire import __version__

LIBRARIES = ("torch", "tokenizers", "safetensors", "starlette", "uvicorn", "pyzmq", "msgspec")


def version(*, json: bool = False) -> None:
    """Print the versions of quire, Python and the main libraries.

    Parameters
    ----------
    json
        Print JSON.
    """
    found = versions()
    if json:
        from json import dumps

        print(dumps(found, indent=2))
        return
    for name, number in found.items():
        print(f"{name} {number}")


def versions() -> dict[str, str]:
    """Read from the packages' metadata: nothing is imported."""
    found = {"quire": __version__, "python": platform.python_version(), "platform": sys.platform}
    for name in LIBRARIES:
        try:
            found[name] = installed_version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
