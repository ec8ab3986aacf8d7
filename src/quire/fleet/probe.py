"""Asks processes over HTTP how they are: do they answer, and is anything left to do?"""

from __future__ import annotations

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from quire.web.bodies import read_body

PROBE_TIMEOUT = 5.0
MAX_METRICS_BYTES = 4 * 1024 * 1024
_IN_FLIGHT = frozenset({"vllm:num_requests_running", "vllm:num_requests_waiting"})


class Probe:
    """One HTTP client for all processes."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT))

    async def trouble(self, url: str, *, engine: bool, api_key: str | None = None) -> str | None:
        """Why the process at `url` cannot take requests; None if it can.

        An engine has to be healthy and to name its models; quire's `/ready` tells of more than `/health` does, and is
        asked where there is one.
        """
        paths = ("/ready", "/v1/models") if engine else ("/health",)
        try:
            for path in paths:
                async with self._get(url + path, api_key) as response:
                    status = response.status
                if status == 404 and path == "/ready":
                    async with self._get(url + "/health", api_key) as response:
                        status = response.status
                if status != 200:
                    return f"{path} answered {status}."
        except (aiohttp.ClientError, OSError) as error:
            return f"It does not answer: {error or type(error).__name__}."
        except TimeoutError:
            return f"It did not answer within {PROBE_TIMEOUT:g} seconds."
        return None

    async def in_flight(self, url: str, api_key: str | None = None) -> int | None:
        """Requests that run or wait at the engine; None if it does not say."""
        try:
            async with self._get(url + "/metrics", api_key) as response:
                if response.status != 200:
                    return None
                page = await read_body(response.content, MAX_METRICS_BYTES)
            return in_flight(page.decode())
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return None

    def _get(self, url: str, api_key: str | None) -> aiohttp.client._RequestContextManager:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        return self._session.get(url, headers=headers, allow_redirects=False)

    async def close(self) -> None:
        await self._session.close()


def in_flight(page: str) -> int | None:
    """The sum of vLLM's gauges of running and waiting requests on a Prometheus page; None without them."""
    found: float | None = None
    for family in text_string_to_metric_families(page):
        if family.name in _IN_FLIGHT:
            found = (found or 0.0) + sum(sample.value for sample in family.samples)
    return None if found is None else round(found)
