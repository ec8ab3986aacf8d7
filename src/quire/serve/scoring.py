"""/score and /rerank: how well pairs of texts fit together.

A model that reads both texts at once (a cross-encoder) scores each pair; of one that embeds, it is the cosine of the
two embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import mul

from starlette.requests import Request
from starlette.responses import Response

from quire.core.errors import InvalidParameter, UnsupportedTask
from quire.core.pooling import PoolingParams, PoolingTask
from quire.serve.body import decode_body, is_given
from quire.serve.call import Call
from quire.serve.chat_messages import template_variables
from quire.serve.inbox import patience
from quire.serve.pooling import Size, check_not_empty, row, run_pooling
from quire.serve.service import Service, off_loop
from quire.text.pooling_prompt import Encoded, PoolingEncoder, Truncation
from quire.web.answers import json_response
from quire.wire.pooling import (
    PairFields,
    PoolingUsage,
    RerankDocument,
    RerankList,
    RerankRequest,
    RerankResult,
    Score,
    ScoreList,
    ScoreRequest,
)

SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


class Scoring:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def score(self, request: Request) -> Response:
        arrival = self._service.clock()
        body = await request.body()
        fields = decode_body(body, ScoreRequest)
        call = self._call(request, body, fields, "score", arrival)
        pairs = _Pairs(fields, *_sides(fields))
        scores, usage = await self._scores(request, call, pairs)
        data = [Score(index=index, score=score) for index, score in enumerate(scores)]
        answer = ScoreList(id=call.id, created=call.created, model=call.model, data=data, usage=usage)
        return json_response(answer, headers=call.headers)

    async def rerank(self, request: Request) -> Response:
        arrival = self._service.clock()
        body = await request.body()
        fields = decode_body(body, RerankRequest)
        call = self._call(request, body, fields, "rerank", arrival)
        check_not_empty("documents", fields.documents)
        for name, value in (("top_n", fields.top_n), ("max_tokens_per_doc", fields.max_tokens_per_doc)):
            if value is not None and value < (0 if name == "top_n" else 1):
                raise InvalidParameter(f"{name} is {value}.", param=name, remedy="It must be positive.")
        texts = [each if isinstance(each, str) else each.text for each in fields.documents]
        pairs = _Pairs(fields, ("query", [fields.query]), ("documents", texts), fields.max_tokens_per_doc)
        scores, usage = await self._scores(request, call, pairs)
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: fields.top_n or None]
        results = [RerankResult(index=index, relevance_score=scores[index]) for index in best]
        if fields.return_documents is not False:
            for result in results:
                result.document = RerankDocument(text=texts[result.index])
        return json_response(
            RerankList(id=call.id, model=call.model, results=results, usage=usage), headers=call.headers
        )

    def _call(self, request: Request, body: bytes, fields: PairFields, prefix: str, arrival: float) -> Call:
        model = self._service.check_model(fields.model)
        return Call.of(request, body, fields, prefix=prefix, model=model, arrival_time=arrival)

    async def _scores(self, request: Request, call: Call, pairs: _Pairs) -> tuple[list[float], PoolingUsage]:
        service = self._service
        with service.running_call():
            encoder = await service.pooler(patience(call.deadlines))
            params = _params(pairs.fields, encoder)
            joined = params.task is PoolingTask.SCORE
            truncation = encoder.truncation(pairs.fields.truncate_prompt_tokens, pairs.fields.truncation_side)
            encode = pairs.encode_joined if joined else pairs.encode_apart
            results = await run_pooling(
                request,
                service,
                call,
                params,
                lambda: encode(encoder, truncation),
                info=encoder.pooling,
                size=pairs.size(joined=joined, renders=joined and encoder.renders_pairs),
                param=pairs.second[0],
            )
            if joined:
                return [row(pooled)[0] for pooled in results.pooled], results.usage
            size = sum(pooled.num_columns for pooled in results.pooled)
            return await off_loop(size, lambda: pairs.cosines([row(each) for each in results.pooled])), results.usage


class _Pairs:
    """Two sides, each the name of its parameter and its texts. The first has one text, or as many as the second."""

    def __init__(
        self,
        fields: PairFields,
        first: tuple[str, list[str]],
        second: tuple[str, list[str]],
        max_tokens_per_document: int | None = None,
    ) -> None:
        self.fields = fields
        self.first = first
        self.second = second
        self._max_tokens = max_tokens_per_document

    def size(self, *, joined: bool, renders: bool) -> Size:
        """Of all prompts; joined, the first side's text is in each of them."""
        num_first, num_second = len(self.first[1]), len(self.second[1])
        times = num_second // num_first if joined else 1
        # What a template is given besides goes into every prompt, too.
        beside = len(self.fields.instruction or "") + len(bytes(self.fields.chat_template_kwargs)) if joined else 0
        return Size(
            num_prompts=num_second if joined else num_first + num_second,
            num_characters=times * sum(map(len, self.first[1])) + sum(map(len, self.second[1])) + num_second * beside,
            renders=renders,
        )

    def encode_joined(self, encoder: PoolingEncoder, truncation: Truncation) -> Iterator[Encoded]:
        variables = template_variables(self.fields.chat_template_kwargs)
        for index, document in enumerate(self.second[1]):
            yield encoder.encode_pair(
                self.first[1][index % len(self.first[1])],
                self._cut(encoder, document),
                truncation,
                f"{self.second[0]}[{index}] with its query",
                instruction=self.fields.instruction,
                template_kwargs=variables,
            )

    def encode_apart(self, encoder: PoolingEncoder, truncation: Truncation) -> Iterator[Encoded]:
        for index, text in enumerate(self.first[1]):
            yield encoder.encode(text, truncation, f"{self.first[0]}[{index}]")
        for index, text in enumerate(self.second[1]):
            yield encoder.encode(self._cut(encoder, text), truncation, f"{self.second[0]}[{index}]")

    def cosines(self, vectors: Sequence[Sequence[float]]) -> list[float]:
        """Of the vectors that `encode_apart`'s prompts have become."""
        count = len(self.first[1])
        return [_cosine(vectors[index % count], vector) for index, vector in enumerate(vectors[count:])]

    def _cut(self, encoder: PoolingEncoder, document: str) -> str:
        return document if self._max_tokens is None else encoder.head(document, self._max_tokens)


