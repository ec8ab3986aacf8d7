"""Flags made from the fields of the configuration dataclasses, and the way back.

A field is the single source of its flag: the name, the type, the default, and, as help, the docstring under it. What
the parser hands to a command is a mapping of those flags that were given, as text; `quire.config.resolve` converts it,
so that a flag, a YAML key and a variable are read and refused in the same words.
"""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cyclopts import Parameter

from quire.config.engine import EngineConfig
from quire.config.fleet import FleetConfig
from quire.config.gateway import GatewayConfig
from quire.config.resolve import Resolved, flag_name, read_file, resolve
from quire.config.server import ServerConfig

T = TypeVar("T")

ARGUMENTS = frozenset({"model"})  # an argument of its own in every command, not one flag among many


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The docstring under each field of a dataclass and of what it inherits from, from their source."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: type[Any]) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (arm for arm in get_args(hint) if arm is not type(None))
    return hint


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + "|".join(get_args(hint)) + "}"
    return {int: "INT", float: "FLOAT", str: "TEXT"}[hint]


def flags_of(cls: type[Any], group: str, without: frozenset[str] = ARGUMENTS) -> Any:
    """A type for a command's parameter which the parser spreads into one flag per field of `cls`."""
    docs = field_docs(cls)
    hints = get_type_hints(cls)
    annotations: dict[str, Any] = {}
    for field in fields(cls):
        if field.name in without:
            continue
        plain = _without_none(hints[field.name])
        words = docs[field.name]
        if field.default is not None:
            words += f" [default: {str(field.default).lower() if plain is bool else field.default}]"
        flag = flag_name(field.name)
        if plain is bool:
            negative = "--no-" + flag.removeprefix("--")
            annotations[field.name] = Annotated[bool, Parameter(name=flag, negative=negative, help=words, group=group)]
        else:
            parameter = Parameter(
                name=flag, help=words, group=group, metavar=_metavar(plain), allow_leading_hyphen=True
            )
            annotations[field.name] = Annotated[str, parameter]
    typed_dict: Any = TypedDict  # its fields are known only here, which the type checker does not follow
    spread = typed_dict(f"{cls.__name__}Flags", annotations, total=False)
    return Annotated[spread | None, Parameter(name="*")]


if TYPE_CHECKING:
    EngineFlags = Mapping[str, object] | None
    OwnEngineFlags = Mapping[str, object] | None
    KernelFlags = Mapping[str, object] | None
    ServerFlags = Mapping[str, object] | None
    FleetFlags = Mapping[str, object] | None
    ApplyFlags = Mapping[str, object] | None
    StateDirFlag = Mapping[str, object] | None
    GatewayFlags = Mapping[str, object] | None
else:
    EngineFlags = flags_of(EngineConfig, "Engine")
    # For commands whose --seed is their one request's, which the engine's would only stand in for.
    OwnEngineFlags = flags_of(EngineConfig, "Engine", ARGUMENTS | {"seed"})
    KernelFlags = flags_of(
        EngineConfig, "Engine", frozenset(field.name for field in fields(EngineConfig)) - {"device", "isa"}
    )
    ServerFlags = flags_of(ServerConfig, "Server")
    FleetFlags = flags_of(FleetConfig, "Fleet")
    ApplyFlags = flags_of(FleetConfig, "Fleet", frozenset({"host", "port", "provider"}))
    StateDirFlag = flags_of(FleetConfig, "Fleet", frozenset({"host", "port", "provider", "pvc_dir"}))
    GatewayFlags = flags_of(GatewayConfig, "Gateway")

ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="A YAML file with settings by these names, with underscores.")
]


def settings(
    cls: type[T],
    flags: Mapping[str, object] | None,
    *,
    config: Path | None,
    model: str | None = None,
) -> Resolved[T]:
    """The configuration of `cls` from a command's flags, its `--config` file and the process's environment."""
    given = dict(flags or {})
    if model is not None:
        given["model"] = model
    file = read_file(config) if config is not None else None
    return resolve(cls, flags=given, file=file, environ=os.environ, file_name=str(config))


def as_arguments(flags: Mapping[str, object] | None) -> list[str]:
    """The command line that gives these flags, for handing them on to another command."""
    arguments = []
    for name, value in (flags or {}).items():
        flag = flag_name(name)
        if isinstance(value, bool):
            arguments.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            arguments.append(f"{flag}={value}")
    return arguments
