"""What pooling models read: texts, token ids, conversations and pairs, as token ids that fit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quire.core.errors import BadValue, InvalidParameter, PromptTooLong, UnsupportedTask
from quire.core.json_file import read_optional_json_object
from quire.core.model_info import ModelInfo
from quire.core.pooling import PoolingInfo, PoolingParams, check_pooling
from quire.text.prompt import PromptEncoder, check_characters, check_ids
from quire.text.tokenizer import CHARACTERS_PER_TOKEN, Side

MAX_CUTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPrompts:
    """Texts that a checkpoint wants before what is embedded, by name; `default` is the name of the one that goes there
    unasked."""

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None

    def get(self, name: str | None) -> str:
        """Raises `InvalidParameter` for a name that there is not."""
        name = self.default if name is None else name
        if name is None:
            return ""
        if name not in self.texts:
            known = ", ".join(sorted(self.texts)) or "none"
            raise InvalidParameter(
                f"The checkpoint has no prompt named {name[:80]!r}.", param="prompt_name", remedy=f"It has: {known}."
            )
        return self.texts[name]


def named_prompts(directory: Path) -> NamedPrompts:
    """Those of config_sentence_transformers.json; none where there is no such file. Raises `BadValue`."""
    path = directory / "config_sentence_transformers.json"
    config = read_optional_json_object(path)
    texts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise BadValue(f"{path}: prompts is not an object of texts.", remedy="Mend the file.")
    if default is not None and (not isinstance(default, str) or default not in texts):
        raise BadValue(f"{path}: default_prompt_name is {default!r}, and there is no such prompt.")
    return NamedPrompts(texts=texts, default=default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """What is done with an input that is too long: by default it is refused. `max_tokens` -1 is all that the model
    takes; `side` None is the tokenizer's own."""

    max_tokens: int | None = None
    side: Side | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """`token_type_ids` where they are not all zero: they tell the second text of a pair from the first."""

    token_ids: list[int]
    token_type_ids: list[int] | None = None


