"""/v1/chat/completions, as the official client sees it."""

from __future__ import annotations

import msgspec
import openai
import pytest

from quire.serve.chat_messages import plain_messages
from quire.text.messages import template_messages
from quire.wire.openai_chat import Message

HELLO = [{"role": "user", "content": "hello"}]


def prompt_of(text: str, role: str = "user") -> bytes:
    """The bytes of the rendered template; special tokens have ids above the bytes."""
    return f"{role}\n{text}\nassistant\n".encode()


def test_answer(served, expected):
    answer = served.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, seed=3)
    assert answer.choices[0].message.content == expected(prompt_of("hello"), 8, seed=3)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens // 16 * 16


def test_stream_is_the_chunk_sequence_of_openai(served, expected):
    stream = served.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, seed=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    texts = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert "".join(texts) == expected(prompt_of("hello"), 5, seed=3)
    assert len(texts) == 5
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_async_client_streams(served, expected):
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, max_completion_tokens=4, seed=1, stream=True
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == expected(prompt_of("hello"), 4, seed=1)


def test_n_gives_each_choice_its_own_seed(served, expected):
    answer = served.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, seed=10, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [expected(prompt_of("hello"), 6, seed=10 + i) for i in range(3)]
    assert answer.usage.completion_tokens == 18


def test_n_streams_all_choices(served, expected):
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in served.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, seed=10, n=2, stream=True
    ):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == {i: expected(prompt_of("hello"), 6, seed=10 + i) for i in range(2)}
    assert reasons == {0: "length", 1: "length"}


def test_logprobs(served):
    answer = served.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert [entry.bytes for entry in entries] == [list(entry.token.encode()) for entry in entries]
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]
    assert entries[0].top_logprobs[1].token == "A"
    assert entries[0].logprob == -0.5


def test_streamed_logprobs_are_the_same(served):
    request = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 1, "seed": 4}
    whole = served.client().chat.completions.create(**request).choices[0].logprobs.content
    streamed = []
    for chunk in served.client().chat.completions.create(**request, stream=True):
        if chunk.choices[0].logprobs:
            streamed.extend(chunk.choices[0].logprobs.content)
    assert streamed == whole


def test_stop_string_ends_and_cancels(served):
    # The spell makes the engine say "the end is nigh the end is nigh ...".
    answer = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "!word"}], stop=["d is", "zz"], max_tokens=1000
    )
    assert answer.choices[0].message.content == "the en"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["stop_reason"] == "d is"
    request_id = answer.id
    served.until(lambda: ["cancel", request_id] in served.events(), "the cancel of the stopped request")


def test_stop_string_is_not_leaked_in_a_stream(served):
    stream = served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "!word"}], stop="is nigh", max_tokens=1000, stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the end "
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_eos_ends_with_stop_and_is_not_shown(served, expected):
    messages = [{"role": "user", "content": "!eos:3"}]
    answer = served.client().chat.completions.create(model="tiny", messages=messages, seed=0)
    assert answer.choices[0].message.content == expected(prompt_of("!eos:3"), 3)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["stop_reason"] is None


def test_text_parts_roles_tools_and_template_variables(served, expected):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    request = {"model": "tiny", "messages": messages, "max_tokens": 4, "seed": 0}
    extra = {"chat_template_kwargs": {"mood": "fine"}}
    answer = served.client().chat.completions.create(**request, tools=tools, extra_body=extra)
    text = b"system\nbe brief\nuser\none\ntwo\ntools: 1\nmood: fine\nassistant\n"
    assert answer.choices[0].message.content == expected(text, 4)
    without = served.client().chat.completions.create(**request, tools=tools, tool_choice="none")
    assert without.choices[0].message.content == expected(b"system\nbe brief\nuser\none\ntwo\nassistant\n", 4)


def test_continue_final_message(served, expected):
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    answer = served.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, seed=0, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content == expected(b"user\nhello\nassistant\nI am", 4)


def test_return_token_ids_and_prompt_logprobs(served):
    extra = {"return_token_ids": True, "prompt_logprobs": 1}
    answer = served.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=3, extra_body=extra)
    assert bytes(answer.choices[0].model_extra["token_ids"]).decode() == answer.choices[0].message.content
    prompt_ids = answer.model_extra["prompt_token_ids"]
    assert bytes(i for i in prompt_ids if i < 256) == prompt_of("hello")
    prompt_logprobs = answer.model_extra["prompt_logprobs"]
    assert len(prompt_logprobs) == len(prompt_ids)
    assert prompt_logprobs[0] is None
    own = prompt_logprobs[1][str(prompt_ids[1])]
    assert own == {"logprob": -1.0, "rank": 2, "decoded_token": chr(prompt_ids[1])}
    assert prompt_logprobs[1][str(ord("x"))]["rank"] == 1


REFUSED = {
    "response_format": {"type": "json_object"},
    "tool_choice": "required",
    "audio": {"voice": "alloy"},
    "functions": [{"name": "f"}],
    "top_logprobs": 3,
    "chat_template": "x",
    "guided_json": {},
    "stream_options": {"include_usage": True},
    "n": 100000,
    "temperature": -1,
    "messages": [],
    "max_tokens": 0,
    "tools": {"a": 1},
    "chat_template_kwargs": {"messages": []},
    "deadline_ms": -5,
    "logit_bias": {"999999": 1},
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(served, param):
    status, answer = served.post(
        "/v1/chat/completions", {"model": "tiny", "messages": HELLO, "max_tokens": 2} | {param: REFUSED[param]}
    )
    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("top_logprobs", [-1, 21, 100])
def test_top_logprobs_out_of_range_is_refused_by_its_own_name(served, top_logprobs):
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": top_logprobs}
    status, answer = served.post("/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, "top_logprobs")


def test_reasoning_and_refusals_reach_the_template():
    body = {
        "role": "assistant",
        "reasoning": "hm",
        "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}],
    }
    (plain,) = template_messages(plain_messages([msgspec.convert(body, Message)]))
    assert plain["content"] == "a\nno"
    assert plain["reasoning_content"] == "hm"


def test_content_that_is_no_text_is_refused(served):
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        served.client().chat.completions.create(model="tiny", messages=messages)


def test_unknown_model(served):
    with pytest.raises(openai.NotFoundError) as caught:
        served.client().chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.body["code"] == "model_not_found"


def test_ignored_fields_are_reported(served):
    client = served.client()
    raw = client.chat.completions.with_raw_response.create(
        model="tiny-alias", messages=HELLO, max_tokens=1, reasoning_effort="low", store=True
    )
    assert raw.headers["x-quire-ignored-fields"] == "reasoning_effort, store"
    assert raw.parse().model == "tiny-alias"


def test_tenant_and_priority_reach_the_engine(served):
    answer = served.client().chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=1,
        extra_headers={"x-quire-tenant": "acme", "x-request-id": "mine-1"},
        extra_body={"priority": 7},
    )
    assert ["submit", answer.id, "acme", "7"] in served.events()


def test_request_id_comes_back(served):
    raw = served.client().chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"


def test_full_queue_is_429_also_for_a_stream(served):
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "!full"}], stream=stream
            )
        assert caught.value.response.headers["retry-after"] == "4"
        assert caught.value.body["code"] == "queue_full"


def test_prompt_too_long(served):
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
    assert caught.value.body["code"] == "context_length_exceeded"
