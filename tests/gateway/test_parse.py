"""Reading requests: what is found, what the prompt's layout promises, and what anything else leads to."""

from __future__ import annotations

import contextlib
import json
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import InvalidParameter, RequestError
from quire.gateway.parse import api_of, parse, with_model
from quire.gateway.request import Api, InferenceRequest

CHAT = "/v1/chat/completions"


def read(path: str, body: object, **headers: str) -> InferenceRequest:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return parse("id", path, raw, data, 1.0)


def chat(*messages: object, **more: object) -> InferenceRequest:
    return read(CHAT, {"model": "m", "messages": messages, **more})


def user(content: object, **more: object) -> dict:
    return {"role": "user", "content": content, **more}


# --- fields and headers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "api"),
    [
        (CHAT, Api.CHAT),
        ("/v1/completions", Api.COMPLETIONS),
        ("/v1/responses", Api.RESPONSES),
        ("/v1/messages", Api.MESSAGES),
        ("/v1/embeddings", Api.EMBEDDINGS),
        ("/pooling", Api.EMBEDDINGS),
        ("/v1/rerank", Api.EMBEDDINGS),
        ("/tokenize", Api.OTHER),
        ("/v1/files", Api.OTHER),
    ],
)
def test_paths(path: str, api: Api) -> None:
    assert api_of(path) is api


def test_fields() -> None:
    request = chat(user("hi"), stream=True, max_completion_tokens=7, max_tokens=9, cache_salt="s")
    assert (request.model, request.target_model, request.stream) == ("m", "m", True)
    assert (request.max_tokens, request.cache_salt) == (7, "s")


def test_fields_of_another_type_are_the_endpoints_business() -> None:
    request = chat(user("hi"), stream="yes", max_tokens="many", cache_salt=[1], tools=3, chat_template_kwargs="x")
    assert (request.stream, request.max_tokens, request.cache_salt) == (False, None, "")


@pytest.mark.parametrize("prefix", ["x-llm-d-", "x-gateway-"])
def test_headers_and_their_aliases(prefix: str) -> None:
    names = {"inference-objective": "fast", "inference-fairness-id": "t1", "model-name-rewrite": "n"}
    headers = {prefix + name: value for name, value in names.items()}
    headers |= {"x-slo-ttft-ms": "250", "x-llm-d-slo-tpot-ms": "12.5", "x-session-id": "s"}
    request = read(CHAT, {"model": "m", "messages": []}, **headers)
    assert (request.objective, request.fairness_id, request.session_id) == ("fast", "t1", "s")
    assert (request.model, request.target_model) == ("m", "n")
    assert (request.slo_ttft, request.slo_tpot) == (0.25, 0.0125)


