"""The process in which chat templates run. Not imported by others: `python -m quire.text.sandbox`.

A template comes with a checkpoint, so it may be hostile, and what it may compute can not be bounded from inside the
interpreter that runs it: `'a' * 10**10`, `10**(10**8)`, a list doubled forty times and then printed, a filter with a
huge width, are all single steps. So it runs here, in Jinja's sandbox, under limits that the operating system
enforces: address space (going over raises MemoryError), and processor time, by which an orphan ends too. The parent
keeps the wall clock, and kills this process when it is over.

Messages are JSON, each after its length in four bytes, over the socket that is this process's standard input. The
first one, `{"templates": {name: source}, "max_chars", "max_memory_bytes", "max_seconds"}`, is answered by `{}`; each
later one, `{"template": name, "variables": {...}}`, by `{"text": ...}`. What goes wrong is answered by
`{"error": message, "limit": whether a bound was reached}`.
"""

from __future__ import annotations

import json
import math
import resource
import socket
import struct
import time
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MESSAGE_CHARS = 2000
LENGTH = struct.Struct(">I")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it only has to be understood."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, so that assignments within stay within, as where the mark has an effect.
        return nodes.CallBlock(self.call_method("_pass_through"), [], [], body).set_lineno(line)

    def _pass_through(self, caller: Any) -> Any:
        return caller()


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time: it is what templates are written for


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja set up as chat templates expect it."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


class _TooMuchText(Exception):
    pass


class Sandbox:
    """The templates, compiled, and the limits that each rendering gets."""

    def __init__(self, *, templates: dict[str, str], max_chars: int, max_memory_bytes: int, max_seconds: float) -> None:
        self._max_chars = max_chars
        self._max_seconds = max_seconds
        resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._limit_processor_time()
        env = environment()
        self._templates = {name: env.from_string(source) for name, source in templates.items()}

    def render(self, template: str, variables: dict[str, object]) -> str:
        self._limit_processor_time()
        parts: list[str] = []
        num_chars = 0
        for part in self._templates[template].generate(variables):
            parts.append(part)
            num_chars += len(part)
            if num_chars > self._max_chars:
                raise _TooMuchText(f"It wrote more than {self._max_chars} characters.")
        return "".join(parts)

    def _limit_processor_time(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        spent = math.ceil(time.process_time() + self._max_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (spent, hard))


def _answer(sandbox: list[Sandbox], request: dict[str, Any]) -> dict[str, object]:
    try:
        if not sandbox:
            sandbox.append(Sandbox(**request))
            return {}
        return {"text": sandbox[0].render(**request)}
    except _TooMuchText as error:
        return {"error": str(error), "limit": True}
    except MemoryError:
        return {"error": "It used more memory than it may.", "limit": True}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"Line {error.lineno}: {error.message}"[:MAX_MESSAGE_CHARS], "limit": False}
    except jinja2.TemplateError as error:
        return {"error": (error.message or type(error).__name__)[:MAX_MESSAGE_CHARS], "limit": False}
    except Exception as error:  # whatever the template's own computing ran into
        return {"error": f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS], "limit": False}


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < size:
        chunk = connection.recv(min(size - len(chunks), 1 << 20))
        if not chunk:
            raise SystemExit(0)  # the parent is gone, or done with us
        chunks += chunk
    return bytes(chunks)


def main() -> None:
    connection = socket.socket(fileno=0)
    sandbox: list[Sandbox] = []
    while True:
        (size,) = LENGTH.unpack(_read_exactly(connection, LENGTH.size))
        answer = json.dumps(_answer(sandbox, json.loads(_read_exactly(connection, size)))).encode()
        connection.sendall(LENGTH.pack(len(answer)) + answer)


if __name__ == "__main__":
    main()
