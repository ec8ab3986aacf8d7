"""Reading endpoints' metrics, against the Prometheus client's own parser, and pages that lie."""

from __future__ import annotations

import asyncio
import math

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.scrape import MAX_PAGE_BYTES, Scraper, UnreadablePage, parse_metrics

VALUES = st.floats(min_value=0, max_value=1e6, allow_nan=False).map(lambda value: round(value, 3))
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def page(waiting: list[float], usage: list[float], model: str) -> str:
    registry = CollectorRegistry()
    labels = ["model_name", "engine"]
    queue = Gauge("vllm:num_requests_waiting", "…", labels, registry=registry)
    share = Gauge("vllm:kv_cache_usage_perc", "…", labels, registry=registry)
    Counter("vllm:prompt_tokens", 'With a "quote" }', labels, registry=registry).labels(model, "0").inc(7)
    for engine, value in enumerate(waiting):
        queue.labels(model, str(engine)).set(value)
    for engine, value in enumerate(usage):
        share.labels(model, str(engine)).set(value)
    info = Gauge("vllm:cache_config_info", "…", [*labels, "block_size", "num_gpu_blocks"], registry=registry)
    info.labels(model, "0", "32", "1000").set(1)
    return generate_latest(registry).decode()


@given(st.lists(VALUES, min_size=1, max_size=3), st.lists(VALUES, max_size=3), NAMES)
def test_as_the_prometheus_client_reads_it(waiting: list[float], usage: list[float], model: str) -> None:
    text = page(waiting, usage, model)
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = parse_metrics(text, now=5.0)
    assert found.time == 5.0
    assert found.waiting == int(sum(s.value for s in samples if s.name == "vllm:num_requests_waiting"))
    shares = [s.value for s in samples if s.name == "vllm:kv_cache_usage_perc"]
    assert found.kv_usage == min(max(shares, default=0.0), 1.0)
    assert (found.block_size, found.num_blocks) == (32, 1000)


def test_sglang_tgi_and_adapters() -> None:
    found = parse_metrics(
        'sglang:num_queue_reqs{model_name="m"} 3\nsglang:num_running_reqs{model_name="m"} 4.0\n'
        'sglang:token_usage{model_name="m"} 0.25\nsglang:cache_config_info{page_size="64",num_pages="9"} 1\n',
        0.0,
    )
    assert (found.waiting, found.running, found.kv_usage, found.block_size, found.num_blocks) == (3, 4, 0.25, 64, 9)
    assert parse_metrics("tgi_queue_size 2\ntgi_batch_current_size 5\n", 0.0).running == 5
    found = parse_metrics(
        'vllm:lora_requests_info{max_lora="2",running_lora_adapters="a, b",waiting_lora_adapters=""} 100.0\n'
        'vllm:lora_requests_info{max_lora="2",running_lora_adapters="old",waiting_lora_adapters="c"} 99.0\n'
        "vllm:num_requests_waiting 0\n",
        0.0,
    )
    assert (found.max_lora, found.active_adapters, found.waiting_adapters) == (2, {"a", "b"}, frozenset())


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf", "x", ""])
def test_numbers_that_cannot_be_are_not_there(value: str) -> None:
    found = parse_metrics(f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 2\n", 0.0)
    assert (found.running, found.waiting) == (0, 2)
    with pytest.raises(UnreadablePage):
        parse_metrics(f"vllm:num_requests_running {value}\n", 0.0)


@given(st.text(max_size=200))
def test_any_page_is_read_or_refused(text: str) -> None:
    try:
        found = parse_metrics("vllm:num_requests_waiting" + text + "\nvllm:kv_cache_usage_perc" + text, 0.0)
    except UnreadablePage:
        return
    assert found.waiting >= 0
    assert math.isfinite(found.kv_usage)


@pytest.mark.parametrize(
    "piece", ["a", 'a="', 'a="\\\\', "\\\\", '"', 'a="b",', "a=", "{", "}", " ", "9", "_", "a ", "é"]
)
@pytest.mark.parametrize("name", ["vllm:cache_config_info", "vllm:lora_requests_info", "vllm:num_requests_waiting"])
def test_a_page_of_one_hostile_line_is_read_in_time_linear_in_its_size(name: str, piece: str) -> None:
    """In quadratic time one such page would take hours."""
    line = name + "{" + piece * ((MAX_PAGE_BYTES - 200) // len(piece.encode()))
    for end in ("", "} 1", '"} 1'):
        assert parse_metrics(f"{line}{end}\nvllm:num_requests_running 3\n", 0.0).running == 3


@given(st.dictionaries(st.from_regex(r"_?[a-z][a-z0-9_]{0,5}", fullmatch=True), NAMES, min_size=1, max_size=4))
def test_labels_are_the_prometheus_clients(labels: dict[str, str]) -> None:
    registry = CollectorRegistry()
    blocks = {"block_size": "16", "num_gpu_blocks": "9"}
    Gauge("vllm:cache_config_info", "…", [*labels, *blocks], registry=registry).labels(**(labels | blocks)).set(1)
    found = parse_metrics(generate_latest(registry).decode() + "vllm:num_requests_waiting 0\n", 0.0)
    assert (found.block_size, found.num_blocks) == (16, 9)


async def test_a_failed_reading_keeps_the_last_and_stops_with_the_endpoint() -> None:
    answers = iter(
        [
            web.Response(text="vllm:num_requests_waiting 4\n"),
            web.Response(status=500),
            web.Response(body=b"#" * (MAX_PAGE_BYTES + 1)),
            web.Response(text="garbage"),
        ]
    )

    async def metrics(_: web.Request) -> web.Response:
        return next(answers)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    now = 10.0
    pool = Pool()
    endpoint = pool.put(Endpoint("a", "127.0.0.1", port))
    told: list[str] = []
    async with aiohttp.ClientSession() as session:
        scraper = Scraper(pool, session, lambda: now, 3600.0, updated=lambda one: told.append(one.key))
        for _ in range(4):
            await scraper.read(endpoint)
            now += 1
        assert endpoint.metrics is not None
        assert (endpoint.metrics.waiting, endpoint.metrics_age(now)) == (4, 4.0)
        assert (told, scraper.failures) == (["default/a"], {"default/a": 3})
        scraper.start()
        pool.remove("default/a")
        assert scraper.failures == {}
        await asyncio.wait_for(scraper.stop(), 5)
    await runner.cleanup()
