"""What values settings may have, beyond their types: one table per configuration class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.config.engine import EngineConfig
from quire.config.fleet import FleetConfig
from quire.config.gateway import GatewayConfig
from quire.config.kv_events import read_kv_events
from quire.config.server import ListenConfig, ServerConfig
from quire.core.errors import ConfigError
from quire.core.sampling import MAX_LOGPROBS


@dataclass(frozen=True, slots=True)
class Rule:
    """A predicate over one value that is not None, and its words ("It must be …")."""

    holds: Callable[[Any], bool]
    words: str


def between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"from {low:,} to {high:,}")


def _power_of_two(low: int, high: int) -> Rule:
    return Rule(lambda value: low <= value <= high and value & (value - 1) == 0, f"a power of two from {low} to {high}")


def _above(low: float, high: float) -> Rule:
    return Rule(lambda value: low < value <= high, f"above {low:g} and at most {high:,g}")


_SECONDS = _above(0.0, 86_400.0)
_NAME = Rule(lambda value: bool(value.strip()), "non-empty")
_MAX_TOKENS = 2**31 - 1

_ENGINE: Mapping[str, Rule] = {
    "model": _NAME,
    "revision": _NAME,
    "hf_token": _NAME,
    "download_dir": _NAME,
    "tokenizer": _NAME,
    "chat_template": _NAME,
    "classifier_tokens": _NAME,
    "packed_weights_cache": _NAME,
    "packed_weights_cache_size": _above(0.0, 1_048_576.0),
    "device": Rule(
        lambda value: re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d{1,3})?", value) is not None,
        "auto, cpu, cuda, cuda:N or xpu",
    ),
    "max_model_len": between(1, _MAX_TOKENS),
    "block_size": _power_of_two(8, 256),
    "kv_cache_memory": _above(0.0, 1_048_576.0),
    "memory_utilization": _above(0.0, 1.0),
    "swap_space": between(0.0, 1_048_576.0),
    "max_num_seqs": between(1, 65_536),
    "max_num_batched_tokens": between(1, 1_048_576),
    "max_num_queued_reqs": between(1, 1_048_576),
    "max_num_queued_tokens": between(1, _MAX_TOKENS),
    "max_logprobs": between(0, MAX_LOGPROBS),
    "threads": between(1, 1024),
    "seed": between(-(2**63), 2**63 - 1),
}

_LISTEN: Mapping[str, Rule] = {
    "host": _NAME,
    "port": between(0, 65_535),
    # An empty key would guard nothing while looking as if it did.
    "api_key": _NAME,
    "ssl_certfile": _NAME,
    "ssl_keyfile": _NAME,
    "max_body_bytes": between(1024, 2**31 - 1),
    "max_connections": between(1, 1_048_576),
    "request_read_timeout": _SECONDS,
    "shutdown_timeout": between(0.0, 86_400.0),
    "log_level": Rule(lambda value: value in ("debug", "info", "warning", "error"), "debug, info, warning or error"),
}

_SERVER: Mapping[str, Rule] = {
    **_LISTEN,
    "served_model_name": _NAME,
    "heartbeat_timeout": _SECONDS,
    "max_engine_restarts": between(0, 1_048_576),
}

_GATEWAY: Mapping[str, Rule] = {
    **_LISTEN,
    "endpoints": _NAME,
    "endpoints_file": _NAME,
    "endpoints_dns": _NAME,
    "policy": _NAME,
    "scrape_interval": _SECONDS,
    "health_interval": _SECONDS,
    "connect_timeout": _SECONDS,
    "first_byte_timeout": _SECONDS,
    "idle_timeout": _SECONDS,
    "max_retries": between(0, 100),
    "extproc_port": between(0, 65_535),
    "extproc_max_streams": between(1, 1_048_576),
    "hedge_delay": _SECONDS,
    "explain_requests": between(0, 1_048_576),
}

_FLEET: Mapping[str, Rule] = {
    "state_dir": _NAME,
    "provider": _NAME,
    "pvc_dir": _NAME,
    "host": _NAME,
    "port": between(0, 65_535),
}

_RULES: Sequence[tuple[type[object], Mapping[str, Rule]]] = (
    (EngineConfig, _ENGINE),
    (ServerConfig, _SERVER),
    (GatewayConfig, _GATEWAY),
    (FleetConfig, _FLEET),
)


def validate(config: object, shown: Mapping[str, str] | None = None) -> None:
    """Raise `ConfigError` for the first setting with a value outside its range, or at odds with another one.

    `shown` maps a field to the words an error names it by (`--port`, `QUIRE_PORT`); its own name otherwise.
    """
    names = shown or {}
    rules = next((rules for kind, rules in _RULES if isinstance(config, kind)), None)
    for field, rule in (rules or {}).items():
        value = getattr(config, field)
        if value is not None and not rule.holds(value):
            raise ConfigError(
                f"{names.get(field, field)} is {value!r}.", param=field, remedy=f"It must be {rule.words}."
            )
    if isinstance(config, EngineConfig):
        read_kv_events(config.kv_events_config)
    if isinstance(config, EngineConfig) and config.preemption == "swap" and config.swap_space == 0:
        raise ConfigError(
            f"{names.get('preemption', 'preemption')} is 'swap', but swap_space is 0.",
            param="preemption",
            remedy="Give swap_space some GiB, or choose 'recompute'.",
        )
    if isinstance(config, ListenConfig) and (config.ssl_certfile is None) != (config.ssl_keyfile is None):
        there, missing = (
            ("ssl_keyfile", "ssl_certfile") if config.ssl_certfile is None else ("ssl_certfile", "ssl_keyfile")
        )
        raise ConfigError(
            f"{names.get(there, there)} is set, but {missing} is not.",
            param=missing,
            remedy="TLS needs both, the certificate chain and its private key.",
        )
