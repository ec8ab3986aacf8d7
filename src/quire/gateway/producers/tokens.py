"""`token-producer`: how many tokens a prompt has, and which, where something here can tokenise.

The number is estimated from bytes; how many bytes make a token is learnt from what answers report, by model. Where the
very tokens are wanted (to match engines' KV events) an endpoint is asked for them, with the model's own template: by
/tokenize, which quire and vLLM have (`--exact-tokens`), or by the render endpoint that parameters name, as in llm-d.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Mapping, Sequence
from typing import Annotated, ClassVar, Final

import aiohttp
import msgspec

from quire.gateway.endpoint import Endpoint
from quire.gateway.flow.units import parse_duration
from quire.gateway.plugin import Observer, Parameters, Producer, Services
from quire.gateway.request import Api, InferenceRequest, Outcome, plausible_prompt_tokens

BYTES_PER_TOKEN: Final = 4.0
MAX_MODELS: Final = 1000
FORGET: Final = 0.02
_PRIOR: Final = (1000 * BYTES_PER_TOKEN, 1000.0)
"""Bytes and tokens that the first answers have to outweigh: a short one is mostly the template."""
EXACT: Final = "exact_tokens"
HTTP: Final = "http"
"""Names under which the gateway shares that exact tokens are wanted, and its client session."""
TIMEOUT: Final = 5.0
MAX_ANSWER: Final = 16 * 1024 * 1024
_TOKENIZED: Final = ("prompt", "messages", "tools", "chat_template_kwargs", "add_generation_prompt")
"""Fields of a request that decide its tokens."""
_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


class RenderParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {
        "mmTimeout": "timeout holds for every prompt",
        "messagesRenderMode": "each API is rendered at its own path",
        "prefillOnly": "every prompt is rendered",
        "insecureSkipVerify": "certificates are always checked",
    }
    url: str = "http://localhost:8000"
    timeout: str = "5s"


class TokenParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {
        "backend": "vllm, where it is given, says by itself who tokenises",
        "estimate": "how many bytes make a token is learnt from the answers",
    }
    model_name: str = ""
    vllm: RenderParameters | None = None


class TokenProducer(Producer, Observer):
    def __init__(self, parameters: TokenParameters, services: Services) -> None:
        render = (
            parameters.vllm if parameters.vllm is not None else RenderParameters() if parameters.model_name else None
        )
        self._render = render
        self._shared = services.shared
        self._rng = services.rng
        seconds = TIMEOUT if self._render is None else parse_duration(self._render.timeout, "vllm.timeout")
        self._timeout = aiohttp.ClientTimeout(total=seconds)
        self._seen: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By model: bytes and tokens of prompts, of late."""

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Awaitable[None] | None:
        if request.token_ids is not None:
            return None
        if request.prompt_token_ids is not None:
            request.token_ids = request.prompt_token_ids
            request.prompt_tokens = len(request.prompt_token_ids)
            return None
        size, tokens = self._seen.get(request.target_model, _PRIOR)
        request.prompt_tokens = max(round(len(request.prompt) * tokens / size), 1) if request.prompt else 0
        if request.api not in (Api.CHAT, Api.COMPLETIONS, Api.MESSAGES) or not request.prompt:
            return None
        if self._render is not None:
            return self._ask(request, self._render.url.rstrip("/") + request.path + "/render", request.body)
        if self._shared.get(EXACT) and endpoints and request.api is not Api.MESSAGES:
            endpoint = self._rng.choice(endpoints)
            return self._ask(request, endpoint.url + "/tokenize", _tokenize_body(request))
        return None

    async def _ask(self, request: InferenceRequest, url: str, body: bytes) -> None:
        session: aiohttp.ClientSession = self._shared[HTTP]
        headers = {"content-type": "application/json"}
        if "authorization" in request.headers:
            headers["authorization"] = request.headers["authorization"]
        async with session.post(
            url, data=body, headers=headers, timeout=self._timeout, allow_redirects=False
        ) as answer:
            answer.raise_for_status()
            ids = token_ids_of(await _whole(answer))
        if ids:
            request.token_ids = ids
            request.prompt_tokens = len(ids)

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        if not outcome.ok or not outcome.prompt_tokens or not request.prompt or request.token_ids is not None:
            return
        size, tokens = self._seen.get(request.target_model, _PRIOR)
        self._seen[request.target_model] = (
            size * (1.0 - FORGET) + len(request.prompt),
            tokens * (1.0 - FORGET) + plausible_prompt_tokens(request, outcome.prompt_tokens),
        )
        self._seen.move_to_end(request.target_model)
        while len(self._seen) > MAX_MODELS:
            self._seen.popitem(last=False)


async def _whole(answer: aiohttp.ClientResponse) -> bytes:
    whole = bytearray()
    async for piece in answer.content.iter_any():
        whole += piece
        if len(whole) > MAX_ANSWER:
            raise ValueError(f"the tokens of a prompt came as more than {MAX_ANSWER} bytes")
    return bytes(whole)


def _tokenize_body(request: InferenceRequest) -> bytes:
    fields = _object.decode(request.body)
    kept = {name: fields[name] for name in _TOKENIZED if name in fields}
    return msgspec.json.encode({"model": msgspec.Raw(msgspec.json.encode(request.target_model)), **kept})


class _Rendered(msgspec.Struct):
    token_ids: list[_TokenId] | None = None
    prompt_token_ids: list[_TokenId] | None = None
    tokens: list[_TokenId] | None = None


_rendered = msgspec.json.Decoder(_Rendered | list[_Rendered])


def token_ids_of(answer: bytes) -> Sequence[int] | None:
    """Of a render endpoint's answer: one object, or a list of them, with `token_ids` or `prompt_token_ids`; of
    /tokenize, one with `tokens`. None where there are none; raises `msgspec.DecodeError` for anything else."""
    rendered: _Rendered | list[_Rendered] = _rendered.decode(answer)
    if isinstance(rendered, list):
        if len(rendered) != 1:
            return None
        rendered = rendered[0]
    return rendered.token_ids or rendered.prompt_token_ids or rendered.tokens
