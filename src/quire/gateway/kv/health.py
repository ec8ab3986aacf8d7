"""Whether KV events do any good: what an endpoint's stream and the index count, and what is to be made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

ORPHANS_WORTH_A_WORD = 0.5
FEWEST_QUERIES = 20
"""A score of zero means nothing before so many prompts were looked up."""


class KVHealth(msgspec.Struct, kw_only=True):
    """One endpoint. Counters since it was first known; `block_size` and `last_topic` as last heard.

    * `batches` and `events` were applied; `repeated` batches had been before. `missed` batches were missing in the
      sequence, `replayed` of them were got back. At a `resync` all that was known was given up; at a `restart`, too,
      since the engine's cache is a new one.
    * `stored`, `removed`: blocks. `orphans` could not be named, since the blocks before them are not known; `skipped`
      are of layers that see only part of the past. `bad_messages` and `bad_events` made no sense.
    * `blocks`: held now. `queries`: prompts looked up since the endpoint is known; `matches`: of which it held some.
    """

    address: str = ""
    connected: bool = False
    batches: int = 0
    events: int = 0
    stored: int = 0
    removed: int = 0
    cleared: int = 0
    orphans: int = 0
    skipped: int = 0
    evicted: int = 0
    bad_messages: int = 0
    bad_events: int = 0
    repeated: int = 0
    missed: int = 0
    replayed: int = 0
    resyncs: int = 0
    restarts: int = 0
    last_topic: str = ""
    block_size: int = 0
    blocks: int = 0
    queries: int = 0
    matches: int = 0


class KVFinding(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with an endpoint's KV events (`fail`: they do nothing), and what to do."""

    endpoint: str
    status: Literal["warn", "fail"]
    detail: str
    remedy: str


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an endpoint from elsewhere: its metrics page, and the models that it answers to."""

    block_size: int | None = None
    models: frozenset[str] | None = None
    requests: int | None = None
    """That it has served; None if nobody counted: then those count that were looked up."""


def diagnose(health: Mapping[str, KVHealth], expected: Mapping[str, Expected] | None = None) -> list[KVFinding]:
    """What `quire doctor` says of the endpoints (by key) whose events are subscribed to; nothing if all is well."""
    findings: list[KVFinding] = []
    for endpoint, seen in health.items():
        known = (expected or {}).get(endpoint, Expected())
        for status, detail, remedy in (*_no_events(seen, known), *_mismatches(seen, known), *_losses(seen)):
            findings.append(KVFinding(endpoint=endpoint, status=status, detail=detail, remedy=remedy))
    return findings


_Word = tuple[Literal["warn", "fail"], str, str]


def _no_events(seen: KVHealth, known: Expected) -> list[_Word]:
    if not seen.connected:
        return [
            (
                "fail",
                f"Nothing answers at {seen.address}.",
                "Start the engine with KV events enabled (--kv-events-config), and let the gateway reach that port.",
            )
        ]
    if seen.batches or seen.bad_messages:
        return []
    requests = seen.queries if known.requests is None else known.requests
    served = requests >= FEWEST_QUERIES
    though = f", though {requests} prompts came meanwhile." if served else " so far."
    return [
        (
            "fail" if served else "warn",
            f"No KV event has come from {seen.address}{though}",
            "Enable prefix caching and KV events (enable_kv_cache_events, publisher zmq) in the engine.",
        )
    ]


def _mismatches(seen: KVHealth, known: Expected) -> list[_Word]:
    found: list[_Word] = []
    _kind, _, rest = seen.last_topic.partition("@")
    model = rest.partition("@")[2]
    if model and known.models is not None and model not in known.models:
        found.append(
            (
                "warn",
                f"Its topic {seen.last_topic!r} names the model {model!r}, but it serves {_listed(known.models)}.",
                "quire matches all the same; routers that go by the topic do not. Set the topic to "
                "kv@HOST:PORT@SERVED-MODEL-NAME.",
            )
        )
    if seen.block_size and known.block_size and seen.block_size != known.block_size:
        found.append(
            (
                "warn",
                f"Its events have blocks of {seen.block_size} tokens, its metrics say {known.block_size}.",
                "Is another engine behind this address? Events and metrics should be of one.",
            )
        )
    if seen.queries >= FEWEST_QUERIES and seen.stored and not seen.matches:
        found.append(
            (
                "warn",
                f"It has told of {seen.stored} blocks, but none of {seen.queries} prompts began with one.",
                "Prompts that share no beginning do that; else the gateway's tokenizer or chat template is not the "
                "engine's.",
            )
        )
    return found


def _losses(seen: KVHealth) -> list[_Word]:
    found: list[_Word] = []
    if seen.bad_messages or seen.bad_events:
        found.append(
            (
                "warn",
                f"{seen.bad_messages} messages and {seen.bad_events} events made no sense.",
                "Its KV events are not of the format of vLLM's: look at the engine's version.",
            )
        )
    if seen.skipped and not seen.stored:
        found.append(
            (
                "fail",
                "All its blocks are of layers that see only part of the past.",
                "Precise prefix scores do not work for this model; use the approximate ones.",
            )
        )
    if seen.resyncs and seen.missed > seen.replayed:
        found.append(
            (
                "warn",
                f"{seen.missed - seen.replayed} batches were lost, and what was known given up {seen.resyncs} times.",
                "Give the engine a replay_endpoint, and the gateway its address.",
            )
        )
    if seen.orphans > ORPHANS_WORTH_A_WORD * max(1, seen.stored):
        found.append(
            (
                "warn",
                f"{seen.orphans} blocks follow on blocks that were stored before the gateway listened.",
                "Give the engine a replay_endpoint; else this passes as its cache turns over.",
            )
        )
    return found


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)[:4]) or "none"
