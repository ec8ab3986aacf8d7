"""Children behind their shims: found again, never mistaken, their logs bounded, their last words kept."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.fleet.identity import identify, is_running, send_signal
from quire.fleet.processes import Processes
from quire.fleet.provider import Found, Launch
from quire.fleet.shim import RotatingLog, last_error

SLEEP = "import time; time.sleep(300)"
OBEY = """
import signal, sys, time
def stop(*_):
    print("told", flush=True)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
while True:
    signal.pause()
    if len(sys.argv) > 1:
        sys.exit(0)
"""


@dataclass
class Children:
    """Processes of a provider, which is another one after `as_seen_by_another`."""

    directory: Path
    wait_for: Callable[..., Any]
    provider: Processes

    def start(self, code: str, *arguments: str, number: int = 1) -> None:
        command = (sys.executable, "-c", code, *arguments)
        self.provider.start(Launch(replica="r-0", start=number, command=command, environment=dict(os.environ)))

    def pid(self) -> int:
        return self.wait_for(lambda: self.provider.processes()["r-0"].pid, "the child's number")

    def ended(self) -> Found:
        self.wait_for(lambda: not self.provider.processes()["r-0"].running, "the child's end")
        return self.provider.processes()["r-0"]

    def log(self) -> str:
        return "".join(path.read_text() for path in self.provider.logs("r-0"))

    def said(self, text: str) -> None:
        self.wait_for(lambda: text in self.log(), f"the child to say {text}")


@pytest.fixture
def children(tmp_path, wait_for):
    children = Children(tmp_path, wait_for, Processes(tmp_path))
    yield children
    provider = children.provider
    for replica in provider.processes():
        provider.kill(replica)
    wait_for(lambda: not any(found.running for found in provider.processes().values()), "the children to be gone")


def test_another_control_plane_finds_what_runs(children, tmp_path, is_alive):
    children.start(SLEEP, number=3)
    pid = children.pid()
    children.provider = Processes(tmp_path)
    found = children.provider.processes()["r-0"]
    assert (found.start, found.running, found.pid) == (3, True, pid)
    children.provider.kill("r-0")
    assert not children.ended().running
    children.wait_for(lambda: not is_alive(pid), "the child to go with its shim")


def test_a_number_that_was_given_again_is_nobody_we_know(children, tmp_path):
    """The record of a dead process whose number another process has by now."""
    children.start(SLEEP)
    children.pid()
    record = tmp_path / "run" / "r-0.json"
    written = json.loads(record.read_text())
    written["shim"] = msgspec.to_builtins(identify(os.getpid())) | {"start_ticks": 1}
    record.with_name("r-1.json").write_text(json.dumps(written | {"replica": "r-1"}))
    assert not children.provider.processes()["r-1"].running
    children.provider.kill("r-1")  # which would be us
    children.provider.stop("r-1")
    assert children.provider.processes()["r-0"].running


def test_a_half_written_record_is_no_process(children, tmp_path):
    (tmp_path / "run" / "r-7.json").write_text('{"replica": "r-7"')
    assert children.provider.processes() == {}


def test_a_stop_is_passed_on_once(children):
    children.start(OBEY)
    children.said("up")
    for _ in range(3):
        children.provider.stop("r-0")
    children.said("told")
    children.provider.stop("r-0")
    assert children.provider.processes()["r-0"].running
    assert children.log().count("told") == 1


def test_a_child_that_obeys_ends_well(children):
    children.start(OBEY, "exit")
    children.said("up")
    children.provider.stop("r-0")
    found = children.ended()
    assert (found.returncode, found.error) == (0, None)


def test_the_last_words_of_a_child_are_kept(children):
    children.start("import sys; print('starting'); sys.exit('quire: The model is not there.')")
    found = children.ended()
    assert (found.returncode, found.error) == (1, "quire: The model is not there.")
    children.start("import os; print('fine so far', flush=True); os.kill(os.getpid(), 9)", number=2)
    children.wait_for(lambda: children.provider.processes()["r-0"].start == 2, "the second start")
    found = children.ended()
    assert (found.returncode, found.error) == (-9, "It was ended by SIGKILL.")
    children.provider.forget("r-0")
    assert children.provider.processes() == {}


def test_a_command_that_is_not_there_is_told(children):
    children.provider.start(Launch(replica="r-0", start=1, command=("/no/such/command",), environment={}))
    found = children.ended()
    assert (found.returncode, found.error) == (127, "/no/such/command: No such file or directory")


def test_an_environment_that_no_process_can_have_is_told(children):
    command = (sys.executable, "-c", "pass")
    children.provider.start(Launch(replica="r-0", start=1, command=command, environment={"A=B": "c"}))
    found = children.ended()
    assert found.returncode == 127
    assert "illegal environment variable name" in found.error


def test_memory_is_that_of_the_child_and_its_children(children):
    children.start(
        "import subprocess, sys; block = bytearray(30_000_000); subprocess.run([sys.executable, '-c', "
        "'import time; block = bytearray(40_000_000); time.sleep(300)'])",
    )
    children.pid()
    children.wait_for(lambda: children.provider.memory("r-0") > 70_000_000, "both blocks of memory")
    assert children.provider.memory("r-1") == 0


def test_ports_are_free_and_not_given_twice(children):
    given: set[int] = set()
    for _ in range(20):
        port = children.provider.free_port(frozenset(given))
        assert port not in given
        given.add(port)


def test_a_log_does_not_grow_without_end(tmp_path):
    log = RotatingLog(tmp_path / "a.log", limit=1000)
    for number in range(1000):
        log.write(b"line %d\n" % number)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"a.log", "a.log.1"}
    assert (tmp_path / "a.log").read_bytes().endswith(b"line 999\n")
    older = (tmp_path / "a.log.1").read_bytes() + (tmp_path / "a.log").read_bytes()
    numbers = [int(line.split()[1]) for line in older.splitlines()]
    assert numbers == list(range(numbers[0], 1000))
    again = RotatingLog(tmp_path / "a.log", limit=1000)
    again.write(b"after a restart\n")
    again.close()
    assert b"line 999" in (tmp_path / "a.log").read_bytes() + (tmp_path / "a.log.1").read_bytes()


@pytest.mark.parametrize(
    ("lines", "returncode", "expected"),
    [
        (["a", "ValueError: b", "c"], 1, "ValueError: b"),
        (["quire: no memory", "bye"], 1, "quire: no memory"),
        (["a", "  ", "b"], 2, "b"),
        (["a"], -11, "It was ended by SIGSEGV."),
        (["Fatal Python error: x"], -6, "It was ended by SIGABRT. Fatal Python error: x"),
        (["╭─ Error ──╮", "│ Unknown option: --x. │", "╰──────────╯"], 1, "Unknown option: --x."),
        ([], 3, None),
    ],
)
def test_the_last_error_is_the_one_that_tells_most(lines, returncode, expected):
    assert last_error(lines, returncode) == expected


def test_identities_of_processes(wait_for):
    me = identify(os.getpid())
    assert me is not None
    assert is_running(me)
    other = msgspec.structs.replace(me, start_ticks=me.start_ticks + 1)
    assert not is_running(other)
    send_signal(other, signal.SIGKILL)
    send_signal(me, 0)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    wait_for(lambda: identify(pid) is None, "a child that has ended and was not waited for")
    os.waitpid(pid, 0)
    assert Path(f"/proc/{pid}").exists() is False
