"""The gateway's KV index beside a real engine: what it thinks is cached is what the engine then says was cached."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import time

import openai
import pytest
import uvicorn
import zmq.asyncio
from openai import OpenAI
from starlette.applications import Starlette

from quire.cli.main import main
from quire.config.engine import EngineConfig
from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.kv.index import KVIndex
from quire.gateway.kv.route import kv_route
from quire.gateway.kv.subscriptions import KVSubscriptions, PortsOf
from quire.gateway.scrape import parse_metrics
from quire.models.source import resolve_model

BLOCK = 16


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def evicting(start_server):
    """A server whose cache holds 40 blocks, a few prompts' worth."""
    settings = {
        "enable_kv_cache_events": True,
        "endpoint": f"tcp://127.0.0.1:{free_port()}",
        "bind": True,
        "replay_endpoint": f"tcp://127.0.0.1:{free_port()}",
    }
    return start_server(f"--block-size={BLOCK}", "--num-kv-blocks=41", f"--kv-events-config={json.dumps(settings)}")


class Router:
    """What the gateway has of KV events, and no more."""

    def __init__(self, server, ports: PortsOf = PortsOf()) -> None:
        self.server = server
        self.context = zmq.asyncio.Context()
        self.index = KVIndex()
        self.pool = Pool()
        self.endpoint = self.pool.put(Endpoint("e", "127.0.0.1", int(server.root.rpartition(":")[2])))
        self.subscriptions = KVSubscriptions(self.pool, self.index, self.context, ports)
        self.subscriptions.start()

    async def close(self) -> None:
        await self.subscriptions.stop()
        self.context.destroy(linger=0)

    async def read_metrics(self) -> None:
        client = self.server.client.with_options(base_url=self.server.root)
        page = await asyncio.to_thread(client.get, "/metrics", cast_to=str)
        self.endpoint.metrics = parse_metrics(page, time.monotonic())
        self.subscriptions.refresh(self.endpoint)

    def cached(self, prompt, salt="") -> int:
        found = self.index.lookup(prompt, cache_salt=salt).get(self.endpoint.key)
        return 0 if found is None else found.tokens

    async def ask(self, prompt, salt="") -> int:
        """Prompt tokens that the engine says came from its cache."""
        answer = await asyncio.to_thread(
            self.server.client.completions.create,
            model="quire-tiny",
            prompt=prompt,
            max_tokens=1,
            extra_body={"cache_salt": salt} if salt else {},
        )
        details = answer.usage.prompt_tokens_details
        return details.cached_tokens if details is not None else 0  # vLLM leaves it out where there are none

    async def know(self, prompt, block_size=BLOCK, salt="") -> None:
        """Until the events of a prompt with something new in it have come, and with them those of what it drove out."""
        async with asyncio.timeout(60):
            while self.cached(prompt, salt) < len(prompt) // block_size * block_size:
                await asyncio.sleep(0.002)


@pytest.fixture
async def router(evicting):
    made = Router(evicting)
    await made.read_metrics()
    yield made
    await made.close()


async def compare(router: Router, num_prompts: int, block_size: int) -> int:
    """Random prompts with common beginnings, more than the cache holds: evicted blocks are known to be gone. How many
    found something in the cache."""
    chance = random.Random(5)
    stems = [[chance.randrange(300) for _ in range(chance.randrange(20, 140))] for _ in range(5)]
    hits = 0
    for number in range(num_prompts):
        salt = chance.choice(["", "", "", "pepper"])
        stem = chance.choice(stems)
        tail = [chance.randrange(300) for _ in range(chance.randrange(1, 40))]
        prompt = [*stem[: chance.randrange(1, len(stem) + 1)], *tail]
        prompt += [number] * 2 * block_size  # a block, at least, that nobody has asked yet
        expected = router.cached(prompt, salt)
        assert await router.ask(prompt, salt) == expected
        await router.know(prompt, block_size, salt)
        hits += expected > 0
    return hits


async def test_what_is_expected_to_be_cached_is_cached(router):
    assert await compare(router, 60, BLOCK) > 10
    health = router.index.health()[router.endpoint.key]
    assert health.removed > 50
    assert health.missed == health.resyncs == health.bad_messages == health.orphans == health.repeated == 0
    assert health.block_size == BLOCK
    assert health.blocks <= 40
    assert router.subscriptions.findings() == []


