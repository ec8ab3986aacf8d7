"""Addresses that processes listen on, as others write them."""

from __future__ import annotations

_ANY = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read, not bound


def within_reach(host: str) -> str:
    """Where this machine reaches what listens on `host`, which may stand for all of its addresses."""
    return _ANY.get(host, host)


def url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