def test_only_a_trusted_header_says_which_endpoints_may_be_chosen() -> None:
    headers = [(b"x-gateway-destination-endpoint-subset", b"10.0.0.1:80, 10.0.0.2:80,")]
    assert parse("id", CHAT, headers, b'{"model": "m"}', 1.0).subset is None
    trusted = parse("id", CHAT, headers, b'{"model": "m"}', 1.0, trust_subset=True)
    assert trusted.subset == {"10.0.0.1:80", "10.0.0.2:80"}


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
def test_a_wrong_goal_names_its_header(value: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read(CHAT, {"model": "m"}, **{"x-slo-ttft-ms": value})
    assert "slo-ttft-ms" in str(caught.value.param)


def test_names_are_bounded() -> None:
    with pytest.raises(InvalidParameter):
        read(CHAT, {"model": "m" * 1000})
    with pytest.raises(InvalidParameter):
        read(CHAT, {"model": "m"}, x_llm_d_inference_fairness_id="t" * 1000)


def test_other_calls_may_name_a_model() -> None:
    assert read("/tokenize", {"model": "m", "prompt": "x"}).model == "m"
    assert read("/v1/audio/transcriptions", b"--form\r\n").model == ""
    assert read("/v1/files", b"\xff\xfe").model == ""
    assert read("/v1/files", b"{no JSON", x_llm_d_model_name_rewrite="n").target_model == ""


# --- the prompt's layout ------------------------------------------------------------------------------------


def test_conversations_that_go_on_share_their_beginning() -> None:
    first = [{"role": "system", "content": "be good"}, user("hi")]
    longer = [*first, {"role": "assistant", "content": "hello"}, user("more")]
    assert chat(*longer).prompt.startswith(chat(*first).prompt)
    assert not chat(*longer).prompt.startswith(chat(*first, tools=[{"type": "function"}]).prompt)


def test_text_is_the_same_however_it_is_written() -> None:
    plain = b'{"model":"m","messages":[{"role":"user","content":"caf\xc3\xa9 / x"}]}'
    escaped = b'{ "messages" : [{"content":"caf\\u00e9 \\/ x", "role":"user"}], "model":"m", "seed": 3}'
    assert read(CHAT, plain).prompt == read(CHAT, escaped).prompt


def test_roles_texts_and_boundaries_tell_prompts_apart() -> None:
    prompts = [
        chat(user("ab")),
        chat(user("a"), user("b")),
        chat({"role": "system", "content": "ab"}),
        chat(user([{"type": "text", "text": "ab"}])),
        chat(user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
        chat(user("ab", name="x")),
        chat(user("ab"), chat_template_kwargs={"thinking": True}),
    ]
    assert len({request.prompt for request in prompts}) == len(prompts)


def test_pictures_stand_by_their_digest() -> None:
    def picture(data: str) -> InferenceRequest:
        url = "data:image/png;base64," + data
        return chat(user([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]))

    one, same, other = picture("A" * 100_000), picture("A" * 100_000), picture("A" * 99_999 + "B")
    assert one.prompt == same.prompt != other.prompt
    assert len(one.prompt) < 200


def test_how_long_to_cache_is_not_part_of_the_prompt() -> None:
    plain = {"type": "text", "text": "x"}
    body = {"model": "m", "system": [plain], "messages": [user([plain])]}
    marked = plain | {"cache_control": {"type": "ephemeral"}}
    other = {"model": "m", "system": [marked], "messages": [user([marked])]}
    assert read("/v1/messages", body).prompt == read("/v1/messages", other).prompt


def test_system_and_instructions_come_first() -> None:
    messages = read("/v1/messages", {"model": "m", "messages": [user("hi")], "system": "be good"}).prompt
    assert messages.index(b"be good") < messages.index(b"hi")
    responses = read("/v1/responses", {"model": "m", "input": "hi", "instructions": "be good"}).prompt
    assert responses.index(b"be good") < responses.index(b"hi")
    items = read("/v1/responses", {"model": "m", "input": [user([{"type": "input_text", "text": "hi"}])]}).prompt
    assert b"hi" in items


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_token_ids(prompt: list) -> None:
    request = read("/v1/completions", {"model": "m", "prompt": prompt})
    assert request.prompt_token_ids == [1, 2, 3]
    assert request.prompt == struct.pack("=3I", 1, 2, 3)


def test_several_prompts_and_inputs() -> None:
    assert read("/v1/completions", {"prompt": ["a", "b"]}).prompt == b"a\xfdb"
    assert read("/v1/completions", {"prompt": [[1], [2]]}).prompt_token_ids is None
    assert read("/v1/embeddings", {"input": "text"}).prompt == b"text"
    assert b"why" in read("/rerank", {"query": "why", "documents": ["a"]}).prompt
    assert read("/score", {"text_1": "a", "text_2": ["b"]}).prompt == b'"a"["b"]'
    assert b"hi" in read("/pooling", {"messages": [user("hi")]}).prompt


# --- anything at all ----------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
KNOWN = ["messages", "prompt", "input", "tools", "system", "stream", "max_tokens", "cache_salt", "content", "role"]
bodies = st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=4), json_values, max_size=6)
PATHS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/score", "/tokenize", "/x"]


@given(bodies, st.sampled_from(PATHS), st.text(max_size=20))
def test_any_object_is_read(body: dict, path: str, model: str) -> None:
    request = read(path, body | {"model": model})
    assert json.loads(request.body) == json.loads(json.dumps(body | {"model": model}))
    assert path == "/x" or request.model == model


@given(st.binary(max_size=200), st.sampled_from(PATHS))
def test_any_bytes_are_read_or_refused(body: bytes, path: str) -> None:
    with contextlib.suppress(RequestError):
        assert read(path, body).body == body


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=20)}),
    max_size=6,
)


@given(messages, messages)
@settings(max_examples=300)
def test_layouts_are_equal_just_when_the_messages_are(one: list, other: list) -> None:
    assert (chat(*one).prompt == chat(*other).prompt) == (one == other)
    assert chat(*one, *other).prompt.startswith(chat(*one).prompt)


@given(bodies, st.text(max_size=20))
def test_only_the_model_is_rewritten(body: dict, name: str) -> None:
    data = json.dumps(body | {"model": "m"}, indent=1).encode()
    rewritten = with_model(data, name)
    before = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    after = msgspec.json.decode(rewritten, type=dict[str, msgspec.Raw])
    assert json.loads(bytes(after.pop("model"))) == name
    before.pop("model")
    assert {key: bytes(raw) for key, raw in after.items()} == {key: bytes(raw) for key, raw in before.items()}
