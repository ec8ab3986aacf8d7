"""How an engine tells what is in its prefix cache: the settings of vLLM's `--kv-events-config`, under its names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from quire.core.errors import ConfigError

PARAM = "kv_events_config"
DEFAULT_PORT = 5557
ANYWHERE = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - compared, not listened on
"""Hosts by which a server listens on all of the machine's addresses."""
_EXAMPLE = '{"enable_kv_cache_events": true}'
_MOST = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """Off unless asked for: whoever may connect learns the tokens of every prompt."""

    enable_kv_cache_events: bool = False
    publisher: Literal["null", "zmq"] | None = None
    """zmq if events are enabled; null gives none."""
    endpoint: str | None = None
    """Where the events are published; port 5557 of the address that the server listens on, if not set. As in vLLM, one
    with a *, ::, ipc:// or inproc:// is bound, and to others the engine connects, unless `bind` says otherwise."""
    bind: bool | None = None
    """Whether `endpoint` is bound or connected to, where its looks do not tell. Not one of vLLM's settings."""
    replay_endpoint: str | None = None
    """Where lost events can be asked for; always bound. None: they cannot."""
    buffer_steps: int = 10_000
    """How many of the last batches can be asked for."""
    hwm: int = 100_000
    """Batches that may wait for one slow subscriber; more are lost to it."""
    max_queue_size: int = 100_000
    """Batches that may wait to be published; more are dropped, which leaves a gap in the sequence."""
    topic: str | None = None
    """kv@HOST:PORT@MODEL, with the server's address and the served model's name, if not set."""

    @property
    def enabled(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"

    @property
    def binds(self) -> bool:
        endpoint = self.endpoint or ""
        if self.bind is not None:
            return self.bind
        return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))

    def resolved(self, host: str, reachable: str, port: int, model_name: str) -> KVEventsConfig:
        """With an endpoint and a topic, for a server that listens at `host` and `port`, and that others know by the
        address `reachable`."""
        made = self
        if self.endpoint is None:
            there = "*" if host in ANYWHERE else _bracketed(host)
            made = replace(made, endpoint=f"tcp://{there}:{DEFAULT_PORT}", bind=True)
        if self.topic is None:
            made = replace(made, topic=f"kv@{_bracketed(reachable)}:{port}@{model_name}")
        return made

    def to_json(self) -> str:
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def read_kv_events(text: str | None) -> KVEventsConfig:
    """Of the setting's JSON object; None is off. Raises `ConfigError` that names the key and its value."""
    if text is None:
        return KVEventsConfig()
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{PARAM} is not JSON: {error}.", f"Give an object such as {_EXAMPLE}.") from None
    if not isinstance(given, dict):
        raise _wrong(f"{PARAM} is not an object but {_short(given)}.", f"Give one such as {_EXAMPLE}.")
    names = [field.name for field in fields(KVEventsConfig)]
    for name in given:
        if name not in names:
            raise _wrong(f"{PARAM} has no key {_short(name)}.", f"It has {', '.join(names)}.")
    _check(given)
    return KVEventsConfig(**given)


def _check(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if name == "enable_kv_cache_events":
            fits, wanted = isinstance(value, bool), "true or false"
        elif name == "bind":
            fits, wanted = value is None or isinstance(value, bool), "true, false or null"
        elif name == "publisher":
            fits, wanted = value in (None, "null", "zmq"), '"zmq" or "null"'
        elif name in ("buffer_steps", "hwm", "max_queue_size"):
            is_count = isinstance(value, int) and not isinstance(value, bool)
            fits, wanted = is_count and 1 <= value <= _MOST, f"a whole number from 1 to {_MOST:,}"  # type: ignore[operator]
        elif name == "topic":
            fits, wanted = value is None or (isinstance(value, str) and len(value) <= 1024), "text, or null"
        else:
            starts = ("tcp://", "ipc://", "inproc://")
            fits = value is None or (isinstance(value, str) and value.startswith(starts) and len(value) <= 1024)
            wanted = "an address such as tcp://*:5557, or null"
        if not fits:
            raise _wrong(f"{name} in {PARAM} is {_short(value)}.", f"It must be {wanted}.")


def _wrong(message: str, remedy: str) -> ConfigError:
    return ConfigError(message, param=PARAM, remedy=remedy)


def _short(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
