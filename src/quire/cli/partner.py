"""Whom `quire chat` and `quire complete` talk with: a running server, or an engine in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quire.cli.flags import settings
from quire.cli.generation import Generation
from quire.config.engine import EngineConfig

if TYPE_CHECKING:
    import aiohttp

    from quire.engine.llm import LLM

DEFAULT_URL = "http://127.0.0.1:8000"
PROBE_SECONDS = 1.0  # for a server that nobody named
ANSWER_SECONDS = 30.0

Message = Mapping[str, Any]


class Partner(Protocol):
    """Answers come in pieces; closing the iterator cancels the rest. Both raise `QuireError`."""

    name: str

    def chat(self, messages: Sequence[Message]) -> Iterator[str]: ...

    def complete(self, prompt: str) -> Iterator[str]: ...


class LocalPartner:
    def __init__(self, llm: LLM, generation: Generation, name: str) -> None:
        self.name = name
        self._llm = llm
        # max_tokens: as far as the context goes, unless the caller says otherwise.
        self._params = generation.sampling_params(replace(llm.default_sampling_params(), max_tokens=None))

    def chat(self, messages: Sequence[Message]) -> Iterator[str]:
        return self._llm.stream_chat(messages, self._params)

    def complete(self, prompt: str) -> Iterator[str]:
        return self._llm.stream_complete(prompt, self._params)


class RemotePartner:
    def __init__(
        self, runner: asyncio.Runner, session: aiohttp.ClientSession, url: str, model: str, generation: Generation
    ) -> None:
        self.name = model
        self._runner = runner
        self._session = session
        self._url = url
        self._body = {"model": model, "stream": True, **generation.given()}

    def chat(self, messages: Sequence[Message]) -> Iterator[str]:
        return self._stream("/v1/chat/completions", {"messages": list(messages)})

    def complete(self, prompt: str) -> Iterator[str]:
        return self._stream("/v1/completions", {"prompt": prompt})

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[str]:
        from quire.cli.client import stream

        events = stream(self._session, self._url + path, {**self._body, **body})
        return _from_async(self._runner, (event.text async for event in events))


@contextmanager
def connect(
    *,
    model: str | None,
    url: str | None,
    api_key: str | None,
    generation: Generation,
    engine: Mapping[str, object] | None,
    config: Path | None,
) -> Iterator[Partner]:
    """The server at `url`; else, if no model is named, one that runs at the usual place; else an engine of our own."""
    resolved = settings(EngineConfig, engine, config=config, model=model if url is None else None)
    if url is None and (resolved.sources["model"] != "default" or engine):
        yield _local(resolved.value, generation)
        return

    from quire.cli.client import ServerFault, base_url, open_session

    with asyncio.Runner() as runner:
        address = base_url(url or DEFAULT_URL)
        session = runner.run(_call(open_session, api_key=api_key))
        try:
            try:
                names = runner.run(_models_within(session, address, PROBE_SECONDS if url is None else ANSWER_SECONDS))
            except ServerFault as error:
                if url is not None:
                    raise
                print(f"{error.message} Starting an engine here.", file=sys.stderr)
                yield _local(resolved.value, generation)
                return
            served = model or (names[0] if names else "")
            print(f"Using {served} at {address}.", file=sys.stderr)
            yield RemotePartner(runner, session, address, served, generation)
        finally:
            runner.run(session.close())


async def _models_within(session: aiohttp.ClientSession, address: str, seconds: float) -> list[str]:
    from quire.cli.client import ServerFault, list_models

    try:
        async with asyncio.timeout(seconds):
            return await list_models(session, address)
    except TimeoutError as error:
        raise ServerFault(f"{address} did not answer within {seconds:g} s.", remedy="Check the URL.") from error


def _local(config: EngineConfig, generation: Generation) -> Partner:
    from quire.engine.llm import LLM

    return LocalPartner(LLM(**asdict(config)), generation, config.model)


async def _call(function: Any, **arguments: Any) -> Any:
    return function(**arguments)


def _from_async(runner: asyncio.Runner, pieces: AsyncIterator[str]) -> Iterator[str]:
    """The pieces of an asynchronous stream, one at a time; an interrupt cancels the request."""

    async def following() -> str | None:
        return await anext(pieces, None)

    while (piece := runner.run(following())) is not None:
        yield piece
