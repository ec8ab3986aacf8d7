"""`quire serve` tells what its prefix cache holds, read as any router would: by ZeroMQ and msgpack's own library."""

import json
import subprocess
import sys

import msgpack
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families

SETTINGS = '{"enable_kv_cache_events": true, "endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}'


@pytest.fixture(scope="module")
def telling(start_server):
    server = start_server("--block-size=16", f"--kv-events-config={SETTINGS}")
    server.told = server.process.stdout.readline()
    return server


def samples(server) -> dict[str, list]:
    page = server.client.with_options(base_url=server.root).get("/metrics", cast_to=str)
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def complete(server, prompt, **parameters):
    return server.client.completions.create(
        model="quire-tiny", prompt=prompt, max_tokens=1, temperature=0, extra_body=parameters
    )


def test_where_is_told(telling):
    [(labels, value)] = samples(telling)["quire_kv_events_info"]
    endpoint, replay, topic = labels["endpoint"], labels["replay_endpoint"], labels["topic"]
    assert telling.told == f"quire tells its KV events at {endpoint}, replayed at {replay}, topic {topic}\n"
    assert topic == f"kv@{telling.root.removeprefix('http://')}@quire-tiny"
    assert value == 1
    assert endpoint.startswith("tcp://127.0.0.1:")


def test_a_port_that_is_taken_is_said_before_anything_is_served(telling):
    [(labels, _)] = samples(telling)["quire_kv_events_info"]
    taken = json.dumps({"enable_kv_cache_events": True, "endpoint": labels["endpoint"], "bind": True})
    command = [sys.executable, "-m", "quire", "serve", "--port=0", f"--kv-events-config={taken}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"KV events cannot be published at {labels['endpoint']}: Address already in use." in done.stderr
    assert done.stdout == ""


def test_blocks_of_a_prompt_are_told_once_with_their_tokens_and_salt(telling):
    prompt = list(range(100, 180))  # five blocks of 16
    [(labels, _)] = samples(telling)["quire_kv_events_info"]
    with zmq.Context() as context, context.socket(zmq.SUB) as reader:
        reader.setsockopt(zmq.RCVTIMEO, 60_000)
        reader.setsockopt(zmq.SUBSCRIBE, b"kv@")
        reader.connect(labels["endpoint"])
        first = 0
        while not reader.poll(50):  # what is told before we listen is told to nobody
            first += 1
            complete(telling, [first] * 33)
        while reader.poll(200):
            *_, payload = reader.recv_multipart()
        complete(telling, prompt)
        topic, number, payload = reader.recv_multipart()
        complete(telling, prompt, cache_salt="pepper")
        _, next_number, salted = reader.recv_multipart()
        complete(telling, [*prompt, *range(200, 220)])
        *_, longer = reader.recv_multipart()
    assert topic.decode() == labels["topic"]
    assert int.from_bytes(next_number, "big") == int.from_bytes(number, "big") + 1
    [event] = msgpack.unpackb(payload)[1]
    assert event[0] == "BlockStored"
    hashes = event[1]
    assert len(set(hashes)) == 5
    assert event[2:] == [None, prompt, 16, None, "GPU", None, None, None, None, None]
    [event] = msgpack.unpackb(salted)[1]
    assert not set(event[1]) & set(hashes)
    assert event[8] == [["pepper"], None, None, None, None]
    [event] = msgpack.unpackb(longer)[1]
    assert (event[2], event[3]) == (hashes[-1], list(range(200, 216)))


def test_metrics_have_what_a_router_reads(telling):
    complete(telling, list(range(300, 400)))
    telling.client.completions.create(model="quire-tiny", prompt="Hello", max_tokens=20, temperature=0)
    while not (found := samples(telling))["quire_decode_seconds_per_sequence"][0][1]:
        complete(telling, "Hello")
    info = found["vllm:cache_config_info"][0][0]
    assert info["block_size"] == "16"
    assert int(info["num_gpu_blocks"]) > 1
    labels, when = found["vllm:lora_requests_info"][0]
    assert (labels["max_lora"], labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("0", "", "")
    assert when > 1.6e9
    for name in ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert found[name][0][1] >= 0
    assert found["quire_num_cached_blocks"][0][1] >= 6
    assert 0 < found["quire_prefill_seconds_per_token"][0][1] < found["quire_decode_seconds_per_step"][0][1] < 60
    assert found["quire_kv_event_batches_total"][0][1] >= 1
    assert found["quire_kv_event_batches_dropped_total"][0][1] == 0
