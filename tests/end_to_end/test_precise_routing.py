"""`quire gateway` in front of two engines: a prompt goes to the one that has its beginning, by what the engines say."""

import json
import random
import socket
import subprocess
import sys
import time

import pytest
from openai import OpenAI

from quire.cli.main import main

POLICY = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: token-producer
- type: precise-prefix-cache-producer
- type: prefix-cache-scorer
  parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: prefix-cache-scorer
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def events() -> str:
    """Any free port, which the gateway learns from the engine's metrics."""
    places = {"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}
    return json.dumps({"enable_kv_cache_events": True} | places)


@pytest.fixture(scope="module")
def engines(start_server):
    return [start_server("--block-size=16", f"--kv-events-config={events()}") for _ in range(2)]


@pytest.fixture(scope="module")
def gateway(engines, tmp_path_factory):
    policy = tmp_path_factory.mktemp("policy") / "policy.yaml"
    policy.write_text(POLICY)
    urls = ",".join(engine.root for engine in engines)
    process = subprocess.Popen(
        [sys.executable, "-m", "quire", "gateway", "--port=0", f"--endpoints={urls}", f"--policy={policy}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("quire gateway at "), line
    yield line.rsplit(" ", 1)[1].strip()
    process.terminate()
    process.communicate(timeout=60)


def cached(client: OpenAI, prompt: list[int]) -> int:
    answer = client.completions.create(model="quire-tiny", prompt=prompt, max_tokens=1)
    return answer.usage.prompt_tokens_details.cached_tokens


def status(gateway: str) -> dict:
    with OpenAI(base_url=gateway.removesuffix("/v1"), api_key="none") as client:
        return json.loads(client.get("/kv-events", cast_to=str))


def until(gateway: str, condition) -> None:
    deadline = time.monotonic() + 60
    while not condition(found := status(gateway)):
        assert time.monotonic() < deadline, found


def test_a_prompt_goes_where_its_beginning_is(engines, gateway, capsys):
    chance = random.Random(3)
    until(gateway, lambda found: sum(each["connected"] for each in found["endpoints"].values()) == 2)
    prefixes = [[chance.randrange(300) for _ in range(96)] for _ in range(6)]
    for number, prefix in enumerate(prefixes):  # past the gateway, which learns of it from the engines alone
        cached(engines[number % 2].client, prefix)
    until(gateway, lambda found: found["blocks"] == 6 * 6)
    with OpenAI(base_url=gateway, api_key="none", max_retries=0) as client:
        for _ in range(24):
            prompt = [*chance.choice(prefixes), *(chance.randrange(300) for _ in range(8))]
            assert cached(client, prompt) == 96
    found = status(gateway)
    assert found["queries"] == 24
    assert sum(each["matches"] for each in found["endpoints"].values()) == 24
    main(["doctor", "--no-model", "--port", "0", "--json", "--gateway", gateway])
    [check] = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "kv events"]
    assert check["status"] == "ok", check
