"""What of a message's head goes on to the other side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from quire.gateway.endpoint import Endpoint

RawHeaders = Iterable[tuple[bytes, bytes]]

SERVED_HEADER: Final = b"x-gateway-destination-endpoint-served"
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110, 7.6.1; and whatever else `connection` names."""
_OURS_TO_SAY: Final = frozenset(
    {
        b"x-prefiller-host-port",
        b"x-encoder-hosts-ports",
        b"x-data-parallel-host-port",
        b"x-kv-cache-source-host-port",
    }
)
"""Tell an engine whom to connect to. A client that could set them could make it connect anywhere."""
_NOT_SENT_ON: Final = _HOP_BY_HOP | _OURS_TO_SAY | {b"host", b"content-length", b"expect", b"x-request-id"}
_NOT_ANSWERED: Final = _HOP_BY_HOP | {b"date", b"content-length", b"x-request-id", SERVED_HEADER}
"""The server in front says the date and the length itself."""


def named_by_connection(headers: RawHeaders) -> frozenset[bytes]:
    """What this message's `connection` headers name, besides what is always hop by hop."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    return frozenset(named)


def request_head(
    line: tuple[str, bytes], headers: RawHeaders, endpoint: Endpoint, own: Mapping[str, str], body_bytes: int
) -> bytes:
    """The head that goes to the endpoint. `line` is method and target; `own` headers stand in for the client's of the
    same name."""
    method, target = line
    headers = tuple(headers)
    replaced = frozenset(name.lower().encode() for name in own)
    left_out = _NOT_SENT_ON | replaced | named_by_connection(headers)
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method.encode(), target, endpoint.address.encode())]
    lines += [b"%b: %b\r\n" % header for header in headers if header[0] not in left_out]
    lines += [f"{name}: {value}\r\n".encode() for name, value in own.items()]
    if body_bytes or method not in ("GET", "HEAD", "OPTIONS"):
        lines.append(b"content-length: %d\r\n" % body_bytes)
    lines.append(b"\r\n")
    return b"".join(lines)


def answer_headers(headers: RawHeaders, endpoint: Endpoint, request_id: str) -> list[tuple[bytes, bytes]]:
    headers = tuple(headers)
    left_out = _NOT_ANSWERED | named_by_connection(headers)
    kept = [header for header in headers if header[0] not in left_out]
    kept.append((b"x-request-id", request_id.encode()))
    kept.append((SERVED_HEADER, endpoint.address.encode()))
    return kept
