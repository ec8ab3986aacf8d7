from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from quire.core.errors import CheckpointError, InvalidParameter, MissingFile, Refusal, TemplateError
from quire.text.render_process import RenderLimits
from quire.text.template import ChatTemplate

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {% generation %}
        {{- message.content | trim }}
        {% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' + (tool_call.arguments | tojson) + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content if message.content is string else message.content | tojson }}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{%- set ns = namespace(index=0) -%}
{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- '[INST] ' ~ message['content'] ~ ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{- message['content'] ~ eos_token }}
    {% else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
    {% set ns.index = ns.index + 1 %}
{% endfor %}
{% macro count(n) %}{{ n }} messages{% endmacro %}
{#- a comment #}
{{ count(ns.index) }}
"""
SOURCES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "wetter_für", "parameters": {"type": "object", "x": '<"&>'}}}]

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [" padded ", "{{ 1 }}", "世界"]
)
CALL = st.dictionaries(
    st.sampled_from(["city", "größe"]), st.integers() | WORDS | st.none() | st.booleans(), max_size=2
).map(lambda arguments: {"type": "function", "id": "c1", "function": {"name": "f", "arguments": arguments}})
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": WORDS}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": WORDS, "tool_calls": st.lists(CALL, min_size=1, max_size=2)}
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": WORDS, "tool_call_id": st.just("c1")}),
)
ALTERNATING = st.lists(WORDS, min_size=1, max_size=5).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
CONVERSATION = st.lists(MESSAGE, min_size=1, max_size=5) | ALTERNATING


@pytest.fixture(scope="session")
def templates() -> Iterator[dict[str, ChatTemplate]]:
    made = {name: ChatTemplate({"default": source}, NAMED) for name, source in SOURCES.items()}
    yield made
    for template in made.values():
        template.close()


@pytest.fixture(scope="session")
def oracle() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), **NAMED)


@pytest.mark.parametrize("name", sorted(SOURCES))
@given(
    messages=CONVERSATION,
    tools=st.sampled_from([None, TOOLS]),
    ending=st.sampled_from(["prompt", "closed", "continue"]),
    extra=st.sampled_from([{}, {"enable_thinking": False}, {"date_string": "1 Jan 2026"}]),
)
@PROPERTY
def test_renders_what_transformers_renders(templates, oracle, name, messages, tools, ending, extra):
    options = {
        "tools": tools,
        "add_generation_prompt": ending == "prompt",
        "continue_final_message": ending == "continue",
        **extra,
    }
    expected, words = None, ""
    try:
        expected = oracle.apply_chat_template(messages, chat_template=SOURCES[name], tokenize=False, **options)
    except Exception as error:  # transformers has no type of its own for a template that refuses
        words = str(error)
    if expected is not None:
        assert templates[name].render(messages, **options) == expected
        return
    with pytest.raises((TemplateError, InvalidParameter)) as refusal:
        templates[name].render(messages, **options)
    if "roles" in words or "single" in words:
        assert words in str(refusal.value)  # what the template itself says


def one(source: str, *, limits: RenderLimits | None = None) -> ChatTemplate:
    return ChatTemplate({"default": source}, {}, limits)


USER = [{"role": "user", "content": "hi"}]
HOSTILE = {
    "product of loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long string": "{{ 'a' * 10**10 }}",
    "big integer": "{{ 10**(10**8) }}",
    "wide filter": "{{ 'a' | center(10**10) }}",
    "constant folded": "{{ 'a' | center(10000000000) }}",
    "wide format": "{{ '%10000000000d' % 1 }}",
    "endless output": "{% for a in range(99999) %}{% for b in range(99999) %}abc{% endfor %}{% endfor %}",
    "doubled list": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x=[n.x]*2 %}{% endfor %}{{ n.x }}",
    "doubled string": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_stopped(source):
    template = one(source, limits=RenderLimits(max_seconds=0.5, max_chars=100_000, max_memory_bytes=256 << 20))
    with pytest.raises(TemplateError, match="chat template"):
        template.render(USER)
    template.close()


def test_a_template_is_usable_after_it_was_stopped():
    source = "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    template = one(source + "{% endfor %}{% endif %}done", limits=RenderLimits(max_seconds=0.5))
    assert template.render(USER) == "done"
    with pytest.raises(TemplateError, match="longer than"):
        template.render([{"role": "user", "content": "loop"}])
    assert template.render(USER) == "done"
    template.close()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ undefined_function() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_may_not_or_cannot_do_is_a_template_error(source):
    template = one(source)
    with pytest.raises(TemplateError):
        template.render(USER)
    template.close()


@pytest.mark.parametrize(
    "source", ["{{ '{0.__class__.__init__}'.format(messages) }}", "{{ raise_exception.__globals__ }}"]
)
def test_what_is_behind_an_object_is_undefined(source):
    template = one(source)
    assert template.render(USER) == ""
    template.close()


def test_a_syntax_error_is_told_with_its_line():
    template = one("one\n{% if %}")
    with pytest.raises(TemplateError, match="Line 2"):
        template.wait_compiled()
    with pytest.raises(TemplateError, match="Line 2"):
        template.render(USER)
    template.close()


def test_what_is_not_json_is_the_callers_fault(templates):
    with pytest.raises(InvalidParameter, match="JSON"):
        templates["chatml"].render([{"role": "user", "content": object()}])
    with pytest.raises(InvalidParameter, match="empty"):
        templates["chatml"].render([])


def test_continuing_needs_a_message_and_no_generation_prompt(templates):
    with pytest.raises(InvalidParameter, match="both"):
        templates["chatml"].render(USER, continue_final_message=True)
    with pytest.raises(InvalidParameter, match="no text"):
        templates["chatml"].render([{"role": "user"}], add_generation_prompt=False, continue_final_message=True)
    template = one("nothing of it")
    with pytest.raises(TemplateError, match="leaves out"):
        template.render(USER, add_generation_prompt=False, continue_final_message=True)
    template.close()


def test_the_three_places(tmp_path: Path):
    assert ChatTemplate.load(tmp_path) is None
    config = {"bos_token": {"content": "<s>"}, "chat_template": "config {{ bos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert loaded(tmp_path) == "config <s>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert loaded(tmp_path) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert loaded(tmp_path) == "jinja"
    override = tmp_path / "mine.jinja"
    override.write_text("override {{ bos_token }}")
    assert loaded(tmp_path, override) == "override <s>"
    with pytest.raises(MissingFile, match=r"not-there\.jinja"):
        ChatTemplate.load(tmp_path, tmp_path / "not-there.jinja")


def loaded(directory: Path, override: Path | None = None) -> str:
    template = ChatTemplate.load(directory, override)
    assert template is not None
    text = template.render(USER)
    template.close()
    return text


def test_named_templates(tmp_path: Path):
    named = [{"name": name, "template": name} for name in ("default", "tool_use", "rag")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(USER) == "default"
    assert template.render(USER, tools=TOOLS) == "tool_use"
    assert template.render(USER, documents=[{"title": "a", "text": "b"}]) == "rag"
    template.close()


@pytest.mark.parametrize("value", [3, [], ["x"], [{"name": "a"}], {"a": 1}])
def test_a_template_of_a_wrong_kind_is_named(tmp_path: Path, value: object):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)


def test_a_process_that_cannot_start_is_no_fault_of_the_request(monkeypatch):
    template = ChatTemplate({"default": "x"}, {})
    try:
        assert template.render([{"role": "user", "content": ""}]) == "x"
        template.close()
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(Refusal, match="cannot be started"):
            template.render([{"role": "user", "content": ""}])
        monkeypatch.undo()
        assert template.render([{"role": "user", "content": ""}]) == "x"
    finally:
        template.close()
