from __future__ import annotations

import pytest

from quire.core.errors import InvalidParameter
from quire.text.messages import template_messages


def test_text_parts_become_one_string():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, {"type": "refusal", "refusal": "no"}]
    assert template_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "one\ntwo\nno"}]


def test_arguments_of_tool_calls_become_objects():
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "ü"]}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"id": "3", "type": "function", "function": {"name": "h", "arguments": {"kept": True}}},
    ]
    (message,) = template_messages([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert "content" not in message
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == [{"a": [1, "ü"]}, {}, {"kept": True}]
    assert calls[0]["function"]["arguments"] == '{"a": [1, "ü"]}'  # the caller's own data are left as they were


def test_tool_messages_and_unknown_fields_pass():
    message = {"role": "tool", "tool_call_id": "1", "content": "{}", "name": "f"}
    assert template_messages([message]) == [message]


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_known_by_each_of_its_names(field):
    (message,) = template_messages([{"role": "assistant", "content": "4", field: "2 + 2"}])
    assert message["reasoning_content"] == message["thinking"] == "2 + 2"


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ("hello", r"messages\[1\] is not an object"),
        ({"content": "x"}, r"messages\[1\] has no role"),
        ({"role": "user", "content": 3}, r"messages\[1\]\.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, r"content\[0\].*image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\]"),
        ({"role": "user", "content": [{"type": ["text"], "text": "a"}]}, r"content\[0\]"),
        ({"role": "assistant", "tool_calls": "x"}, r"tool_calls is not a list"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\] has no function"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}, r"arguments is not JSON"),
    ],
)
def test_bad_messages_are_named(message, where):
    with pytest.raises(InvalidParameter, match=where) as refusal:
        template_messages([{"role": "user", "content": "fine"}, message])
    assert refusal.value.param == "messages"
