import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

QUESTIONS = ["What is 17 + 25?", "Hello!", "Count from 1 to 20.", "Reverse: stone", "Who made you?", "What is 80 - 31?"]


def ask(client: OpenAI, question: str, **parameters):
    parameters = {"temperature": 0.8, "seed": 7, "max_tokens": 48} | parameters
    return client.chat.completions.create(
        model="quire-tiny", messages=[{"role": "user", "content": question}], **parameters
    )


def read(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def metric(server, name: str) -> float:
    text = server.client.with_options(base_url=server.root).get("/metrics", cast_to=str)
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]
    assert found, name
    return sum(found)


def test_a_stream_a_whole_answer_and_a_second_time_are_the_same(server):
    whole = ask(server.client, QUESTIONS[2])
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens > 3
    assert read(ask(server.client, QUESTIONS[2], stream=True)) == whole.choices[0].message.content
    again = ask(server.client, QUESTIONS[2])
    assert again.choices[0].message.content == whole.choices[0].message.content


def test_many_at_once_get_what_each_gets_alone(server):
    alone = [ask(server.client, question).choices[0].message.content for question in QUESTIONS]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda i: ask(server.client, QUESTIONS[i % 6]).choices[0].message.content, range(24)))
    assert together == alone * 4


def test_an_engine_that_is_killed_loses_no_request(server):
    """kill -9 under load: every stream goes on, to the text it would have had."""
    long = {"max_tokens": 300, "extra_body": {"ignore_eos": True}}
    expected = [read(ask(server.client, question, stream=True, **long)) for question in QUESTIONS]
    engine, kill = server.engine, threading.Event()

    def stream(question: str) -> str:
        text = ""
        for chunk in ask(server.client, question, stream=True, **long):
            text += chunk.choices[0].delta.content or ""
            if len(text) > 20:
                kill.set()
        return text

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        running = [pool.submit(stream, question) for question in QUESTIONS]
        assert kill.wait(60)
        engine.kill()
        assert [each.result(120) for each in running] == expected
    assert server.engine.pid != engine.pid


def test_a_client_that_leaves_frees_what_it_held(server):
    stream = ask(server.client, "Count from 1 to 40.", stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    ask(server.client, "Hello!")
    while metric(server, "vllm:num_requests_running"):
        ask(server.client, "Hello!", max_tokens=1)
    assert metric(server, "vllm:generation_tokens_total") > 0


def test_a_bad_request_is_the_callers_and_the_server_goes_on(server):
    with pytest.raises(openai.BadRequestError, match="context"):
        server.client.completions.create(model="quire-tiny", prompt="word " * 5000, max_tokens=5)
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="another", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(server.client, "a", temperature=-1)
    assert ask(server.client, "Hello!").choices[0].message.content


def test_a_full_queue_is_refused_in_time(start_server):
    """One runs, one may wait: the third is told to come back, and the others are not harmed."""
    server = start_server("--max-num-seqs", "1", "--max-num-queued-reqs", "1")
    long = {"max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}
    running = ask(server.client, "Hello!", **long)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, server.client, "Hello!")
        while metric(server, "vllm:num_requests_waiting") < 1:
            assert not waiting.done()
        with pytest.raises(openai.RateLimitError) as refused:
            ask(server.client, "Hello!")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        running.close()
        assert waiting.result(120).choices[0].message.content
    server.close()


def test_sigterm_lets_a_running_request_finish(start_server):
    server = start_server()
    stream = ask(server.client, QUESTIONS[2], stream=True, max_tokens=200, extra_body={"ignore_eos": True})
    chunks = iter(stream)
    first = next(chunks)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(server.stop)
        rest = list(chunks)
        code, errors = stopped.result(120)
    assert first.choices[0].delta.role == "assistant"
    assert rest[-1].choices[0].finish_reason == "length"
    assert code == 0, errors
