"""`token-producer`: how many tokens a prompt has, and which, where something here can tokenise.

Without a tokenizer the number is estimated from bytes; how many bytes make a token is learnt from what answers report,
by model. With one (quire's `--tokenizer DIRECTORY`) prompts become the very tokens that an engine computes: chats are
rendered by the model's own template first. vLLM's render endpoint is asked where the parameters name it, as llm-d does.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import aiohttp
import msgspec

from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Observer, Parameters, Producer, Services
from quire.gateway.request import Api, InferenceRequest, Outcome

BYTES_PER_TOKEN: Final = 4.0
MAX_MODELS: Final = 1000
FORGET: Final = 0.02
INLINE_BYTES: Final = 16 * 1024
"""Prompts up to this size are tokenised at once (a millisecond); longer ones on a thread."""
TOKENIZE: Final = "tokenize"
HTTP: Final = "http"
"""Names under which the gateway shares a tokeniser (`Tokenize`) and its client session."""

Tokenize = Callable[[InferenceRequest], Sequence[int] | None]
"""The tokens of a prompt; None where it cannot tell. Runs on a thread too."""


class RenderParameters(Parameters, frozen=True):
    url: str = "http://localhost:8000"
    timeout: str = "5s"
    mm_timeout: str = "30s"
    messages_render_mode: str = "auto"
    prefill_only: bool = False
    insecure_skip_verify: bool = False


class TokenParameters(Parameters, frozen=True):
    model_name: str = ""
    vllm: RenderParameters | None = None
    estimate: Mapping[str, Any] = {}


class TokenProducer(Producer, Observer):
    def __init__(self, parameters: TokenParameters, services: Services) -> None:
        render = (
            parameters.vllm if parameters.vllm is not None else RenderParameters() if parameters.model_name else None
        )
        self._render = render
        self._shared = services.shared
        self._ratios: OrderedDict[str, float] = OrderedDict()

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Awaitable[None] | None:
        if request.token_ids is not None:
            return None
        if request.prompt_token_ids is not None:
            request.token_ids = request.prompt_token_ids
            request.prompt_tokens = len(request.prompt_token_ids)
            return None
        ratio = self._ratios.get(request.target_model, BYTES_PER_TOKEN)
        request.prompt_tokens = max(round(len(request.prompt) / ratio), 1) if request.prompt else 0
        tokenize: Tokenize | None = self._shared.get(TOKENIZE)
        if tokenize is not None and request.api in (Api.CHAT, Api.COMPLETIONS):
            if len(request.prompt) <= INLINE_BYTES:
                _take(request, tokenize(request))
                return None
            return self._on_thread(request, tokenize)
        if self._render is not None and request.api in (Api.CHAT, Api.COMPLETIONS, Api.MESSAGES):
            return self._ask(request, self._render)
        return None

    async def _on_thread(self, request: InferenceRequest, tokenize: Tokenize) -> None:
        _take(request, await asyncio.to_thread(tokenize, request))

    async def _ask(self, request: InferenceRequest, render: RenderParameters) -> None:
        session: aiohttp.ClientSession = self._shared[HTTP]
        timeout = aiohttp.ClientTimeout(total=_seconds(render.timeout))
        headers = {"content-type": "application/json"}
        url = render.url.rstrip("/") + request.path + "/render"
        async with session.post(url, data=request.body, headers=headers, timeout=timeout) as answer:
            answer.raise_for_status()
            _take(request, token_ids_of(msgspec.json.decode(await answer.content.read(16 * 1024 * 1024))))

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        if not outcome.ok or not outcome.prompt_tokens or not request.prompt or request.token_ids is not None:
            return
        seen = len(request.prompt) / outcome.prompt_tokens
        ratio = self._ratios.get(request.target_model, BYTES_PER_TOKEN)
        self._ratios[request.target_model] = ratio + FORGET * (min(max(seen, 0.25), 64.0) - ratio)
        self._ratios.move_to_end(request.target_model)
        while len(self._ratios) > MAX_MODELS:
            self._ratios.popitem(last=False)


def _take(request: InferenceRequest, ids: Sequence[int] | None) -> None:
    if ids:
        request.token_ids = ids
        request.prompt_tokens = len(ids)


def token_ids_of(rendered: Any) -> Sequence[int] | None:
    """Of a render endpoint's answer: one object, or a list of them, with `token_ids` or `prompt_token_ids`."""
    first = rendered[0] if isinstance(rendered, list) and rendered else rendered
    if not isinstance(first, dict):
        return None
    ids = first.get("token_ids", first.get("prompt_token_ids"))
    whole = isinstance(ids, list) and all(isinstance(one, int) and 0 <= one < 2**32 for one in ids)
    return ids if whole else None


def _seconds(text: str) -> float:
    """Of a duration such as 5s or 500ms."""
    number = text.removesuffix("ms").removesuffix("s")
    return float(number) / (1000.0 if text.endswith("ms") else 1.0)
