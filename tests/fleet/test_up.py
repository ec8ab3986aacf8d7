"""Real services: killed, drained, rolled and stopped while requests flow."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse

import pytest
from openai import OpenAI

from quire.cli.fleet import down
from quire.cli.up import up
from quire.core.errors import QuireError

MANIFEST = """
apiVersion: serving.kserve.io/v1alpha2
kind: LLMInferenceService
metadata: {{name: {name}}}
spec:
  model: {{uri: "{uri}", name: assistant}}
  replicas: {replicas}
  rolloutStrategy: {{maxSurge: 1, maxUnavailable: 0}}
  template:
    containers:
    - name: main
      args: [--max-num-seqs={seqs}]
"""
LONG = 1500


def manifest(name="svc", uri="quire-tiny", replicas=2, seqs=8) -> str:
    return MANIFEST.format(name=name, uri=uri, replicas=replicas, seqs=seqs)


def address(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("quire serves ")]
    return line.split(" at ")[1].split()[0]


def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0)


def complete(client: OpenAI) -> str:
    return client.completions.create(model="assistant", prompt="Hello", max_tokens=4).choices[0].text


def ask(url: str) -> str:
    with client(url) as one:
        return complete(one)


def stream(port: int, tokens: int) -> HTTPResponse:
    body = {"model": "assistant", "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request)


@contextmanager
def load(url: str) -> Iterator[list[str | Exception]]:
    """Requests, one after another from two clients, until the block ends; what each of them got."""
    over, answers = threading.Event(), []

    def work() -> None:
        with client(url) as one:
            while not over.wait(0.05):  # enough load to lose something, little enough for engines to start beside it
                try:
                    answers.append(complete(one))
                except Exception as error:
                    answers.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def url(module_cli) -> str:
    (module_cli.directory / "llm.yaml").write_text(manifest())
    return address(module_cli("up", "llm.yaml", "--detach", "--port", "0", "--host", "127.0.0.2"))


@pytest.fixture
def service(module_cli, url):
    """Two replicas that are ready, whatever the test before has done to them."""
    module_cli.settled()
    return module_cli


def test_what_runs_is_told(service, url):
    assert "//127.0.0.2:" in url
    assert ask(url)
    assert set(service.engines()) == {"svc-0", "svc-1"}
    table = service("ps")
    assert f"svc: assistant at {url}: 2/2 replicas, 1/1 gateway ready" in table
    assert "svc-gateway-0" in table
    assert "svc-0: ready" in service("events")
    assert "quire serves assistant" in service("logs", "svc-0")
    assert "svc-1 " in service("logs", "-n", "5")
    assert "Did you mean svc-1?" in service("logs", "scv-1", code=2)
    assert "already" in service("up", "llm.yaml", code=2)


def test_a_killed_engine_is_started_again_and_the_other_one_goes_on(service, url):
    before = service.engines()
    with load(url) as answers:
        os.kill(before["svc-0"]["pid"], signal.SIGKILL)
        service("events", "-n", "1")  # the control plane may need a moment to see it
        wait_until_replaced(service, before["svc-0"]["pid"])
        service.settled()
    after = service.engines()
    assert after["svc-0"]["restarts"] == before["svc-0"]["restarts"] + 1
    assert after["svc-0"]["last_error"] == "It was ended by SIGKILL."
    assert after["svc-1"]["pid"] == before["svc-1"]["pid"]
    lost = [answer for answer in answers if isinstance(answer, Exception)]
    assert len(lost) <= 2, lost  # what the killed engine had begun to answer cannot be begun again
    assert len(answers) > len(lost)


def wait_until_replaced(service, pid: int) -> None:
    end = time.monotonic() + 60
    while service.engines()["svc-0"]["pid"] in (pid, None):
        assert time.monotonic() < end


def test_a_killed_control_plane_comes_back_to_the_same_processes(service, url):
    assert "1/1 replicas" in service("scale", "svc", "1")
    before = service.service()
    os.kill(before["control_plane_pid"], signal.SIGKILL)
    assert ask(url)
    assert "NO CONTROL PLANE RUNS, `quire up --resume svc`" in service("ps")
    assert "no control plane runs, and it is done once `quire up --resume svc`" in service("scale", "svc", "1")
    assert f"at {url} (1/1 replicas" in service("up", "--resume", "svc", "--detach")
    after = service.settled()
    assert after["control_plane_pid"] != before["control_plane_pid"]
    assert after["replicas"] == before["replicas"]
    assert ask(url)
    assert "2/2 replicas" in service("scale", "svc", "2")


@pytest.mark.parametrize(
    ("more", "flags", "words"),
    [
        ({"manifest": "llm.yaml"}, {}, "neither a manifest"),
        ({"gateway": False}, {}, "neither a manifest"),
        ({}, {"host": "::1"}, "neither a manifest nor an address"),
        ({}, {"port": "1"}, "neither a manifest nor an address"),
        ({}, {}, "There is no service 'svc'"),
    ],
)
def test_what_cannot_be_resumed(tmp_path, more, flags, words):
    with pytest.raises(QuireError, match=words):
        up(resume="svc", fleet={"state_dir": str(tmp_path)} | flags, **more)
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_cannot_be_read_hides_no_other(service, url):
    broken = service.directory / "state" / "broken"
    broken.mkdir()
    (broken / "fleet.db").write_bytes(b"not a database, but long enough to be looked at" * 50)
    told = service("ps")
    assert "warning: broken: The fleet's state" in told
    assert f"svc: assistant at {url}" in told
    assert "svc-gateway-0 | quire gateway" in service("logs", "svc")
    assert "cannot be used" in service("events", "broken", code=2)
    shutil.rmtree(broken)


def test_a_replica_that_goes_finishes_its_streams(service, url):
    port = service.engines()["svc-1"]["port"]
    pid = service.engines()["svc-1"]["pid"]
    with stream(port, LONG) as response:
        assert response.readline()
        service("scale", "svc", "1", "--no-wait")
        answer = response.read().decode()
    assert answer.rstrip().endswith("data: [DONE]")
    assert answer.count('"text"') == LONG - 1 or '"finish_reason":"length"' in answer
    service.settled()
    assert set(service.engines()) == {"svc-0"}
    events = service("events")
    assert "svc-1: draining (scaled down)" in events
    assert "svc-1: ended (0)" in events
    assert not os.path.exists(f"/proc/{pid}")
    assert "2/2 replicas" in service("scale", "svc", "2")
    assert set(service.engines()) == {"svc-0", "svc-1"}


def test_a_drained_replica_is_replaced_before_it_goes(service, url):
    drained = sorted(service.engines())[0]
    with load(url) as answers:
        service("drain", drained)
    assert drained not in service.engines()
    assert len(service.engines()) == 2
    assert [answer for answer in answers if isinstance(answer, Exception)] == []
    assert answers


def test_a_changed_flag_is_rolled_out_without_losing_a_request(service, url):
    before = service.engines()
    changed = service.directory / "changed.yaml"
    changed.write_text(manifest(seqs=16))
    dry = service("apply", "changed.yaml", "--dry-run")
    assert "--max-num-seqs=16; replaces the replicas" in dry
    assert service.engines() == before
    with load(url) as answers:
        service("apply", "changed.yaml")
    after = service.engines()
    assert len(after) == 2
    assert not {engine["pid"] for engine in after.values()} & {engine["pid"] for engine in before.values()}
    assert [answer for answer in answers if isinstance(answer, Exception)] == []
    assert answers
    assert "nothing changes" in service("apply", "changed.yaml")
    assert never_fewer_ready_than(2, service("events").rpartition("asked for assistant")[2], set(before))


def never_fewer_ready_than(least: int, events: str, ready: set[str]) -> bool:
    ready = set(ready)
    for line in events.splitlines():
        replica, _, what = line.partition(" ")[2].partition(": ")
        if what == "ready":
            ready.add(replica)
        elif what.startswith(("draining", "ended", "unready")):
            ready.discard(replica)
        if len(ready) < least:
            return False
    return True


def test_down_leaves_nothing_running(service, url):
    service.settled()
    control = service.service()["control_plane_pid"]
    assert "svc: down" in service("down")
    assert "svc: down" in service("ps")
    assert service.service()["replicas"] == []
    assert not any(os.path.exists(f"/proc/{pid}") for pid in service.pids)
    assert "svc is down" in service("up", "--resume", "svc", code=2)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)
    end = time.monotonic() + 10
    while service.service()["control_plane_pid"] == control:
        assert time.monotonic() < end


def test_in_the_foreground_ctrl_c_stops_it_and_a_second_one_at_once(cli):
    (cli.directory / "llm.yaml").write_text(manifest(replicas=1))
    process = cli.popen("up", "llm.yaml", "--no-gateway")
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith("quire serves "):
            break
    (engine,) = cli.engines().values()
    os.kill(engine["pid"], signal.SIGSTOP)  # it cannot finish anything, nor hear a SIGTERM
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        output.append(line)
        if "svc-0: stopping (down)" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "svc-0: killing: Told to stop at once." in rest
    assert cli.service()["replicas"] == []


def test_a_crash_loop_is_told_with_the_childs_own_words(cli):
    (cli.directory / "llm.yaml").write_text(manifest(uri="/no/such/model", replicas=1))
    output = cli("up", "llm.yaml", "--no-gateway", "--detach", code=1)
    assert "svc-0 does not come up: quire: The model '/no/such/model' is not there" in output
    assert "`quire logs svc-0`" in output
    assert "crash loop" in cli("ps")
    assert "/no/such/model" in cli("logs", "svc-0")
    (cli.directory / "llm.yaml").write_text(manifest(replicas=1))
    assert "svc: 1/1 replicas ready" in cli("apply", "llm.yaml")


def test_a_terminal_that_is_closed_stops_the_service_and_leaves_nothing(cli, wait_for, is_alive):
    (cli.directory / "llm.yaml").write_text(manifest(replicas=1))
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "quire", "up", "llm.yaml", "--no-gateway"],
        env=cli.environment | {"TERM": "xterm"},
        cwd=cli.directory,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - there is one thread
    )
    os.close(terminal)
    told = b""
    while b"quire serves" not in told:
        told += os.read(ours, 1000)
    assert cli.service()["replicas"]
    os.close(ours)  # a SIGHUP for it, and no output from now on
    process.wait(timeout=60)
    assert cli.service()["replicas"] == []
    wait_for(lambda: not any(map(is_alive, cli.pids)), "the engine to be gone")


def test_what_runs_is_stopped_on_a_full_disk(cli, disk, is_alive, capsys):
    (cli.directory / "llm.yaml").write_text(manifest(replicas=1))
    cli("up", "llm.yaml", "--no-gateway", "--detach")
    control = cli.service()["control_plane_pid"]
    state = cli.directory / "state"
    disk.fill(state / "svc" / "fleet.db")
    down("svc", state_dir={"state_dir": str(state)})
    told = capsys.readouterr()
    assert "Free space on" in told.err
    assert told.out.endswith("svc: down\n")
    assert not [pid for pid in (control, *cli.pids) if is_alive(pid)]
