"""`quire doctor --gateway`: whether what a running gateway was set up to do has any effect."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec

from quire.cli.checks import Check
from quire.cli.client import base_url, open_session
from quire.gateway.kv.route import PATH, KVStatus
from quire.web.bodies import read_body

MAX_BYTES = 16 * 1024 * 1024
NAME = "kv events"
ENDPOINTS = "endpoints"
STALE = 10.0
"""Seconds after which metrics are of no use."""


class _Metrics(msgspec.Struct):
    age_seconds: float
    waiting: int
    running: int


class _Endpoint(msgspec.Struct):
    name: str
    available: bool
    draining: bool
    models: list[str] | None = None
    metrics: _Metrics | None = None


class _Endpoints(msgspec.Struct):
    endpoints: list[_Endpoint]


def check_endpoints(url: str, api_key: str | None = None) -> list[Check]:
    """One for each endpoint as the gateway sees it."""
    address = f"{base_url(url)}/endpoints"
    try:
        body = asyncio.run(_get(address, api_key))
        told = msgspec.json.decode(body or b"", type=_Endpoints).endpoints
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        return [Check(name=ENDPOINTS, status="fail", detail=f"{address}: {reason}", remedy="Is the gateway running?")]
    if not told:
        return [Check(name=ENDPOINTS, status="fail", detail="The gateway knows none.", remedy="Give it some.")]
    return [_endpoint(one) for one in told]


def _endpoint(one: _Endpoint) -> Check:
    if not one.available:
        return Check(
            name=ENDPOINTS, status="fail", detail=f"{one.name} is left out, since it fails.", remedy="See its log."
        )
    if one.metrics is None or one.metrics.age_seconds > STALE:
        age = "never read" if one.metrics is None else f"read {one.metrics.age_seconds:.0f} s ago"
        return Check(
            name=ENDPOINTS,
            status="warn",
            detail=f"The metrics of {one.name} were {age}; it is judged by what was sent there alone.",
            remedy="Does it serve /metrics with vLLM's, SGLang's, TGI's or quire's names?",
        )
    models = ", ".join(one.models or ()) or "models unknown"
    state = "draining" if one.draining else "in use"
    detail = f"{one.name}: {models}; {state}, {one.metrics.running} running, {one.metrics.waiting} waiting"
    return Check(name=ENDPOINTS, status="ok", detail=detail)


def check_kv_events(url: str, api_key: str | None = None) -> list[Check]:
    """One for each thing that is wrong, or one that says that all is well."""
    address = base_url(url) + PATH
    try:
        status = asyncio.run(_read(address, api_key))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        return [_failed(f"{address}: {reason}", "Is the gateway running? Check the URL.")]
    except (msgspec.DecodeError, ValueError) as error:
        return [_failed(f"{address} does not answer as quire's gateway does: {error}", "Check the URL.")]
    if status is None or not status.endpoints:
        return [
            Check(
                name=NAME,
                status="warn",
                detail="The gateway listens to no engine's KV events: prefixes are matched by what it sent where.",
                remedy="Configure a precise-prefix-cache-producer, and engines with --kv-events-config.",
            )
        ]
    return read_kv_status(status)


def read_kv_status(status: KVStatus) -> list[Check]:
    wrong = [
        Check(name=NAME, status=found.status, detail=f"{found.endpoint}: {found.detail}", remedy=found.remedy)
        for found in status.findings
    ]
    if wrong:
        return wrong
    matched = sum(health.matches > 0 for health in status.endpoints.values())
    detail = (
        f"{len(status.endpoints)} endpoints tell of {status.blocks} blocks ({status.keys} different); "
        f"{status.queries} prompts looked up, {matched} endpoints had beginnings of some."
    )
    return [Check(name=NAME, status="ok", detail=detail)]


async def _read(address: str, api_key: str | None) -> KVStatus | None:
    body = await _get(address, api_key)
    return None if body is None else msgspec.json.decode(body, type=KVStatus)


async def _get(address: str, api_key: str | None) -> bytes | None:
    async with open_session(api_key=api_key, read_timeout=10.0) as session, session.get(address) as response:
        if response.status == 404:
            return None
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        return await read_body(response.content, MAX_BYTES)


def _failed(detail: str, remedy: str) -> Check:
    return Check(name=NAME, status="fail", detail=detail, remedy=remedy)