class Vllm:
    """`vllm serve` of the built-in model, unmodified, with a cache of 60 blocks."""

    def __init__(self, command: str) -> None:
        port, self.events, self.replay = free_port(), free_port(), free_port()
        places = {"endpoint": f"tcp://*:{self.events}", "replay_endpoint": f"tcp://*:{self.replay}"}
        settings = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv@pod@quire-tiny"} | places
        model = str(resolve_model(EngineConfig()))
        flags = ["--enforce-eager", "--block-size=32", "--num-gpu-blocks-override=60", "--max-model-len=512"]
        flags += ["--max-num-seqs=4", "--enable-prompt-tokens-details", "--served-model-name=quire-tiny"]
        self.process = subprocess.Popen(
            [command, "serve", model, f"--port={port}", *flags, f"--kv-events-config={json.dumps(settings)}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.root = f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0)

    def wait(self) -> None:
        deadline = time.monotonic() + 250
        while True:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            try:
                self.client.models.list()
            except openai.APIConnectionError:
                time.sleep(0.5)
            else:
                return

    def close(self) -> None:
        self.client.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.skipif("QUIRE_TEST_VLLM" not in os.environ, reason="QUIRE_TEST_VLLM does not name a vllm command")
async def test_what_vllm_says_is_understood():
    vllm = Vllm(os.environ["QUIRE_TEST_VLLM"])
    try:
        await asyncio.to_thread(vllm.wait)
        router = Router(vllm, PortsOf(events=vllm.events, replay=vllm.replay))
        await router.read_metrics()
        assert await compare(router, 60, 32) > 10
        health = router.index.health()[router.endpoint.key]
        assert health.removed > 50
        assert health.missed == health.resyncs == health.bad_messages == health.orphans == 0
        assert router.subscriptions.findings() == []
        await router.close()
    finally:
        vllm.close()


async def doctor(router, capsys) -> dict[str, list[dict]]:
    """What `quire doctor --gateway` says, by the name of the check."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(Starlette(routes=[kv_route(router.subscriptions)]), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    await asyncio.to_thread(main, ["doctor", "--no-model", "--port", "0", "--json", "--gateway", url])
    server.should_exit = True
    await serving
    checks = {}
    for check in json.loads(capsys.readouterr().out)["checks"]:
        checks.setdefault(check["name"], []).append(check)
    return checks


async def test_the_doctor_sees_whether_events_come(router, evicting, capsys):
    await router.ask(list(range(80)))
    await router.know(list(range(80)))
    [check] = (await doctor(router, capsys))["kv events"]
    assert check["status"] == "ok", check
    router.endpoint.models = frozenset({"another"})
    router.pool.put(Endpoint("deaf", "127.0.0.1", 1, labels={"quire.ai/kv-events-port": str(free_port())}))
    checks = {check["detail"].partition(":")[0]: check for check in (await doctor(router, capsys))["kv events"]}
    assert (checks["default/e"]["status"], checks["default/deaf"]["status"]) == ("warn", "fail")
    assert "names the model 'quire-tiny', but it serves another" in checks["default/e"]["detail"]
    assert "Nothing answers" in checks["default/deaf"]["detail"]


def test_the_doctor_sees_that_there_is_no_gateway(evicting, capsys):
    main(["doctor", "--no-model", "--port", "0", "--json", "--gateway", f"http://127.0.0.1:{free_port()}"])
    [check] = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "kv events"]
    assert check["status"] == "fail"
    main(["doctor", "--no-model", "--port", "0", "--json", "--gateway", evicting.root])
    [check] = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "kv events"]
    assert (check["status"], "listens to no engine's KV events" in check["detail"]) == ("warn", True)


async def test_who_comes_late_knows_the_same(router, evicting):
    await router.ask(list(range(100)))
    await router.know(list(range(100)))
    late = Router(evicting)
    try:
        await late.read_metrics()
        await late.know(list(range(100)))
        assert late.index._holders.keys() == router.index._holders.keys()
    finally:
        await late.close()


async def test_an_engine_that_died_has_nothing_cached(router, evicting):
    prompt = list(range(50, 150))
    await router.ask(prompt)
    await router.know(prompt)
    evicting.engine.kill()
    async with asyncio.timeout(60):
        while router.cached(prompt):
            await asyncio.sleep(0.01)
    assert await router.ask(prompt) == 0
    await router.know(prompt)
    assert await router.ask([*prompt, *range(20)]) == len(prompt) // BLOCK * BLOCK
    assert router.index.health()[router.endpoint.key].restarts == 1
