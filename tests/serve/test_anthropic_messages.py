"""/v1/messages, asked by Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest

HELLO = [{"role": "user", "content": "hello"}]
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
"""The client's newest release sends these only as they are given here."""
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {}}}


def prompt_of(*turns: tuple[str, str], end: str = "<|im_start|>assistant\n") -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + end


@pytest.fixture
def client(served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="none", base_url=served.url, max_retries=0, timeout=30.0) as made:
        yield made


def create(client: anthropic.Anthropic, **fields):
    return client.messages.create(**{"model": "tiny", "max_tokens": 6, "messages": HELLO} | fields)


def test_a_whole_answer(client):
    prompt = prompt_of(("system", "Be brief."), ("user", "hello"))
    answer = create(client, system="Be brief.", metadata={"user_id": "x"}, extra_body=SAMPLING)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "tiny")
    assert len(answer.content) == 1
    assert len(answer.content[0].text) == 6
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    usage = answer.usage
    ids = client.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.")
    assert usage.input_tokens + usage.cache_read_input_tokens == ids.input_tokens
    assert ids.input_tokens == prompt.count("<|im_") + len(prompt.replace("<|im_start|>", "").replace("<|im_end|>", ""))
    assert usage.output_tokens == 6


def test_a_stream_says_what_the_whole_says(client):
    with client.messages.stream(model="tiny", max_tokens=6, messages=HELLO) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert len(final.content[0].text) == 6
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 6
    assert final.usage.input_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence(client, stream):
    fields = {"model": "tiny", "max_tokens": 500, "messages": HELLO, "stop_sequences": ["a", "b", "c"]}
    if stream:
        with client.messages.stream(**fields) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**fields)
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence in ("a", "b", "c")
    assert not set(answer.content[0].text) & set("abc")


CONVERSATIONS = {
    "blocks": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        prompt_of(("user", "ab")),
    ),
    "a beginning of the answer": (
        [*HELLO, {"role": "assistant", "content": "Well"}],
        prompt_of(("user", "hello"), end="<|im_start|>assistant\nWell"),
    ),
    "a tool": (
        [
            *HELLO,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "3"}]},
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
        prompt_of(("user", "hello"), ("assistant", ""), ("tool", "3"), ("user", "So?")),
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_the_template_gets(client, served, name):
    messages, prompt = CONVERSATIONS[name]
    counted = client.messages.count_tokens(model="tiny", messages=messages)
    status, tokens = served.post("/tokenize", {"prompt": prompt, "add_special_tokens": False})
    assert status == 200
    assert counted.input_tokens == tokens["count"]
    usage = create(client, messages=messages).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == tokens["count"]


def test_tools_are_shown_to_the_template(client):
    plain = client.messages.count_tokens(model="tiny", messages=HELLO).input_tokens
    shown = client.messages.count_tokens(model="tiny", messages=HELLO, tools=[TOOL]).input_tokens
    hidden = client.messages.count_tokens(model="tiny", messages=HELLO, tools=[TOOL], tool_choice={"type": "none"})
    assert shown == plain + len("tools: 1\n")
    assert hidden.input_tokens == plain


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"extra_body": {"surprise": 1}}, "surprise"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": -1.0}}, "temperature"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_served_is_refused_by_name(client, fields, named, stream):
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(client, **fields, stream=stream)
    told = caught.value.body
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert named in told["error"]["message"]


def test_a_model_that_is_not_there(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        create(client, model="none")
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_the_key_may_come_in_either_header(serving):
    with serving(api_key="secret") as served:
        for given in ({"api_key": "secret"}, {"auth_token": "secret"}):
            with anthropic.Anthropic(base_url=served.url, max_retries=0, **given) as client:
                assert create(client).content
        wrong = anthropic.Anthropic(base_url=served.url, max_retries=0, api_key="wrong")
        with wrong as client, pytest.raises(anthropic.AuthenticationError):
            create(client)
