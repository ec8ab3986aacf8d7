"""Chat templates: a list of messages becomes the text that the model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quire.core.errors import BadValue, InvalidParameter, MissingFile, TemplateError
from quire.core.json_file import read_optional_json_object, read_text
from quire.text.render_process import RenderLimits, RenderProcess
from quire.text.tokenizer import read_named_tokens

# What a template calls by these names is given by the arguments of `render`, not by a caller's own variables.
RESERVED_VARIABLES = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message"))

_END_OF_MESSAGE = "QUIRE_END_OF_FINAL_MESSAGE "


class ChatTemplate:
    """A checkpoint's chat template, or several by name: `tool_use` is for requests with tools, `rag` with documents.

    Rendering follows the `apply_chat_template` of Hugging Face's tokenizers. It is bounded in time, memory and output
    by a process of its own (see `quire.text.sandbox`), which this object starts and, by `close` or when it is
    collected, ends. A rendering is some tenths of a millisecond, but up to `limits.max_seconds` when the template is
    hostile: an event loop should have it done in a thread. Threads may share one template.
    """

    def __init__(
        self, templates: Mapping[str, str], named_tokens: Mapping[str, str], limits: RenderLimits | None = None
    ) -> None:
        self._templates = dict(templates)
        self._named_tokens = dict(named_tokens)
        self._process = RenderProcess(self._templates, limits or RenderLimits())

    @classmethod
    def load(
        cls, directory: Path, override: Path | None = None, *, limits: RenderLimits | None = None
    ) -> ChatTemplate | None:
        """The template of a checkpoint directory, or the one in the file `override`; None when there is none.

        The places, the first that has one wins: `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`.
        Raises a `CheckpointError` when a file cannot be read. Compiling goes on in the background; an error in the
        template is told by `wait_compiled`, or else by the first `render`.
        """
        templates = _from_override(override) if override is not None else _find_templates(directory)
        return cls(templates, read_named_tokens(directory), limits) if templates else None

    @property
    def sources(self) -> Mapping[str, str]:
        """The templates by name, as Jinja source."""
        return self._templates

    def wait_compiled(self) -> None:
        """Raises `TemplateError` if a template is not valid Jinja."""
        self._process.wait_compiled()

    def close(self) -> None:
        self._process.close()

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: object,
    ) -> str:
        """The prompt's text. All arguments are JSON data; `kwargs` are variables for the template.

        * `add_generation_prompt` ends with the header of the assistant's next message.
        * `continue_final_message` ends within the last message, so that the model goes on with it.

        Raises `TemplateError` when the template refuses or goes over its bounds, `InvalidParameter` for arguments
        that do not go together.
        """
        chat = [_without_none(message) for message in messages]
        if not chat:
            raise InvalidParameter("messages is empty.", param="messages", remedy="Send at least one message.")
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidParameter(
                    "continue_final_message and add_generation_prompt are both set.",
                    param="continue_final_message",
                    remedy="Set add_generation_prompt to false to continue the last message.",
                )
            chat[-1] = _marked(chat[-1])
        variables: dict[str, object] = {"documents": None, **self._named_tokens, **kwargs}
        variables |= {
            "messages": chat,
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        name = self._choose(tools=bool(tools), documents=bool(kwargs.get("documents")))
        try:
            text = self._process.render(name, variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidParameter(
                f"The messages, or the template's variables, are not plain JSON: {error}.", param="messages"
            ) from None
        return _cut_at_mark(text) if continue_final_message else text

    def _choose(self, *, tools: bool, documents: bool) -> str:
        if tools and "tool_use" in self._templates:
            return "tool_use"
        if documents and "rag" in self._templates:
            return "rag"
        if "default" in self._templates:
            return "default"
        if len(self._templates) == 1:
            return next(iter(self._templates))
        raise TemplateError(
            f"The checkpoint has chat templates {', '.join(sorted(self._templates))}, but none for this request.",
            remedy="Give one with chat_template.",
        )


def _without_none(message: Mapping[str, object]) -> dict[str, object]:
    # The API writes what is absent as null, which many templates would print as "None".
    return {key: value for key, value in message.items() if value is not None}


def _marked(message: Mapping[str, object]) -> dict[str, object]:
    """The message with a mark after its text, to find where it ended in what the template makes of it."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _END_OF_MESSAGE}
    if isinstance(content, list):
        for i in range(len(content) - 1, -1, -1):
            part = content[i]
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                parts = list(content)
                parts[i] = {**part, "text": part["text"] + _END_OF_MESSAGE}
                return {**message, "content": parts}
    raise InvalidParameter(
        "continue_final_message is set, but the last message has no text.",
        param="continue_final_message",
        remedy="End with a message that has text content.",
    )


def _cut_at_mark(text: str) -> str:
    mark = _END_OF_MESSAGE.rstrip()
    end = text.rfind(mark)
    if end < 0:
        raise TemplateError(
            "The chat template leaves out the final message, so it cannot be continued.", param="continue_final_message"
        )
    # A template that trims messages took the mark's space along, and so would have trimmed the message's end.
    return text[:end] if text.startswith(_END_OF_MESSAGE, end) else text[:end].rstrip()


def _from_override(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise MissingFile(f"The chat template {path} is missing.", remedy="Name a file with a Jinja template.")
    return {"default": read_text(path)}


def _find_templates(directory: Path) -> dict[str, str]:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        found = {"default": read_text(jinja)}
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = read_text(path)
        return found
    for file in ("chat_template.json", "tokenizer_config.json"):
        path = directory / file
        value = read_optional_json_object(path).get("chat_template")
        if value is not None:
            return _named_templates(value, path)
    return {}


def _named_templates(value: object, path: Path) -> dict[str, str]:
    """One template as a string, or several as a list of `{"name", "template"}`, or as an object."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        entries = [(entry.get("name"), entry.get("template")) for entry in value if isinstance(entry, dict)]
    else:
        entries = list(value.items()) if isinstance(value, dict) else []
    named = {name: source for name, source in entries if isinstance(name, str) and isinstance(source, str)}
    if not named or len(named) != len(entries):
        raise BadValue(
            f"{path}: chat_template is neither a string nor a list of objects with name and template.",
            remedy="Mend the file, or give a template with chat_template.",
        )
    return named
