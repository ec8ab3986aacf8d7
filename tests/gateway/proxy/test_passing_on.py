"""Requests and answers go through as they are."""

from __future__ import annotations

MESSAGES = [{"role": "user", "content": "hi"}]


async def test_a_chat_streams_through(rig, fake) -> None:
    async with rig([fake.stream(5)]) as gateway, gateway.openai() as client:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content async for chunk in stream if chunk.choices])
    assert text == "w0 w1 w2 w3 w4"
    ((name, outcome),) = gateway.recorder.outcomes
    assert (name, outcome.status, outcome.error) == ("a", 200, "")
    assert (outcome.output_tokens, outcome.cached_tokens) == (5, 8)
    assert gateway.recorder.first_bytes == ["a"]


async def test_a_chat_comes_whole(rig, fake) -> None:
    async with rig([fake.answer]) as gateway, gateway.openai() as client:
        answer = await client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
        assert answer.parse().choices[0].message.content == "hello"
        assert answer.headers["x-gateway-destination-endpoint-served"] == f"127.0.0.1:{gateway.servers[0].port}"
    assert gateway.recorder.outcomes[0][1].cached_tokens == 8
    assert gateway.open_load == 0
