"""`quire chat` and `quire complete` against a server: what they send, and what they do with the answer."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.cli.chat import visible
from quire.cli.main import main


@pytest.fixture
def say(monkeypatch):
    def put(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))

    return put


def test_a_conversation_remembers_what_was_said(fake_server, capsys, say):
    say("hello", "", "again")
    assert main(["chat", "--url", fake_server.url, "--max-tokens", "2", "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert out == "tok0 tok1 \ntok0 tok1 \n"
    first, second = fake_server.requests
    assert first["messages"] == [{"role": "user", "content": "hello"}]
    assert second["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "tok0 tok1 "},
        {"role": "user", "content": "again"},
    ]
    assert (first["model"], first["temperature"], first["max_tokens"], first["stream"]) == ("fake-model", 0.0, 2, True)
    assert "top_p" not in first


def test_commands_change_the_conversation(fake_server, capsys, say):
    say("one", "/system Be brief.", "two", "/reset", "three", "/nonsense", "/exit", "four")
    assert main(["chat", "other", "--url", fake_server.url + "/v1/", "--system", "Be long."]) == 0
    heads = [[message["content"] for message in body["messages"]] for body in fake_server.requests]
    assert heads == [["Be long.", "one"], ["Be brief.", "two"], ["Be brief.", "three"]]
    assert {body["model"] for body in fake_server.requests} == {"other"}
    assert "/nonsense is not a command" in capsys.readouterr().out


def test_a_refused_question_leaves_the_conversation_as_it_was(fake_server, capsys, say):
    say("hello", "refuse this", "fail midway", "again")
    assert main(["chat", "--url", fake_server.url]) == 0
    assert [message["content"] for message in fake_server.requests[-1]["messages"]] == [
        "hello",
        "tok0 tok1 tok2 ",
        "again",
    ]
    err = capsys.readouterr().err
    assert "I refuse this prompt." in err
    assert "The engine died." in err


def test_complete_streams_one_answer(fake_server, capsys):
    assert main(["complete", "Once upon", "--url", fake_server.url, "--stop", "a", "--stop", "b", "--seed", "3"]) == 0
    (body,) = fake_server.requests
    assert (body["prompt"], body["stop"], body["seed"], body["max_tokens"]) == ("Once upon", ["a", "b"], 3, 128)
    assert capsys.readouterr().out == "".join(f"tok{index} " for index in range(128)) + "\n"


def test_complete_reads_a_pipe_and_sends_the_key(fake_server, say, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    say("from a pipe")
    assert main(["complete", "-", "--url", fake_server.url, "--max-tokens", "1"]) == 0
    assert fake_server.requests[0]["prompt"] == "from a pipe\n"
    assert fake_server.headers[0]["authorization"] == "Bearer secret"


def test_a_refusal_is_told_with_its_reason(fake_server, capsys):
    assert main(["complete", "refuse", "--url", fake_server.url]) == 1
    assert capsys.readouterr().err.endswith("quire: The server answered 400: I refuse this prompt.\n")


def test_a_server_that_is_not_there_is_named(closed_url, capsys):
    assert main(["complete", "hello", "--url", closed_url]) == 1
    assert closed_url in capsys.readouterr().err


@given(st.text())
def test_what_is_shown_cannot_drive_the_terminal(text):
    shown = visible(text)
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text
