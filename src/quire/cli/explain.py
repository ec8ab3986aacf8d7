"""`quire explain`: why the gateway sent a request where it did."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec

from quire.cli.bench.report import print_json
from quire.cli.client import ServerFault, base_url, open_session
from quire.web.bodies import read_body

MAX_BYTES = 16 * 1024 * 1024


def explain(
    request_id: str, *, url: str = "http://127.0.0.1:8000", api_key: str | None = None, json: bool = False
) -> int:
    """Tell why the gateway sent a request where it did: candidates, scores, why losers lost, predicted and real TTFT.

    Parameters
    ----------
    request_id
        The answer's header x-request-id.
    url
        The gateway's address.
    api_key
        Its key, if it asks for one.
    json
        Print JSON.
    """
    told = asyncio.run(_ask(f"{base_url(url)}/explain/{quote(request_id, safe='')}", api_key))
    if json:
        print_json(told)
    else:
        _print(told)
    return 0


async def _ask(url: str, api_key: str | None) -> dict[str, Any]:
    """Raises `ServerFault`."""
    async with open_session(api_key=api_key, read_timeout=10.0) as session:
        try:
            async with session.get(url) as answer:
                body = await read_body(answer.content, MAX_BYTES)
                status = answer.status
        except (OSError, aiohttp.ClientError) as error:
            raise ServerFault(f"{url} cannot be reached: {error}.", remedy="Name the gateway with --url.") from error
        except ValueError as error:
            raise ServerFault(f"{url}: {error}.", remedy="Is it a quire gateway?") from error
    try:
        told = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        told = {}
    if status != 200 or "request_id" not in told:
        message = told.get("error", {}).get("message") if isinstance(told.get("error"), dict) else None
        raise ServerFault(message or f"{url} answers {status}, and explains nothing.", remedy="Is it a quire gateway?")
    return told


def _print(told: Mapping[str, Any]) -> None:
    print(f"{told['request_id']}: model {told['target_model']}, about {told['prompt_tokens']} prompt tokens")
    for choice in told["choices"]:
        for profile in choice["profiles"]:
            picked = ", ".join(profile["picked"]) or "nobody"
            print(f"\nprofile {profile['profile']}, after {choice['after_seconds'] * 1e3:.1f} ms: {picked}")
            for plugin, removed in profile["filtered_out"].items():
                print(f"  {plugin} took out {', '.join(removed)}")
            for candidate in profile["candidates"]:
                _print_candidate(candidate)
    for attempt in told["attempts"]:
        print(_attempt(attempt))
    if told.get("dropped"):
        print(f"turned away: {told['dropped']}")


def _print_candidate(candidate: Mapping[str, Any]) -> None:
    expected = candidate.get("predicted_ttft")
    ttft = "" if expected is None else f", TTFT expected {expected:.3f} s"
    print(f"  {candidate['endpoint']}: total {candidate['total']:.3f}{ttft}; {candidate.get('why_not', 'picked')}")
    for name, given in candidate["scores"].items():
        details = given.get("details")
        parts = ", ".join(f"{key} {value:g}" for key, value in details.items()) if isinstance(details, dict) else ""
        print(f"    {name} {given['score']:.3f}{f' ({parts})' if parts else ''}")


def _attempt(attempt: Mapping[str, Any]) -> str:
    parts = [f"\nsent to {attempt['endpoint']}"]
    if "predicted_ttft" in attempt:
        parts.append(f"TTFT expected {attempt['predicted_ttft']:.3f} s")
    if "ttft" in attempt:
        parts.append(f"was {attempt['ttft']:.3f} s")
    if attempt.get("error"):
        parts.append(f"failed: {attempt['error']}")
    elif "status" in attempt:
        parts.append(f"status {attempt['status']} after {attempt['seconds']:.3f} s")
    return ", ".join(parts)
