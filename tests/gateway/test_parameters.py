"""No parameter of a plugin is ignored in silence: each is read somewhere, or its name is told when it is set."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin

import msgspec
import pytest

from quire.core.errors import ConfigError
from quire.gateway import build  # noqa: F401 - defines parameters, as do all that it imports
from quire.gateway.plugin import Parameters, read_parameters
from quire.gateway.plugins import stock


def kinds(base: type[Parameters] = Parameters) -> Iterator[type[Parameters]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("quire."):
            yield kind
            yield from kinds(kind)


ALL = sorted(kinds(), key=lambda kind: (kind.__module__, kind.__name__))


@cache
def attributes_read(module: str) -> frozenset[str]:
    """Also those that are named to `getattr`."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    if any(isinstance(node, ast.Name) and node.id == "getattr" for node in ast.walk(tree)):
        constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        names |= {value for value in constants if isinstance(value, str)}
    return frozenset(names)


def is_settled(field: msgspec.structs.FieldInfo) -> bool:
    """It can say one thing only; or it names a producer, which is made for it (`quire.gateway.build`)."""
    says_one_thing = get_origin(field.type) is Literal and len(get_args(field.type)) == 1
    return says_one_thing or field.name.endswith("_producer_name")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
def test_every_field_is_read_where_it_is_declared_or_where_plugins_are_made(kind: type[Parameters]) -> None:
    read = attributes_read(kind.__module__) | attributes_read(stock.__name__)
    fields = msgspec.structs.fields(kind)
    assert [field.name for field in fields if field.name not in read and not is_settled(field)] == []
    assert not {field.encode_name for field in fields} & set(kind.WITHOUT_EFFECT)


def test_there_are_parameters_to_look_at() -> None:
    assert len(ALL) > 30
    assert any(kind.WITHOUT_EFFECT for kind in ALL)


class Inner(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {"*": "nothing else is looked at"}
    depth: int = 1


class Outer(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {"older": "it went"}
    size: int = 0
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"size": 3, "inner": {"depth": 2}}, []),
        ({"older": None}, ["older"]),
        ({"older": 1, "inner": {"width": 1, "depth": 2, "older": 3}}, ["older", "inner.width", "inner.older"]),
        ({"inner": None}, []),
    ],
)
def test_what_has_no_effect_is_told_by_its_path(given: dict[str, Any], told: list[str]) -> None:
    notes: list[str] = []
    read = read_parameters(Outer, given, "p", notes.append)
    assert [note.split()[3] for note in notes] == told
    assert all(note.startswith("plugin p: parameter ") and " has no effect: " in note for note in notes)
    assert read.size == given.get("size", 0)


@pytest.mark.parametrize("given", [{"other": 1}, {"inner": 3}, {"inner": {"depth": "x"}}, {"size": {"older": 1}}])
def test_what_is_wrong_stays_wrong(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'p'"):
        read_parameters(Outer, given, "p", lambda _: None)
