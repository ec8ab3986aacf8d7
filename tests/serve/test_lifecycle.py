"""Cancelling, draining, stopping; the command as a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import openai
import pytest
import trustme

from quire.core.errors import ConfigError

SCRIPT = Path(__file__).parent / "serve_script.py"


def last_submitted(served) -> str:
    return [event[1] for event in served.events() if event[0] == "submit"][-1]


def wait_for_submit(served, count: int) -> str:
    served.until(lambda: sum(event[0] == "submit" for event in served.events()) > count, "a submit")
    return last_submitted(served)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["!wait", "!slow:20"])
def test_a_client_that_vanishes_cancels(served, stream, prompt):
    before = sum(event[0] == "submit" for event in served.events())
    body = b'{"prompt": "%s", "max_tokens": 4000, "stream": %s}' % (prompt.encode(), str(stream).lower().encode())
    with socket.create_connection(served.address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        request_id = wait_for_submit(served, before)
        if stream and prompt != "!wait":
            assert connection.recv(10)
    served.until(lambda: ["cancel", request_id] in served.events(), "the cancel")


def test_closing_the_stream_cancels(served):
    stream = served.client().completions.create(model="tiny", prompt="!slow:5", max_tokens=4000, stream=True)
    chunk = next(iter(stream))
    stream.close()
    served.until(lambda: ["cancel", f"{chunk.id}-0"] in served.events(), "the cancel")


def test_a_reader_that_does_not_read_is_cut_off(serving):
    with serving() as running:
        # A prompt that is echoed in token ids makes each chunk large, so that the socket's buffers fill up.
        body = b'{"prompt": "!wide", "max_tokens": 3500, "n": 128, "stream": true, "logprobs": 20}'
        with socket.create_connection(running.address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
            running.until(lambda: any(event[0] == "cancel" for event in running.events()), "a cancel", 30)


def test_drain_finishes_what_runs_and_refuses_what_comes(serving, expected):
    with serving() as running:
        text = []
        stream = running.client().completions.create(
            model="tiny", prompt="!slow:10", max_tokens=60, seed=0, stream=True
        )
        for chunk in stream:
            text.append(chunk.choices[0].text)
            if len(text) == 5:
                running.loop.call_soon_threadsafe(running.orders.give)
                running.until(lambda: running.get("/ready")[0] == 503, "draining")
                status, answer = running.post("/v1/completions", {"prompt": "abc"})
                assert (status, answer["error"]["code"]) == (503, "draining")
        assert "".join(text) == expected("!slow:10", 60)
        running.thread.join(20)
        assert running.exit == [0]
        assert running.events()[-1] == ["stop"]


def test_a_second_order_stops_at_once(serving):
    with serving(shutdown_timeout=300.0) as running:
        errors = []

        def ask() -> None:
            try:
                running.client().completions.create(model="tiny", prompt="!wait")
            except openai.APIError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for_submit(running, 0)
        running.loop.call_soon_threadsafe(running.orders.give)
        running.until(lambda: running.get("/ready")[0] == 503, "draining")  # which will not end by itself
        running.stop()
        thread.join(20)
        assert len(errors) == 1
        assert running.exit == [0]


def test_drain_is_bounded(serving):
    with serving(shutdown_timeout=0.2) as running:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(running.post("/v1/completions", {"prompt": "!wait"})))
        thread.start()
        wait_for_submit(running, 0)
        running.stop()
        thread.join(20)
        status, answer = answers[0]
        assert (status, answer["error"]["code"]) == (503, "engine_dead")


def test_a_port_in_use_is_a_config_error(serving, served):
    with pytest.raises(ConfigError, match=str(served.address[1])), serving(port=served.address[1]):
        pass


def test_an_empty_key_is_a_config_error(serving):
    with pytest.raises(ConfigError, match="api_key"), serving(api_key=" "):
        pass


def test_a_bad_certificate_is_a_config_error(serving, tmp_path):
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    with pytest.raises(ConfigError, match="TLS"), serving(ssl_certfile=str(bad), ssl_keyfile=str(bad)):
        pass


def test_tls(serving, tmp_path, expected):
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    certificate, key, trusted = tmp_path / "c.pem", tmp_path / "k.pem", tmp_path / "ca.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    authority.cert_pem.write_to_path(str(trusted))
    with serving(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as running:
        url = f"https://localhost:{running.address[1]}/v1/completions"
        request = urllib.request.Request(url, data=b'{"prompt": "abc", "max_tokens": 4, "seed": 0}')
        context = ssl.create_default_context(cafile=str(trusted))
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            assert expected("abc", 4).encode() in answer.read()


@contextlib.contextmanager
def command(model_dir: Path, tmp_path: Path):
    """The server as a process; yields it and the URL that it announced."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(model_dir), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        line = process.stdout.readline()
        assert "http://" in line, process.stderr.read()
        yield process, line.split()[-1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_drain_and_leave_no_engine_behind(model_dir, tmp_path, number, expected):
    with command(model_dir, tmp_path) as (process, url):
        text = ""
        request = {"model": "tiny", "prompt": "!slow:10", "max_tokens": 40, "seed": 0}
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
            for chunk in client.completions.create(**request, stream=True):
                if not text:
                    os.killpg(process.pid, number)  # as the terminal does: to the whole group
                text += chunk.choices[0].text
        assert text == expected("!slow:10", 40)
        assert process.wait(20) == 0
    pid = int(
        [line.split()[1] for line in (tmp_path / "events").read_text().splitlines() if line.startswith("start")][-1]
    )
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the engine is still there"
        time.sleep(0.01)


def test_an_engine_does_not_outlive_a_killed_server(model_dir, tmp_path):
    with command(model_dir, tmp_path) as (process, _):
        pid = int((tmp_path / "events").read_text().split()[1])
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the engine is still there"
        time.sleep(0.01)


def test_imports_stay_light():
    code = (
        "import sys, quire.serve.engine_process as m; heavy = {'asyncio', 'zmq', 'msgspec', 'starlette', 'uvicorn'};"
        "print(sorted(heavy & sys.modules.keys()));"
        "import quire.serve.run; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n[]\n"
