"""The parent's side of `quire.text.sandbox`: starts it, asks it, kills it when its time is over, starts it anew."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from quire.core.errors import Refusal, TemplateError

_LENGTH = struct.Struct(">I")
# What the child gets of our environment: enough to start Python and to know the time zone, no secrets.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ")
# Starting Python takes a tenth of a second, or much more on a machine that is starting everything else as well.
_START_SECONDS = 30.0
_REMEDY = "Check the checkpoint's chat template, or give another one with chat_template."


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one rendering may take: wall-clock seconds, characters written, bytes of address space."""

    max_seconds: float = 5.0
    max_chars: int = 8 << 20
    max_memory_bytes: int = 1 << 30


class RenderProcess:
    """A process that holds compiled templates, and is asked by one thread at a time.

    It starts when it is made, in the background. After it was killed for going over a limit, the next call starts
    another.
    """

    def __init__(self, templates: Mapping[str, str], limits: RenderLimits) -> None:
        self._templates = dict(templates)
        self._limits = limits
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._compiled = False
        self._living()

    def wait_compiled(self) -> None:
        """Returns when the templates are compiled; raises `TemplateError` when one has an error."""
        with self._lock:
            self._compile(self._living())

    def render(self, template: str, variables: Mapping[str, object]) -> str:
        """`variables` are JSON data.

        Raises `TemplateError`, with the template's own words if it refused, and `Refusal` if there can be no process.
        """
        with self._lock:
            child = self._living()
            self._compile(child)
            request = {"template": template, "variables": variables}
            return str(self._ask(child, request, self._limits.max_seconds)["text"])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _living(self) -> _Child:
        if self._child is None or not self._child.alive():
            self._stop()
            try:
                self._child = _Child()
            except OSError as error:  # no memory, or too many processes: no fault of the request
                raise Refusal(
                    f"The process that renders chat templates cannot be started: {error.strerror}.",
                    remedy="Try again later.",
                    retry_after=1.0,
                ) from None
        return self._child

    def _compile(self, child: _Child) -> None:
        if not self._compiled:
            request = {"templates": self._templates, **asdict(self._limits)}
            self._ask(child, request, self._limits.max_seconds + _START_SECONDS)
            self._compiled = True

    def _stop(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child, self._compiled = None, False

    def _ask(self, child: _Child, request: Mapping[str, object], max_seconds: float) -> dict[str, object]:
        # Serialised before the child is touched: what is not JSON is the caller's fault and leaves the child as it is.
        payload = json.dumps(request).encode()
        try:
            answer = child.ask(payload, max_seconds)
        except TimeoutError:
            self._stop()
            raise TemplateError(
                f"The chat template took longer than {self._limits.max_seconds:g} seconds.", remedy=_REMEDY
            ) from None
        except OSError:
            self._stop()
            raise TemplateError(
                "The chat template brought its process down, by memory or processor time.", remedy=_REMEDY
            ) from None
        if "error" in answer:
            if answer.get("limit"):
                self._stop()  # what it holds after that is not worth knowing
            raise TemplateError(f"The chat template failed: {answer['error']}", param="messages")
        return answer


class _Child:
    """One process and the socket to it."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        self._socket, theirs = socket.socketpair()
        with contextlib.ExitStack() as unless_started, theirs:
            unless_started.callback(self._socket.close)
            # -P: the working directory is no place to import from. A session of its own: Ctrl-C is for the parent.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "quire.text.sandbox"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            unless_started.pop_all()
        self.close = weakref.finalize(self, _end, self._process, self._socket)

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, payload: bytes, max_seconds: float) -> dict[str, object]:
        """Raises TimeoutError when the answer does not come in time, another OSError when the process ended."""
        deadline = time.monotonic() + max_seconds
        self._socket.settimeout(max_seconds)
        self._socket.sendall(_LENGTH.pack(len(payload)) + payload)
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        answer: dict[str, object] = json.loads(self._read(size, deadline))
        return answer

    def _read(self, size: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
            chunk = self._socket.recv(min(size - len(received), 1 << 20))
            if not chunk:
                raise ConnectionResetError
            received += chunk
        return bytes(received)


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
