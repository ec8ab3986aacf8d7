"""The connection to an endpoint against h11, and against anything at all."""

from __future__ import annotations

import asyncio

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.gateway.errors import UpstreamError
from quire.gateway.proxy.upstream import Connection, HeadLimits, Waits

WAITS = Waits(first_byte=5.0, idle=5.0, total=5.0)
LIMITS = HeadLimits(max_bytes=4096, max_headers=32)


class Transport:
    """The network's side: what is written goes nowhere, and closing is told at once."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.closed = False

    def write(self, data: bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)


async def exchange(pieces: list[bytes], *, relay: bool) -> tuple[int, list, bytes] | None:
    """What the answer is, when it comes in these pieces and the connection is closed behind them; None: an error."""
    connection = Connection("e", LIMITS, lambda _: None)
    transport = Transport()
    transport.connection = connection
    connection.connection_made(transport)
    connection.send(b"GET / HTTP/1.1\r\n\r\n", WAITS)

    async def feed() -> None:
        for piece in pieces:
            if transport.closed:
                return
            connection.data_received(piece)
            await asyncio.sleep(0)
        transport.abort()

    feeding = asyncio.create_task(feed())
    body: list[bytes] = []
    try:
        await connection.begin()
        if relay:
            while not await connection.relay(lambda piece: body.append(piece) or len(body) % 3 != 0):
                await asyncio.sleep(0)
        else:
            while piece := await connection.read():
                body.append(piece)
    except UpstreamError:
        return None
    finally:
        await feeding
    return connection.status, connection.headers, b"".join(body)


def by_h11(data: bytes) -> tuple[int, list, bytes] | None:
    theirs = h11.Connection(h11.CLIENT)
    theirs.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    theirs.send(h11.EndOfMessage())
    theirs.receive_data(data)
    theirs.receive_data(b"")
    status, headers, body = 0, [], b""
    try:
        while True:
            event = theirs.next_event()
            if isinstance(event, h11.Response):
                status, headers = event.status_code, [(bytes(name), bytes(value)) for name, value in event.headers]
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, headers, body
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None


names = st.text("abcdefgh-", min_size=1, max_size=8).filter(lambda name: name not in ("te", "age"))
values = st.text("xyz =;,/", max_size=12).map(str.strip)
bodies = st.lists(st.binary(min_size=1, max_size=50), max_size=5)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    status = draw(st.sampled_from([200, 201, 404, 500, 503]))
    lines = [b"HTTP/1.1 %d OK" % status]
    lines += [f"{name}: {value}".encode() for name, value in draw(st.lists(st.tuples(names, values), max_size=4))]
    parts = draw(bodies)
    whole = b"".join(parts)
    match draw(st.sampled_from(["length", "chunked", "close"])):
        case "length":
            lines.append(b"content-length: %d" % len(whole))
        case "chunked":
            lines.append(b"transfer-encoding: chunked")
            whole = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]))
    return interim + b"\r\n".join(lines) + b"\r\n\r\n" + whole


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(at, len(data)) for at in cuts} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]


@given(answers(), st.lists(st.integers(0, 400), max_size=8), st.booleans())
def test_answers_are_what_h11_says_however_they_are_cut(data: bytes, cuts: list[int], relay: bool) -> None:
    expected = by_h11(data)
    assert expected is not None
    assert asyncio.run(exchange(cut(data, cuts), relay=relay)) == expected


@given(answers(), st.integers(0, 400), st.booleans())
def test_answers_that_are_cut_short_are_errors_for_both(data: bytes, length: int, relay: bool) -> None:
    short = data[:length]
    assert (asyncio.run(exchange([short] if short else [], relay=relay)) is None) == (by_h11(short) is None)


@given(answers(), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=5), st.booleans())
def test_whatever_comes_is_an_answer_or_an_error(data: bytes, changes: list[tuple[int, bytes]], relay: bool) -> None:
    mangled = bytearray(data)
    for at, new in changes:
        mangled[at : at + len(new)] = new
    got = asyncio.run(exchange([bytes(mangled)] if mangled else [], relay=relay))
    if got is not None:
        assert 200 <= got[0] <= 599
        assert all(b"\r" not in name + value and b"\n" not in name + value for name, value in got[1])


@pytest.mark.parametrize("what", [b"x: y\r\n" * 33, b"x: " + b"y" * 4200 + b"\r\n"])
def test_heads_are_bounded(what: bytes) -> None:
    data = b"HTTP/1.1 200 OK\r\n" + what + b"content-length: 0\r\n\r\n"
    assert asyncio.run(exchange([data], relay=False)) is None
    assert by_h11(data) is not None