class PoolingEncoder:
    """Encodes for one pooling model; `prompts` is the encoder of its tokenizer and template. `by_template` joins pairs
    through the template though the model does not ask for it.

    Every method names its input in errors by `where`, whose first word is the parameter. Each raises `PromptTooLong`
    for an input that does not fit the model and is not to be truncated, and `InvalidParameter` for an empty one.
    """

    def __init__(self, prompts: PromptEncoder, named: NamedPrompts, *, by_template: bool = False) -> None:
        self._prompts = prompts
        self._named = named
        self._info = prompts.info
        self._pooling = _pooling_of(prompts.info)
        self.renders_pairs = by_template or self._pooling.pair == "template"

    @property
    def pooling(self) -> PoolingInfo:
        return self._pooling

    def check(self, params: PoolingParams) -> None:
        """Raises `UnsupportedTask` for a task that the model has not, `InvalidParameter` for what its task does not
        know."""
        check_pooling(params, self._pooling, num_tokens=0)

    def truncation(self, max_tokens: int | None, side: Side | None) -> Truncation:
        """Of a request; raises `InvalidParameter` for a length out of bounds."""
        if max_tokens is None:
            return Truncation(side=side)
        limit = self._info.max_model_len
        if max_tokens != -1 and not 1 <= max_tokens <= limit:
            raise InvalidParameter(
                f"truncate_prompt_tokens is {max_tokens}.",
                param="truncate_prompt_tokens",
                remedy=f"It must be between 1 and the model's context of {limit} tokens, or -1 for that.",
            )
        return Truncation(max_tokens=limit if max_tokens == -1 else max_tokens, side=side)

    def encode(
        self,
        text: str | Sequence[int],
        truncation: Truncation,
        where: str,
        *,
        add_special_tokens: bool = True,
        prompt_name: str | None = None,
    ) -> Encoded:
        """A text, after the checkpoint's prompt of that name, or token ids as they are."""
        if isinstance(text, str):
            text = self._named.get(prompt_name) + text
            return self._encode(text, None, truncation, where, add_special_tokens=add_special_tokens)
        check_ids(_param(where), text, self._info.vocab_size)
        ids = list(text)
        if truncation.max_tokens is not None and len(ids) > truncation.max_tokens:
            side = truncation.side or self._prompts.tokenizer.truncation_side
            ids = ids[-truncation.max_tokens :] if side == "left" else ids[: truncation.max_tokens]
        return self._checked(Encoded(ids), where)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        truncation: Truncation,
        *,
        template_kwargs: Mapping[str, object] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
    ) -> Encoded:
        """A conversation, through the chat template. Raises `TemplateError` as well."""
        text = self._prompts.chat_text(
            messages,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self._encode(text, None, truncation, "messages", add_special_tokens=add_special_tokens)

    def encode_pair(
        self,
        query: str,
        document: str,
        truncation: Truncation,
        where: str,
        *,
        instruction: str | None = None,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> Encoded:
        """Two texts as one prompt, joined in the model's way. Raises `TemplateError` as well.

        Truncation cuts the document only where a template joins them: what comes after it belongs to the prompt.
        """
        if self.renders_pairs:
            render = _PairTemplate(self._prompts, query, instruction, template_kwargs)
            return self._encode_templated(render, document, truncation, where)
        for name, value in (("instruction", instruction), ("chat_template_kwargs", template_kwargs)):
            if value is not None:
                raise InvalidParameter(
                    f"{name} is set, and this model joins pairs without a template.", param=name, remedy="Leave it out."
                )
        return self._encode(query, document, truncation, where)

    def head(self, text: str, max_tokens: int) -> str:
        """The start of a text of so many tokens; of more than fit the model, one that does not."""
        return self._prompts.tokenizer.head(text, min(max_tokens, self._info.max_model_len + 1))

    def _encode_templated(self, render: _PairTemplate, document: str, truncation: Truncation, where: str) -> Encoded:
        tokenizer, limit = self._prompts.tokenizer, truncation.max_tokens
        if limit is not None:
            document = tokenizer.head(document, limit)
        for _ in range(MAX_CUTS):
            text = render(document)
            if limit is None:
                check_characters(tokenizer, text, self._info.max_model_len, where)
            elif len(text) - len(document) > limit * max(CHARACTERS_PER_TOKEN, tokenizer.longest_token_chars):
                break
            ids = tokenizer.encode(text, add_special_tokens=False)
            if limit is None or len(ids) <= limit:
                return self._checked(Encoded(ids), where)
            # The last tokens of a document can join with what follows, so that one cut may be too short by a few.
            num_kept = len(tokenizer.encode(document, add_special_tokens=False)) - (len(ids) - limit)
            if num_kept <= 0:
                break
            document = tokenizer.head(document, num_kept)
        raise PromptTooLong(
            f"{where}: the template and the query fill the {limit} tokens that truncate_prompt_tokens leaves.",
            param="truncate_prompt_tokens",
            remedy="Raise it, or shorten the query.",
        )

    def _encode(
        self, text: str, pair: str | None, truncation: Truncation, where: str, *, add_special_tokens: bool = True
    ) -> Encoded:
        tokenizer = self._prompts.tokenizer
        if truncation.max_tokens is None:
            check_characters(tokenizer, text + (pair or ""), self._info.max_model_len, where)
        ids, type_ids = tokenizer.encode_to_fit(
            text,
            pair,
            max_tokens=truncation.max_tokens,
            side=truncation.side,
            add_special_tokens=add_special_tokens,
        )
        told_apart = any(type_ids) and self._info.num_token_types > 1  # tokenizers give types to all models
        return self._checked(Encoded(ids, type_ids if told_apart else None), where)

    def _checked(self, encoded: Encoded, where: str) -> Encoded:
        num_tokens, limit = len(encoded.token_ids), self._info.max_model_len
        if num_tokens == 0:
            raise InvalidParameter(f"{where} is empty.", param=_param(where), remedy="Send at least one token.")
        if num_tokens > limit:
            raise PromptTooLong(
                f"{where} has {num_tokens} tokens; the model's context is {limit} tokens.",
                param=_param(where),
                remedy="Shorten it, or set truncate_prompt_tokens to -1 to leave out what is too much.",
            )
        return encoded


@dataclass(frozen=True, slots=True)
class _PairTemplate:
    """The chat template, with messages of roles `query` and `document`, and `system` for an instruction."""

    prompts: PromptEncoder
    query: str
    instruction: str | None
    template_kwargs: Mapping[str, object] | None

    def __call__(self, document: str) -> str:
        """Raises `TemplateError`, and `UnsupportedTask` for a template that is not made for pairs."""
        messages = [{"role": "query", "content": self.query}, {"role": "document", "content": document}]
        if self.instruction is not None:
            messages.insert(0, {"role": "system", "content": self.instruction})
        text = self.prompts.chat_text(messages, template_kwargs=self.template_kwargs, add_generation_prompt=False)
        if self.query.strip() not in text or document.strip() not in text:
            raise UnsupportedTask(
                "The model's chat template leaves out messages of the roles query and document.",
                remedy="Start the server with --chat-template FILE, a template that has both.",
            )
        return text


def _pooling_of(info: ModelInfo) -> PoolingInfo:
    if info.pooling is None:
        raise UnsupportedTask(
            "This model generates text; it makes no embeddings, classes or scores.",
            remedy="Use /v1/chat/completions or /v1/completions; or serve a pooling model, or this one with --runner "
            "pooling.",
        )
    return info.pooling


def _param(where: str) -> str:
    return where.partition("[")[0]
