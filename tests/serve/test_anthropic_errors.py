"""Errors below the routes have the shape of Anthropic's API on its paths."""

from __future__ import annotations

import json
import socket

import pytest

HOST = "host: x\r\n"


def exchange(served, data: str) -> tuple[int, dict]:
    with socket.create_connection(served.address, timeout=20) as connection:
        connection.sendall(data.encode())
        received = b""
        while not (part := connection.recv(65536)).endswith(b"}") and part:
            received += part
    head, _, body = (received + part).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("head", "status", "kind"),
    [
        ("GET /v1/messages/none HTTP/1.1\r\n" + HOST, 404, "not_found_error"),
        ("PUT /v1/messages/batches?x=1 HTTP/1.1\r\n" + HOST, 404, "not_found_error"),
        ("POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n", 413, "request_too_large"),
        ("POST /v1/messages?beta=true HTTP/1.1\r\n", 400, "invalid_request_error"),
        ("POST /v1/messages HTTP/1.1\r\n" + HOST + "x: y\r\n" * 200, 431, "invalid_request_error"),
        ("POST /v1/messages HTTP/1.1\r\nhost: x", 408, "invalid_request_error"),
    ],
)
def test_the_shape_is_the_path_s(served, head, status, kind):
    found, answer = exchange(served, head + "\r\n")
    assert found == status
    assert set(answer) == {"type", "error"}
    assert answer["type"] == "error"
    assert answer["error"]["type"] == kind
    assert set(answer["error"]) == {"type", "message"}


def test_without_a_key(serving):
    with serving(api_key="secret", wait=False) as served:
        for path, is_anthropic in (("/v1/messages", True), ("/v1/messagesx", False)):
            status, answer = served.post(path, {})
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
            assert (answer.get("type") == "error") == is_anthropic
