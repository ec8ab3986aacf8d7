"""The whole gateway as `quire gateway` runs it, before model servers shaped like SGLang's and vLLM's."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from quire.cli.main import main
from quire.config.gateway import GatewayConfig
from quire.core.errors import ConfigError
from quire.gateway.run import run
from quire.web.server import StopOrders

PAGES = {
    "sglang": 'sglang:num_queue_reqs{{model_name="{m}"}} {w}\nsglang:num_running_reqs{{model_name="{m}"}} 0\n'
    'sglang:token_usage{{model_name="{m}"}} 0.1\nsglang:cache_config_info{{page_size="64",num_pages="100"}} 1\n',
    "vllm": 'vllm:num_requests_waiting{{model_name="{m}"}} {w}\nvllm:num_requests_running{{model_name="{m}"}} 0\n'
    'vllm:kv_cache_usage_perc{{model_name="{m}"}} 0.1\n'
    'vllm:cache_config_info{{block_size="16",num_gpu_blocks="100"}} 1\n',
}


class ModelServer:
    """One engine: says its name, reports its queue, and can be told to fail."""

    def __init__(self, name: str, model: str, shape: str) -> None:
        self.name, self.model, self.shape = name, model, shape
        self.waiting = 0
        self.failing = False
        self.bodies: list[dict[str, Any]] = []
        self.answered = asyncio.Event()
        self.hold: asyncio.Event | None = None
        self.pause: asyncio.Event | None = None
        """What a stream waits for after its first event."""
        self.address = ""

    async def start(self) -> Callable[[], Any]:
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"127.0.0.1:{runner.addresses[0][1]}"
        return runner.cleanup

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=PAGES[self.shape].format(m=self.model, w=self.waiting))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.answered.set()
        if self.failing:
            return web.json_response({"error": {"message": "broken"}}, status=503)
        if self.hold is not None:
            await self.hold.wait()
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
        if not body.get("stream"):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.name}}
            answer = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
            return web.json_response(answer | {"choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for text in (self.name, "!"):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            event = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
            await response.write(b"data: " + json.dumps(event | {"choices": [choice]}).encode() + b"\n\n")
            if self.pause is not None:
                await self.pause.wait()
        await response.write(b"data: [DONE]\n\n")
        return response


class Running:
    def __init__(self, url: str, orders: StopOrders, task: asyncio.Task[int]) -> None:
        self.url, self.orders, self.task = url, orders, task
        self.root = url.removesuffix("/v1")
        self.client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=20)

    async def say(self, model: str, **headers: str) -> str:
        answer = await self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello"}], extra_headers=headers
        )
        return str(answer.choices[0].message.content)

    async def get(self, path: str) -> Any:
        async with aiohttp.ClientSession() as session, session.get(self.root + path) as answer:
            text = await answer.text()
            return json.loads(text) if answer.content_type == "application/json" else text

    async def metric(self, name: str, **labels: str) -> float:
        page = await self.get("/metrics")
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


@contextlib.asynccontextmanager
async def gateway(**settings: Any) -> AsyncIterator[Running]:
    orders, listening = StopOrders(), asyncio.get_running_loop().create_future()
    config = GatewayConfig(port=0, scrape_interval=0.05, health_interval=0.1, **settings)
    task = asyncio.create_task(run(config, orders=orders, announce=listening.set_result))
    await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    running = Running(listening.result().split()[-1], orders, task)
    try:
        yield running
    finally:
        await running.client.close()
        orders.give()
        assert await asyncio.wait_for(task, 30) == 0


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while True:
            found = holds()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.02)


@pytest.fixture
async def servers() -> AsyncIterator[dict[str, ModelServer]]:
    made = {
        "a": ModelServer("a", "chat-v1", "sglang"),
        "b": ModelServer("b", "chat-v1", "vllm"),
        "c": ModelServer("c", "chat-v2", "vllm"),
    }
    async with contextlib.AsyncExitStack() as stack:
        for server in made.values():
            stack.push_async_callback(await server.start())
        yield made


def write(path: Path, documents: list[dict[str, Any]]) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text("\n---\n".join(json.dumps(document) for document in documents))
    fresh.rename(path)


def endpoints_file(path: Path, *servers: ModelServer, draining: str = "") -> None:
    entries = []
    for server in servers:
        host, port = server.address.split(":")
        labels = {"quire.ai/state": "draining" if server.name == draining else "ready", "version": server.model[-2:]}
        entries.append({"name": server.name, "address": host, "port": port, "labels": labels})
    write(path, [{"endpoints": entries}])


def traffic(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "quire.ai/v1alpha1", "kind": "TrafficPolicy", "metadata": {"name": "t"}, "spec": spec}


async def test_the_openai_client_in_front_of_two_kinds_of_servers(servers: dict[str, ModelServer]) -> None:
    urls = ",".join(f"http://{server.address}" for server in servers.values())
    async with gateway(endpoints=urls) as on:
        assert [model.id for model in (await on.client.models.list()).data] == ["chat-v1", "chat-v2"]
        said = {await on.say("chat-v1") for _ in range(20)}
        assert said <= {"a", "b"}
        assert await on.say("chat-v2") == "c"
        stream = await on.client.chat.completions.create(
            model="chat-v2", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        assert [event.choices[0].delta.content async for event in stream] == ["c", "!"]
        with pytest.raises(openai.NotFoundError, match="No endpoint serves the model 'nobody'"):
            await on.say("nobody")
        # Metrics under llm-d's names, of both kinds of servers.
        await until(lambda: _all_read(on))
        assert await on.metric("llm_d_epp_request_total", model_name="chat-v2") == 2.0
        assert await on.metric("llm_d_epp_ready_endpoints") == 3.0
        assert await on.metric("llm_d_epp_scheduler_attempts_total", status="success") == 22.0


async def _all_read(on: Running) -> bool:
    return all("metrics" in endpoint for endpoint in (await on.get("/endpoints"))["endpoints"])


async def test_who_has_a_queue_gets_nothing_while_the_other_has_none(servers: dict[str, ModelServer]) -> None:
    servers["a"].waiting = 50
    urls = f"http://{servers['a'].address},http://{servers['b'].address}"
    async with gateway(endpoints=urls) as on:
        await until(lambda: _all_read(on))
        assert {await on.say("chat-v1") for _ in range(10)} == {"b"}


async def test_a_request_explains_itself(servers: dict[str, ModelServer]) -> None:
    urls = f"http://{servers['a'].address},http://{servers['b'].address}"
    async with gateway(endpoints=urls) as on:
        said = await on.say("chat-v1", **{"x-request-id": "why"})
        told = await on.get("/explain/why")
        (attempt,) = told["attempts"]
        picked = told["choices"][0]["profiles"][0]["picked"][0]
        assert attempt["endpoint"] == picked
        assert picked.endswith(servers[said].address.split(":")[1])
        assert attempt["status"] == 200
        assert attempt["output_tokens"] == 2
        assert attempt["predicted_ttft"] > 0
        others = [one for one in told["choices"][0]["profiles"][0]["candidates"] if one["endpoint"] != picked]
        assert all("why_not" in one for one in others)
        assert "Nothing is remembered" in (await on.get("/explain/never"))["error"]["message"]


async def test_doctor_and_explain_say_what_the_gateway_does_in_vain(
    servers: dict[str, ModelServer], capsys: pytest.CaptureFixture[str]
) -> None:
    urls = f"http://{servers['a'].address},http://{servers['b'].address}"
    async with gateway(endpoints=urls) as on:
        await until(lambda: _all_read(on))
        await on.say("chat-v1", **{"x-request-id": "why"})
        doctor = ["doctor", "--no-model", "--port", "0", "--gateway"]
        assert await asyncio.to_thread(main, [*doctor, on.url, "--json"]) == 0
        said = capsys.readouterr().out  # the gateway's log goes there, too
        told, _ = json.JSONDecoder().raw_decode(said[("\n" + said).index("\n{") :])
        checks = {check["name"]: check for check in told["checks"]}
        assert checks["endpoints"]["status"] == "ok"
        assert "chat-v1; in use" in checks["endpoints"]["detail"]
        assert checks["kv events"]["status"] == "warn"
        assert await asyncio.to_thread(main, ["explain", "why", "--url", on.url]) == 0
        said = capsys.readouterr().out
        assert "expected-cost-scorer" in said
        assert "status 200" in said
        assert await asyncio.to_thread(main, ["explain", "never", "--url", on.url]) == 1
        assert "Nothing is remembered of the request 'never'" in capsys.readouterr().err
    assert await asyncio.to_thread(main, [*doctor, "http://127.0.0.1:9"]) == 1


async def test_blue_turns_green_and_back_and_a_wrong_file_changes_nothing(
    servers: dict[str, ModelServer], tmp_path: Path
) -> None:
    endpoints, policy = tmp_path / "endpoints.yaml", tmp_path / "policy.yaml"
    endpoints_file(endpoints, *servers.values())
    routes = [
        {"name": "blue", "targets": [{"model": "chat-v1", "selector": {"version": "v1"}}]},
        {"name": "green", "targets": [{"model": "chat-v2"}]},
    ]
    write(policy, [traffic(model="chat", routes=routes, active="blue")])
    async with gateway(endpoints_file=str(endpoints), policy=str(policy)) as on:
        assert await on.say("chat") in {"a", "b"}
        assert servers["c"].bodies == []
        write(policy, [traffic(model="chat", routes=routes, active="green")])

        async def is_green() -> bool:
            return await on.say("chat") == "c"

        await until(is_green)
        assert servers["c"].bodies[-1]["model"] == "chat-v2"
        policy.write_text("kind: Nonsense\n")
        assert {await on.say("chat") for _ in range(5)} == {"c"}
        write(policy, [traffic(model="chat", routes=routes, active="blue")])

        async def is_blue() -> bool:
            return await on.say("chat") in {"a", "b"}

        await until(is_blue)


async def test_a_draining_endpoint_finishes_and_gets_nothing_new(
    servers: dict[str, ModelServer], tmp_path: Path
) -> None:
    endpoints = tmp_path / "endpoints.yaml"
    a, b = servers["a"], servers["b"]
    endpoints_file(endpoints, a)
    async with gateway(endpoints_file=str(endpoints)) as on:
        a.hold = asyncio.Event()
        slow = asyncio.create_task(on.say("chat-v1"))
        await asyncio.wait_for(a.answered.wait(), 10)
        endpoints_file(endpoints, a, b, draining="a")

        async def a_drains() -> bool:
            found = {one["name"]: one for one in (await on.get("/endpoints"))["endpoints"]}
            return "default/b" in found and found["default/a"]["draining"]

        await until(a_drains)
        assert {await on.say("chat-v1") for _ in range(5)} == {"b"}
        a.hold.set()
        assert await slow == "a"


async def test_a_fallback_stands_in_and_requests_are_held_for_the_first_endpoint(
    servers: dict[str, ModelServer], tmp_path: Path
) -> None:
    endpoints, policy = tmp_path / "endpoints.yaml", tmp_path / "policy.yaml"
    c = servers["c"]
    write(endpoints, [{"endpoints": []}])
    write(policy, [traffic(model="chat", routes=[{"targets": [{"model": "gone"}]}], fallback=[{"model": "chat-v2"}])])
    async with gateway(endpoints_file=str(endpoints), policy=str(policy)) as on:
        held = asyncio.create_task(on.say("chat-v2"))  # scaled to zero: it waits
        await until(lambda: _is_queued(on))
        endpoints_file(endpoints, c)
        assert await asyncio.wait_for(held, 20) == "c"
        assert await on.say("chat") == "c"
        assert c.bodies[-1]["model"] == "chat-v2"


async def _is_queued(on: Running) -> bool:
    return await on.metric("llm_d_epp_flow_control_queue_size") == 1.0


async def test_a_model_that_is_scaled_to_zero_is_waited_for_while_another_lives(
    servers: dict[str, ModelServer], tmp_path: Path
) -> None:
    endpoints = tmp_path / "endpoints.yaml"
    endpoints_file(endpoints, servers["a"], servers["c"])
    async with gateway(endpoints_file=str(endpoints)) as on:
        assert await on.say("chat-v2") == "c"
        endpoints_file(endpoints, servers["a"])
        await until(lambda: _count(on, 1))
        held = asyncio.create_task(on.say("chat-v2"))
        await until(lambda: _is_queued(on))
        with pytest.raises(openai.NotFoundError):
            await on.say("nobody")
        endpoints_file(endpoints, servers["a"], servers["c"])
        assert await asyncio.wait_for(held, 20) == "c"


async def _count(on: Running, number: int) -> bool:
    return len((await on.get("/endpoints"))["endpoints"]) == number


async def test_a_header_says_which_endpoints_may_be_chosen_only_where_it_is_trusted(
    servers: dict[str, ModelServer],
) -> None:
    urls = f"http://{servers['a'].address},http://{servers['b'].address}"
    subset = "x-gateway-destination-endpoint-subset"
    async with gateway(endpoints=urls, trust_subset_header=True) as on:
        assert {await on.say("chat-v1", **{subset: servers["b"].address}) for _ in range(5)} == {"b"}
    async with gateway(endpoints=urls) as on:
        assert await on.say("chat-v1", **{subset: "192.0.2.1:80"}) in {"a", "b"}


async def test_a_shadow_is_compared_and_never_waited_for(servers: dict[str, ModelServer], tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    shadow = {"target": {"model": "chat-v2"}, "percent": 100}
    write(policy, [traffic(model="chat-v1", shadow=shadow)])
    c = servers["c"]
    c.hold = asyncio.Event()
    urls = f"http://{servers['a'].address},http://{c.address}"
    async with gateway(endpoints=urls, policy=str(policy)) as on:
        assert await on.say("chat-v1") == "a"  # though the shadow has not answered
        await asyncio.wait_for(c.answered.wait(), 10)
        c.hold.set()

        async def differs() -> bool:
            return await on.metric("quire_gateway_shadow", outcome="different") == 1.0

        await until(differs)
        assert c.bodies[0]["model"] == "chat-v2"
        c.failing = True
        assert await on.say("chat-v1") == "a"

        async def failed() -> bool:
            return await on.metric("quire_gateway_shadow", outcome="failed") == 1.0

        await until(failed)


async def test_a_session_stays_where_it_was_by_the_token_of_its_answer(
    servers: dict[str, ModelServer], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    plugins = [{"type": "session-affinity-scorer"}, {"type": "random-picker"}, {"type": "max-score-picker"}]
    profile = {
        "name": "default",
        "plugins": [{"pluginRef": "session-affinity-scorer"}, {"pluginRef": "max-score-picker"}],
    }
    config = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": plugins}
    write(policy, [config | {"schedulingProfiles": [profile]}])
    urls = f"http://{servers['a'].address},http://{servers['b'].address}"
    async with gateway(endpoints=urls, policy=str(policy)) as on:
        messages: Any = [{"role": "user", "content": "Hello"}]
        first = await on.client.chat.completions.with_raw_response.create(model="chat-v1", messages=messages)
        token, name = first.headers["x-session-token"], first.parse().choices[0].message.content
        assert {await on.say("chat-v1", **{"x-session-token": token}) for _ in range(10)} == {name}


async def test_a_failing_endpoint_costs_no_request(servers: dict[str, ModelServer]) -> None:
    a, b = servers["a"], servers["b"]
    a.failing = True
    async with gateway(endpoints=f"http://{a.address},http://{b.address}") as on:
        assert {await on.say("chat-v1") for _ in range(30)} == {"b"}
        assert 0 < len(a.bodies) < 30  # tried, then left out
        assert await on.metric("quire_gateway_retries_total") == len(a.bodies)


async def test_priorities_are_named_by_objectives_and_the_key_is_asked_for(
    servers: dict[str, ModelServer], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    objective = {"apiVersion": "llm-d.ai/v1alpha2", "kind": "InferenceObjective", "metadata": {"name": "batch"}}
    write(policy, [objective | {"spec": {"priority": -1}}])
    async with gateway(endpoints=f"http://{servers['a'].address}", policy=str(policy), api_key="secret") as on:
        with pytest.raises(openai.AuthenticationError):
            await on.say("chat-v1")
        headers = {"authorization": "Bearer secret", "x-llm-d-inference-objective": "batch"}
        assert await on.say("chat-v1", **headers) == "a"
        async with aiohttp.ClientSession(headers={"authorization": "Bearer secret"}) as session:
            async with session.get(on.root + "/metrics") as answer:
                assert 'priority="-1"' in await answer.text()
            async with session.get(on.root + "/health") as answer:
                assert answer.status == 200


EVICTING = [
    {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "featureGates": ["flowControl"],
        "plugins": [{"type": "concurrency-detector", "parameters": {"maxConcurrency": 1}}],
        "flowControl": {"enableEviction": True, "saturationDetector": {"pluginRef": "concurrency-detector"}},
    },
    {
        "apiVersion": "llm-d.ai/v1alpha2",
        "kind": "InferenceObjective",
        "metadata": {"name": "batch"},
        "spec": {"priority": -1},
    },
]
BATCH = {"x-llm-d-inference-objective": "batch"}


async def test_a_batch_request_gives_way_before_its_answer_begins(
    servers: dict[str, ModelServer], tmp_path: Path
) -> None:
    policy, c = tmp_path / "policy.yaml", servers["c"]
    write(policy, EVICTING)
    c.hold = hold = asyncio.Event()
    async with gateway(endpoints=f"http://{c.address}", policy=str(policy)) as on:
        batch = asyncio.create_task(on.say("chat-v2", **BATCH))
        await c.answered.wait()
        c.hold = None
        assert await on.say("chat-v2") == "c"
        with pytest.raises(openai.RateLimitError) as caught:
            await asyncio.wait_for(batch, 20)
        assert caught.value.code == "evicted"
        assert caught.value.response.headers["x-llm-d-request-dropped-reason"] == "evicted-priority"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert await on.say("chat-v2", **BATCH) == "c"  # with nobody above it, it goes
        hold.set()


async def test_a_batch_stream_that_gives_way_ends_with_an_error(
    servers: dict[str, ModelServer], tmp_path: Path
) -> None:
    policy, c = tmp_path / "policy.yaml", servers["c"]
    write(policy, EVICTING)
    c.pause = pause = asyncio.Event()
    async with gateway(endpoints=f"http://{c.address}", policy=str(policy)) as on:
        stream = await on.client.chat.completions.create(
            model="chat-v2", messages=[{"role": "user", "content": "Hi"}], stream=True, extra_headers=BATCH
        )
        events = aiter(stream)
        assert (await anext(events)).choices[0].delta.content == "c"
        assert await on.say("chat-v2") == "c"
        with pytest.raises(openai.APIError, match="priority above -1") as caught:
            await asyncio.wait_for(anext(events), 20)
        assert caught.value.code == "evicted"
        pause.set()


async def test_a_gateway_without_endpoints_or_with_a_wrong_policy_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no endpoints"):
        async with gateway():
            pass
    policy = tmp_path / "policy.yaml"
    config = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": [{"type": "queue-scorrer"}]}
    write(policy, [config])
    with pytest.raises(ConfigError, match="queue-scorrer"):
        async with gateway(endpoints="http://127.0.0.1:9", policy=str(policy)):
            pass