def _params(fields: PairFields, encoder: PoolingEncoder) -> PoolingParams:
    tasks = encoder.pooling.tasks
    if PoolingTask.SCORE in tasks:
        return PoolingParams(task=PoolingTask.SCORE, activation=fields.use_activation)
    if PoolingTask.EMBED not in tasks:
        raise UnsupportedTask(
            f"This model does not score pairs; its tasks are: {', '.join(tasks)}.",
            remedy="Use /classify or /pooling, or serve a reranker or an embedding model.",
        )
    given = {
        "instruction": fields.instruction is not None,
        "chat_template_kwargs": is_given(fields.chat_template_kwargs),
        "use_activation": fields.use_activation is not None,
    }
    for name in (name for name, is_set in given.items() if is_set):
        raise InvalidParameter(f"{name} is for models that score pairs themselves.", param=name)
    return PoolingParams(task=PoolingTask.EMBED)


def _sides(fields: ScoreRequest) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    given = {name for pair in SIDES for name in pair if getattr(fields, name) is not None}
    names = next((pair for pair in SIDES if given == set(pair)), None)
    if names is None:
        choices = "; ".join(" and ".join(pair) for pair in SIDES)
        raise InvalidParameter(
            f"The texts to score are given as {', '.join(sorted(given)) or 'nothing'}.",
            param="text_1",
            remedy=f"Send one of these pairs: {choices}.",
        )
    first, second = [(name, _listed(getattr(fields, name))) for name in names]
    for name, texts in (first, second):
        check_not_empty(name, texts)
    if len(first[1]) not in (1, len(second[1])):
        raise InvalidParameter(
            f"{first[0]} has {len(first[1])} texts and {second[0]} has {len(second[1])}.",
            param=first[0],
            remedy="Send one, or as many as there are on the other side.",
        )
    return first, second


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """0 where a vector has no direction."""
    length = math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return sum(map(mul, a, b)) / length if length else 0.0
