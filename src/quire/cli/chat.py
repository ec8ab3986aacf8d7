"""`quire chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from quire.cli.flags import ConfigFile, OwnEngineFlags
from quire.cli.generation import Generation, GenerationFlags
from quire.cli.partner import Message, Partner, connect
from quire.core.errors import QuireError

if TYPE_CHECKING:
    from rich.console import Console

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit leaves."
ROOM_FOR_HISTORY = 200  # messages; the model's context is the tighter bound in practice

Url = Annotated[str | None, Parameter(help="Address of an OpenAI-compatible server; http://127.0.0.1:8000 is tried.")]
ApiKey = Annotated[str | None, Parameter(help="Key that the server asks for.", env_var="OPENAI_API_KEY")]


def chat(
    model: str | None = None,
    *,
    url: Url = None,
    api_key: ApiKey = None,
    system: str | None = None,
    config: ConfigFile = None,
    generation: GenerationFlags = None,
    engine: OwnEngineFlags = None,
) -> None:
    """Talk with a model, here in the terminal.

    A named model, or one set by an engine flag, is loaded in this process. Otherwise a server that runs is used, and
    the built-in model is loaded if none does.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL or quire-tiny; with --url, a name the server knows.
    system
        The system message to start with.
    """
    from rich.console import Console

    console = Console(highlight=False)
    with connect(
        model=model, url=url, api_key=api_key, generation=generation or Generation(), engine=engine, config=config
    ) as partner:
        if console.is_terminal:
            console.print(f"[bold]{partner.name}[/bold]  [dim]{HELP}[/dim]")
        Conversation(partner, console, system).run(read_lines(console))


def read_lines(console: Console) -> Iterator[str]:
    """Lines from the keyboard, with a prompt and editing, or from a pipe without."""
    if not (sys.stdin.isatty() and console.is_terminal):
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /exit leaves.[/dim]")


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, partner: Partner, console: Console, system: str | None) -> None:
        self._partner = partner
        self._console = console
        self._system = system
        self.messages: list[Message] = []

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line until there are no more, or one says /exit."""
        for line in lines:
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            if text.startswith("/"):
                self._command(*text[1:].split(None, 1))
            elif text:
                self._answer(text)

    def _command(self, name: str = "", argument: str = "") -> None:
        if name == "reset":
            self.messages.clear()
        elif name == "system" and argument:
            self._system = argument
            self.messages.clear()
        elif name == "system":
            self._say(self._system or "There is no system message.")
        elif name == "help":
            self._say(HELP)
        else:
            self._say(f"/{name} is not a command. {HELP}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, style="dim")

    def _answer(self, text: str) -> None:
        head: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        question = {"role": "user", "content": text}
        pieces = self._partner.chat([*head, *self.messages, question])
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                self._console.out(visible(piece), end="", highlight=False)
        except KeyboardInterrupt:
            self._console.out(" [stopped]", end="")
        except QuireError as error:
            # The conversation goes on without the question that could not be answered.
            self._console.out("")
            print(f"quire: {error}", file=sys.stderr)
            return
        self._console.out("")
        self.messages += [question, {"role": "assistant", "content": answer}]
        del self.messages[:-ROOM_FOR_HISTORY]


def visible(text: str) -> str:
    """Without control characters: what a model writes may not drive the reader's terminal."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())
