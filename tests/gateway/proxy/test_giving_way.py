"""A request that is broken off from within, at any moment: its client is told so, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from quire.gateway.errors import Evicted
from quire.gateway.request import InferenceRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
EVENT = b'data: {"choices": []}\n\n'
DONE = b"data: [DONE]"
PIECES = [
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
    b"%x\r\n%b\r\n" % (len(EVENT), EVENT),
    b"5\r\ndata:\r\n",  # within an event
    b"%x\r\n%b\r\n" % (len(EVENT) - 5, EVENT[5:]),
    b"e\r\ndata: [DONE]\n\n\r\n",
    b"0\r\n\r\n",
]


class Breaking:
    """Breaks the first request off, twice, when the endpoint has sent so many pieces of its answer: at once, or after
    some turns of the loop, in which most of it has been passed on."""

    def __init__(self, after: int, *, passed_on: bool) -> None:
        self.after, self.passed_on = after, passed_on
        self.request: InferenceRequest | None = None

    def see(self, request: InferenceRequest) -> None:
        if self.request is None:
            self.request = request

    async def behave(self, _: object, wire) -> None:
        for number, piece in enumerate(PIECES):
            if number == self.after:
                self.break_off()
            await wire.write(piece)
            for _ in range(20 if self.passed_on else 0):
                await asyncio.sleep(0)
        if self.after == len(PIECES):
            self.break_off()

    def break_off(self) -> None:
        assert self.request is not None
        for _ in range(2):
            if self.request.break_off is not None:
                self.request.break_off(Evicted("It gives way.", retry_after=3.0))


@pytest.mark.parametrize("passed_on", [False, True])
@pytest.mark.parametrize("after", range(len(PIECES) + 1))
async def test_a_stream_that_is_broken_off_ends_in_one_of_two_ways(rig, fake, after: int, passed_on: bool) -> None:
    breaking = Breaking(after, passed_on=passed_on)
    async with (
        rig([breaking.behave, fake.answer], hooks=[breaking.see]) as gateway,
        aiohttp.ClientSession() as client,
    ):
        async with client.post(gateway.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            body, headers = await answer.read(), answer.headers
        if answer.status == 429:
            assert json.loads(body)["error"]["code"] == "evicted"
            assert (headers["x-llm-d-request-dropped-reason"], headers["retry-after"]) == ("evicted-priority", "3")
        else:
            assert answer.status == 200
            *events, last, rest = body.split(b"\n\n")
            assert rest == b""
            assert all(event + b"\n\n" == EVENT for event in events if event != DONE)
            assert DONE not in events[:-1]  # clients read no further than to it
            if last != DONE:
                assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "evicted"
        await gateway.settled()
        assert breaking.request is not None
        assert breaking.request.break_off is None
        assert gateway.open_load == 0
        async with client.post(gateway.url + "/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 200


async def test_before_it_is_sent_nothing_is(rig, fake) -> None:
    def at_once(request: InferenceRequest) -> None:
        assert request.break_off is not None
        request.break_off(Evicted("It gives way.", retry_after=3.0))

    async with rig([fake.answer], hooks=[at_once]) as gateway, aiohttp.ClientSession() as client:
        async with client.post(gateway.url + "/v1/messages", json=CHAT) as answer:
            assert (answer.status, (await answer.json())["error"]["type"]) == (429, "rate_limit_error")
        await gateway.settled()
        assert gateway.recorder.outcomes == [] or gateway.recorder.outcomes[0][1].error == "cancelled"
        assert gateway.open_load == 0


async def test_an_answer_that_is_no_stream_is_cut_off_so_that_its_client_sees_it(rig, fake) -> None:
    breaking = Breaking(1, passed_on=True)

    async def begin(_: object, wire) -> None:
        await wire.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ntransfer-encoding: chunked\r\n\r\n4\r\nRIFF\r\n"
        )
        await begun.wait()
        breaking.break_off()
        await fake.never(_, wire)

    begun = asyncio.Event()
    async with rig([begin], hooks=[breaking.see]) as gateway, aiohttp.ClientSession() as client:
        async with client.post(gateway.url + "/v1/audio/speech", json={"model": "m", "input": "hi"}) as answer:
            assert await answer.content.readexactly(4) == b"RIFF"
            begun.set()
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()
        await gateway.settled()
        assert gateway.open_load == 0
