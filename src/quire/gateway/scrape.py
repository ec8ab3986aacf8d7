"""Reads what endpoints say of themselves: Prometheus pages by the names of vLLM, SGLang, TGI and quire.

A page is read line by line for the few names wanted; the whole of vLLM's page has some thousand lines, and several
endpoints are read several times a second. Numbers that cannot be (negative, not finite) count as not there. When a
reading fails the last one stands, and grows old: who uses it looks at its age.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import structlog

from quire.gateway.endpoint import Clock, Endpoint, EndpointMetrics, Pool

MAX_PAGE_BYTES: Final = 1024 * 1024
"""It is read on the event loop: some milliseconds for a page as large as this, whatever is on it."""
_SUMMED: Final[Mapping[str, str]] = {
    "vllm:num_requests_waiting": "waiting",
    "vllm:num_requests_running": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:num_running_reqs": "running",
    "tgi_queue_size": "waiting",
    "tgi_batch_current_size": "running",
    "quire_num_waiting_tokens": "waiting_tokens",
}
_HIGHEST: Final[Mapping[str, str]] = {
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:gpu_cache_usage_perc": "kv_usage",
    "sglang:token_usage": "kv_usage",
    "quire_prefill_seconds_per_token": "prefill_seconds_per_token",
    "quire_decode_seconds_per_step": "decode_seconds_per_step",
}
_CACHE_INFO: Final[Mapping[str, tuple[str, str]]] = {
    "vllm:cache_config_info": ("block_size", "num_gpu_blocks"),
    "sglang:cache_config_info": ("page_size", "num_pages"),
}
_LORA_INFO: Final = "vllm:lora_requests_info"
_KV_EVENTS_INFO: Final = "quire_kv_events_info"
_LABEL = re.compile(r'(?<!\w)(\w++)="((?:[^"\\]|\\.)*+)"')
"""Nothing is tried twice: a word begins where one can, and neither part gives back what it took."""
_WHOLE = frozenset({"waiting", "running", "waiting_tokens"})


class UnreadablePage(Exception):
    """None of the names that we know is on the page."""


def parse_metrics(page: str, now: float) -> EndpointMetrics:
    """Several series of a name (one per data-parallel engine) are added up, shares take the highest. Raises
    `UnreadablePage`."""
    found: dict[str, float] = {}
    info: dict[str, object] = {}
    newest = -math.inf
    for line in page.split("\n"):  # nothing else ends a line, whatever is in a label
        if not line or line[0] == "#":
            continue
        name = line.partition("{")[0].partition(" ")[0]
        if name in _SUMMED or name in _HIGHEST:
            value = _value(line)
            if value is not None:
                _take(found, name, value)
        elif name in _CACHE_INFO:
            _take_cache(info, line, *_CACHE_INFO[name])
        elif name == _LORA_INFO:
            value = _value(line)
            if value is not None and value >= newest:  # its value is when it was true
                newest = value
                _take_adapters(info, line)
        elif name == _KV_EVENTS_INFO:
            _take_kv_events(info, line)
    if not found:
        raise UnreadablePage("none of vLLM's, SGLang's, TGI's or quire's metrics is on the page")
    numbers = {key: int(value) if key in _WHOLE else value for key, value in found.items()}
    return EndpointMetrics(time=now, **numbers, **info)  # type: ignore[arg-type]


def _take(found: dict[str, float], name: str, value: float) -> None:
    key = _SUMMED.get(name)
    if key is not None:
        found[key] = min(found.get(key, 0.0) + value, 1e15)
    else:
        key = _HIGHEST[name]
        found[key] = max(found.get(key, 0.0), min(value, 1.0) if key == "kv_usage" else value)


def _value(line: str) -> float | None:
    """The sample's value; None if it is no number that can be. A timestamp may stand behind it."""
    rest = line[line.rfind("}") + 1 :] if "{" in line else line.partition(" ")[2]
    try:
        value = float(rest.split()[0])
    except (ValueError, IndexError):
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _labels(line: str) -> dict[str, str]:
    return dict(_LABEL.findall(line))


