"""The small parent of every process that the fleet starts: `python -m quire.fleet.shim`, one line of JSON on stdin.

It outlives the control plane, keeps the child's output in log files that do not grow without end, passes one SIGTERM
on, and writes down how the child ended. If it is killed itself, the kernel kills the child. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

MAX_LOG_BYTES = 8 * 1024 * 1024
"""Of one log file; the one before it is kept, too."""
MAX_LINE_BYTES = 16 * 1024
KEPT_LINES = 60
PR_SET_PDEATHSIG = 1
FRAMES = " \t\r\n│╭╮╰╯─"
"""What is drawn around words for people."""


class RotatingLog:
    """`path` and, once it is full, `path.1`. A disk that is full costs the log's lines, never the process."""

    def __init__(self, path: Path, limit: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._file: BinaryIO | None = None
        self._size = 0

    def write(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            if self._file is None or self._size + len(line) > self._limit:
                self._open()
            assert self._file is not None
            self._file.write(line)
            self._size += len(line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self.close()
        if self._path.exists() and self._path.stat().st_size > self._limit // 2:
            os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - `close`
        self._size = self._file.tell()


def last_error(lines: list[str], returncode: int) -> str | None:
    """Why a process ended, in its own words: its last error, or else the last thing it said.

    One that was ended by a signal could say nothing about it, so that only an error counts.
    """
    said = [line.strip(FRAMES) for line in lines]
    said = [line for line in said if line and line.lower() != "error"]
    errors = [line for line in said if line.startswith("quire: ") or "error" in line.lower()]
    words = errors[-1:] or (said[-1:] if returncode > 0 else [])
    if returncode < 0:
        words = [f"It was ended by {signal_name(-returncode)}.", *words]
    return " ".join(words)[:500] or None


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _begin_child() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _pass_on_stop(child: subprocess.Popen[bytes]) -> None:
    """Once: a second SIGTERM would mean "at once" to the child."""
    child.send_signal(signal.sigwait({signal.SIGTERM}))


def main() -> int:
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        return 1  # the control plane ended before it had written down who we are: nothing may start
    launch: dict[str, Any] = json.loads(line)
    record = Path(launch["record"])
    log = RotatingLog(Path(launch["log"]))
    written = json.loads(record.read_text())

    def note(**more: object) -> None:
        written.update(more)
        part = record.with_suffix(".part")
        with contextlib.suppress(OSError):  # a full disk costs what is told, never the process
            part.write_text(json.dumps(written))
            os.replace(part, record)

    # Waited for by a thread, not handled: Python runs a handler when the call that it came before returns, and reading
    # what the child says may not return for long.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = subprocess.Popen(  # noqa: S603 - the command is the manifest's
            launch["command"],
            env=launch["environment"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_begin_child,  # noqa: PLW1509 - there is one thread
        )
    except (OSError, ValueError) as error:  # ValueError: a command or an environment that no process can have
        why = error.strerror if isinstance(error, OSError) else error
        note(returncode=127, error=f"{launch['command'][0]}: {why}")
        return 127
    threading.Thread(target=_pass_on_stop, args=(child,), daemon=True).start()
    note(child=child.pid)
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    assert child.stdout is not None
    while raw := child.stdout.readline(MAX_LINE_BYTES):
        log.write(raw)
        lines.append(raw.decode("utf-8", "replace"))
    returncode = child.wait()
    note(returncode=returncode, error=last_error(list(lines), returncode) if returncode != 0 else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
