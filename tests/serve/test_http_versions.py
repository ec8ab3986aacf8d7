"""HTTP/1.0, and the one host that HTTP/1.1 asks for."""

from __future__ import annotations

import json
import socket

import pytest


def exchange(address: tuple[str, int], data: bytes) -> Answer:
    """The answer to these bytes, read until the server closes the connection."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(data)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    return Answer(received)


class Answer:
    def __init__(self, received: bytes) -> None:
        head, _, self.body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def post(version: str, *headers: str, **fields: object) -> bytes:
    body = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": 3, "seed": 0} | fields)
    lines = [f"POST /v1/completions HTTP/{version}", f"content-length: {len(body)}", "connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


@pytest.mark.parametrize("headers", [(), ("host: x",), ("host: x", "expect: 100-continue", "connection: keep-alive")])
def test_a_stream_for_http_1_0_ends_with_the_connection(served, expected, headers):
    answer = exchange(served.address, post("1.0", *headers, stream=True))
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert "content-length" not in answer.headers
    assert answer.headers["connection"] == "close"
    events = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    text = "".join(json.loads(one)["choices"][0]["text"] for one in events[:-2])
    assert text == expected("abc", 3)


def test_a_whole_answer_for_http_1_0_has_its_length(served, expected):
    answer = exchange(served.address, post("1.0"))
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert json.loads(answer.body)["choices"][0]["text"] == expected("abc", 3)


@pytest.mark.parametrize(
    ("version", "headers", "status"),
    [
        ("1.1", ("host: x",), 200),
        ("1.1", ("Host:",), 200),
        ("1.1", (), 400),
        ("1.1", ("host: x", "Host: x"), 400),
        ("1.0", ("host: x", "host: y"), 400),
    ],
)
def test_there_is_one_host(served, version, headers, status):
    answer = exchange(served.address, post(version, *headers))
    assert answer.status == status
    assert (b"Host" in answer.body) == (status == 400)