def _take_cache(info: dict[str, object], line: str, size: str, count: str) -> None:
    labels = _labels(line)
    for label, key in ((size, "block_size"), (count, "num_blocks")):
        text = labels.get(label, "")
        if text.isdecimal() and 0 < int(text[:18]) < 2**53:
            info[key] = int(text[:18])


def _take_kv_events(info: dict[str, object], line: str) -> None:
    """Of the addresses only the ports: the host is the endpoint's."""
    labels = _labels(line)
    for label, key in (("endpoint", "kv_events_port"), ("replay_endpoint", "kv_replay_port")):
        port = labels.get(label, "").rpartition(":")[2]
        if port.isdecimal() and 0 < int(port[:6]) < 65_536:
            info[key] = int(port[:6])


def _take_adapters(info: dict[str, object], line: str) -> None:
    labels = _labels(line)
    for label, key in (("running_lora_adapters", "active_adapters"), ("waiting_lora_adapters", "waiting_adapters")):
        info[key] = frozenset(filter(None, (name.strip() for name in labels.get(label, "").split(","))))
    most = labels.get("max_lora", "")
    info["max_lora"] = int(most[:9]) if most.isdecimal() else 0


@dataclass(slots=True)
class Scraper:
    """One task per endpoint, for as long as the pool has it."""

    pool: Pool
    session: aiohttp.ClientSession
    clock: Clock
    interval: float
    timeout: float = 2.0
    path: str = "/metrics"
    updated: Callable[[Endpoint], None] = lambda _endpoint: None
    """Is told after each reading: who waits for room may have it now."""
    failures: dict[str, int] = field(default_factory=dict)
    """By endpoint key: readings that failed since the last good one."""
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def start(self) -> None:
        self.pool.watch(self._arrived, self._left)

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _arrived(self, endpoint: Endpoint) -> None:
        self._tasks[endpoint.key] = asyncio.create_task(self._follow(endpoint))

    def _left(self, endpoint: Endpoint) -> None:
        self.failures.pop(endpoint.key, None)
        task = self._tasks.pop(endpoint.key, None)
        if task is not None:
            task.cancel()

    async def _follow(self, endpoint: Endpoint) -> None:
        while True:
            await self.read(endpoint)
            failed = self.failures.get(endpoint.key, 0)
            await asyncio.sleep(self.interval * min(2**failed, 32))

    async def read(self, endpoint: Endpoint) -> None:
        """One reading; a failed one is counted, and told the first time."""
        try:
            endpoint.metrics = parse_metrics(await self._page(endpoint), self.clock())
        except (aiohttp.ClientError, OSError, TimeoutError, UnreadablePage, ValueError) as error:
            failed = self.failures[endpoint.key] = self.failures.get(endpoint.key, 0) + 1
            if failed == 1:
                why = str(error) or type(error).__name__
                structlog.get_logger().warning("metrics_unreadable", endpoint=endpoint.key, error=why)
            return
        if self.failures.pop(endpoint.key, 0):
            structlog.get_logger().info("metrics_readable_again", endpoint=endpoint.key)
        self.updated(endpoint)

    async def _page(self, endpoint: Endpoint) -> str:
        timeout = aiohttp.ClientTimeout(total=self.timeout)
        async with self.session.get(endpoint.url + self.path, timeout=timeout, allow_redirects=False) as response:
            if response.status != 200:
                raise UnreadablePage(f"its metrics page answers {response.status}")
            page = bytearray()
            with contextlib.closing(response):
                async for chunk in response.content.iter_any():
                    page += chunk
                    if len(page) > MAX_PAGE_BYTES:
                        raise UnreadablePage(f"its metrics page is larger than {MAX_PAGE_BYTES} bytes")
        return page.decode(errors="replace")
