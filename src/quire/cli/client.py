"""A client of OpenAI-compatible servers, for the commands that talk to one: models, and streamed completions."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from quire.core.errors import QuireError
from quire.web.bodies import read_body

MAX_ERROR_BYTES = 64 * 1024
MAX_LINE_BYTES = 4 * 1024 * 1024  # one event; a chunk with many logprobs is long


class ServerFault(QuireError):
    """A server could not be reached, refused a request, or broke off its answer."""

    code = "server_fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One event of a stream. `text` may be empty; `usage` comes with the last one."""

    text: str
    finish_reason: str | None
    usage: Usage | None


class _TokenDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _TokenDetails | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Message | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def base_url(url: str) -> str:
    """The server's address without a trailing `/v1`, as people write it either way."""
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/v1")


def open_session(
    *, api_key: str | None, connections: int = 0, read_timeout: float | None = None
) -> aiohttp.ClientSession:
    """`connections`: most at once, 0 for no limit. `read_timeout`: seconds of silence before a server is given up."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=read_timeout),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        read_bufsize=MAX_LINE_BYTES,
    )


async def list_models(session: aiohttp.ClientSession, url: str) -> list[str]:
    """Names of the models that the server at `url` serves. Raises `ServerFault`."""
    address = f"{base_url(url)}/v1/models"
    try:
        async with session.get(address) as response:
            await _refuse_bad_status(response)
            body = await read_body(response.content, MAX_LINE_BYTES)
        return [model.id for model in msgspec.json.decode(body, type=_Models).data]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _unreachable(address, error) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ServerFault(
            f"{address} does not answer as an OpenAI-compatible server does: {error}", remedy="Check the URL."
        ) from error


async def stream(session: aiohttp.ClientSession, address: str, body: Mapping[str, Any]) -> AsyncIterator[Delta]:
    """Post a request with `stream: true` and yield its events as they arrive. Raises `ServerFault`."""
    try:
        async with session.post(address, data=msgspec.json.encode(body), headers=_JSON) as response:
            await _refuse_bad_status(response)
            async for line in response.content:
                data = line.strip()
                if not data.startswith(b"data:"):
                    continue
                data = data[5:].strip()
                if data == b"[DONE]":
                    return
                yield _read_event(data)
            raise ServerFault("The server broke off its answer.", remedy="See the server's log.")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _unreachable(address, error) from error
    except ValueError as error:  # a line longer than the buffer
        raise ServerFault(f"{address} sent an event of more than {MAX_LINE_BYTES} bytes.") from error


_JSON = {"Content-Type": "application/json"}


def _read_event(data: bytes) -> Delta:
    try:
        event = msgspec.json.decode(data, type=_Event)
    except msgspec.MsgspecError as error:
        raise ServerFault(f"The server sent an event that is not a completion's: {error}") from error
    if event.error is not None:
        raise ServerFault(f"The server ended the stream with an error: {_message(event.error)}")
    text, finish_reason = "", None
    for choice in event.choices:
        text += choice.text or (choice.delta.content if choice.delta else None) or ""
        finish_reason = choice.finish_reason or finish_reason
    usage = None
    if event.usage is not None:
        details = event.usage.prompt_tokens_details
        usage = Usage(
            prompt_tokens=event.usage.prompt_tokens,
            completion_tokens=event.usage.completion_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )
    return Delta(text=text, finish_reason=finish_reason, usage=usage)


async def _refuse_bad_status(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    try:
        body = await read_body(response.content, MAX_ERROR_BYTES)
    except ValueError as error:
        raise ServerFault(f"The server answered {response.status}, and {error}.") from error
    try:
        decoded = msgspec.json.decode(body)
        message = _message(decoded.get("error", decoded) if isinstance(decoded, dict) else decoded)
    except msgspec.MsgspecError:
        message = body.decode(errors="replace")[:200]
    raise ServerFault(f"The server answered {response.status}: {message}")


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _unreachable(address: str, error: Exception) -> ServerFault:
    reason = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        reason = os.strerror(error.os_error.errno)
    return ServerFault(f"{address}: {reason}.", remedy="Is the server running? Check the URL.")
