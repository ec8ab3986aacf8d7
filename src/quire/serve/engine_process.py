"""An engine as a child process: start it, hear its log, notice its end, kill it.

Standard library only: a command starts the child with this before it imports anything that takes time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quire.core.errors import ConfigError

KEPT_LINES = 40
MAX_LINE_BYTES = 4096
MAX_SOCKET_PATH = 107  # sun_path of a Unix socket, without its terminating zero


def to_stderr(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCommand:
    """How to start an engine: `argv`, and the fields of an `EngineConfig` that it is told on its stdin."""

    argv: tuple[str, ...]
    config: Mapping[str, object]
    log: Callable[[str], None] = to_stderr
    """Gets each line of the engine's log, newline included, on a thread of its own."""

    def start(self) -> EngineProcess:
        """A new engine, with a socket path of its own. Raises `OSError` if the command cannot be run."""
        return EngineProcess(self)


class EngineProcess:
    """One running engine. What it writes to stdout or stderr is its log, passed on and the last lines kept."""

    def __init__(self, command: EngineCommand) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="quire-"))  # mode 0700: only this user reaches the socket
        self.socket_path = str(self._directory / "engine.sock")
        if len(os.fsencode(self.socket_path)) > MAX_SOCKET_PATH:
            shutil.rmtree(self._directory)
            raise ConfigError(
                f"The path of the engine's socket, {self.socket_path}, is longer than {MAX_SOCKET_PATH} bytes.",
                remedy="Set TMPDIR to a shorter directory.",
            )
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._log = command.log
        self._ended = threading.Event()
        self._on_exit: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        # A session of its own: Ctrl-C in the terminal must not end the engine before its requests are drained.
        self._popen = subprocess.Popen(  # noqa: S603 - the command is the operator's
            command.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self._pump = threading.Thread(target=self._pump_log, name=f"engine-log-{self.pid}", daemon=True)
        self._pump.start()
        threading.Thread(target=self._await_exit, name=f"engine-exit-{self.pid}", daemon=True).start()
        self._tell({"socket": self.socket_path, "config": dict(command.config)})

    def _tell(self, payload: dict[str, object]) -> None:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps(payload).encode() + b"\n")
            self._popen.stdin.flush()  # left open: its end tells the engine that its parent is gone
        except (BrokenPipeError, ValueError):
            return  # the child is dead already (the exit thread has closed the pipe), which that thread reports

    def _pump_log(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as stream:
            while raw := stream.readline(MAX_LINE_BYTES):
                line = raw.decode("utf-8", "replace")
                self._lines.append(line.rstrip("\n"))
                # Where our own log goes may be closed; the engine's pipe has to be emptied all the same.
                with contextlib.suppress(OSError, ValueError):
                    self._log(line)

    def _await_exit(self) -> None:
        self._popen.wait()
        self._pump.join(0.5)  # bounded: a grandchild may hold the pipe open
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        with self._lock:
            self._ended.set()
            callbacks = list(self._on_exit)
        for callback in callbacks:
            callback()

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Call `callback` on another thread once the process has ended; at once if it has."""
        with self._lock:
            if not self._ended.is_set():
                self._on_exit.append(callback)
                return
        callback()

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative is the number of the signal that ended it."""
        return self._popen.returncode if self._ended.is_set() else None

    @property
    def last_lines(self) -> list[str]:
        return list(self._lines)

    def kill(self) -> None:
        """End it and its children at once. Does nothing if it has ended."""
        if not self._ended.is_set():
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it has ended; False if it has not within `timeout` seconds."""
        return self._ended.wait(timeout)
