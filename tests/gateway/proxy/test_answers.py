"""What is read from answers on their way, and how they are cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.gateway.proxy.events import MAX_HELD, WholeEvents
from quire.gateway.proxy.usage import Usage


@given(st.lists(st.text(alphabet='ab:{}" ', max_size=30), max_size=8), st.data(), st.sampled_from(["\n\n", "\r\n\r\n"]))
def test_events_are_whole_however_they_are_cut(texts: list[str], data: st.DataObject, end: str) -> None:
    stream = "".join(f"data: {text}{end}" for text in texts).encode() + b"data: ha"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    pieces = [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    events = WholeEvents()
    passed = [events.add(piece) for piece in pieces]
    assert b"".join(passed) + events.rest() == stream
    assert events.rest() == b"data: ha"
    assert all(not one or one.endswith(end.encode()) for one in passed)


def test_an_event_without_end_is_not_held_for_ever() -> None:
    events = WholeEvents()
    passed = sum(len(events.add(b"x" * 1000)) for _ in range(1000))
    assert passed >= 1_000_000 - MAX_HELD - 1000


USAGES = [
    ({"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}, 4, 8),
    ({"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": None}, 4, None),
    ({"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 8}}, 4, 8),
    ({"input_tokens": 9, "output_tokens": 4, "cache_read_input_tokens": 3}, 4, 3),
    ({"prompt_tokens": "9", "completion_tokens": True, "prompt_tokens_details": {"cached_tokens": -1}}, None, None),
]


@pytest.mark.parametrize(("usage", "output", "cached"), USAGES)
@pytest.mark.parametrize("indent", [None, 1])
def test_usage_of_whole_answers(usage: dict, output: int | None, cached: int | None, indent: int | None) -> None:
    seen = Usage()
    answer = {"choices": [{"text": 'it says "usage": {"completion_tokens": 99}'}], "usage": usage, "more": "x" * 5000}
    seen.whole(json.dumps(answer, indent=indent).encode())
    assert (seen.output_tokens, seen.cached_tokens) == (output, cached)


@pytest.mark.parametrize(("usage", "output", "cached"), USAGES[:4])
def test_usage_of_streams(usage: dict, output: int, cached: int | None) -> None:
    seen = Usage()
    for _ in range(100):
        seen.see(b'data: {"choices":[{"delta":{"content":"x"}}],"usage":null}\n\n')
    seen.see(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
    seen.see(b"data: [DONE]\n\n")
    seen.end()
    assert (seen.output_tokens, seen.cached_tokens) == (output, cached)


def test_streams_without_usage_are_counted() -> None:
    seen = Usage()
    for _ in range(10):
        seen.see(b'data: {"choices":[]}\n\n')
    seen.see(b"data: [DONE]\n\n")
    seen.end()
    assert (seen.output_tokens, seen.cached_tokens) == (10, None)


@given(st.lists(st.binary(max_size=3000), max_size=20))
def test_usage_never_fails(pieces: list[bytes]) -> None:
    seen = Usage()
    for piece in pieces:
        seen.see(piece)
    seen.end()
    seen.whole(b"".join(pieces) + b'"usage":' + b"[" * 2000)


@pytest.mark.parametrize(("behind", "read"), [(200, 5), (300, None)])
def test_a_body_of_nothing_but_usage_is_not_searched_for_ever(behind: int, read: int | None) -> None:
    """A file that a client uploaded may be one; each such field costs microseconds of everybody's."""
    usage = Usage()
    usage.whole(b'{"usage":{"completion_tokens":5}' + b',"usage":null' * behind + b"}")
    assert usage.output_tokens == read
