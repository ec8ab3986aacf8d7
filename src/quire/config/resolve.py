"""Reads settings from flags, a YAML file and `QUIRE_*` variables, in that order of precedence, once.

The fields of a configuration dataclass are the only list of settings there is: a field `max_model_len` is the flag
`--max-model-len`, the key `max_model_len` in the file and the variable `QUIRE_MAX_MODEL_LEN`. One file and one
environment may serve every command, so a name is unknown only if no configuration class has it. The result remembers
where each value came from, and so do the errors.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from quire.config.engine import EngineConfig
from quire.config.fleet import FleetConfig
from quire.config.gateway import GatewayConfig
from quire.config.server import ServerConfig
from quire.config.validate import validate
from quire.core.errors import ConfigError

T = TypeVar("T")

ENV_PREFIX = "QUIRE_"
MAX_FILE_BYTES = 256 * 1024
CONFIG_CLASSES: tuple[type[Any], ...] = (EngineConfig, ServerConfig, GatewayConfig, FleetConfig)

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved(Generic[T]):
    """A configuration, and for each of its fields `flag`, `file NAME`, `env QUIRE_X` or `default`."""

    value: T
    sources: Mapping[str, str]


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def env_name(field_name: str) -> str:
    return ENV_PREFIX + field_name.upper()


def resolve(
    cls: type[T],
    *,
    flags: Mapping[str, object],
    file: Mapping[str, object] | None,
    environ: Mapping[str, str],
    file_name: str = "the configuration file",
    known: Sequence[type[Any]] = CONFIG_CLASSES,
) -> Resolved[T]:
    """Make one `cls` of whatever was said about its fields.

    `flags` and `environ` may hold text, which is converted to the field's type; the file's values must have it already.
    `known` are the classes whose settings may stand in the file and the environment besides `cls`.
    Raises `ConfigError` naming the flag, the variable or the file's key, the value, and what it must be.
    """
    settings = {field.name for other in (cls, *known) for field in fields(other)}
    _refuse_unknown(flags, {field.name for field in fields(cls)}, flag_name, "on the command line")  # type: ignore[arg-type]
    _refuse_unknown(file or {}, settings, str, f"in {file_name}")
    variables = [name for name in environ if name.startswith(ENV_PREFIX)]
    _refuse_unknown(variables, {env_name(name) for name in settings}, str, "in the environment")

    hints = get_type_hints(cls)
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    shown: dict[str, str] = {}  # how an error names the setting: as its author wrote it
    for name in hints:
        variable = env_name(name)
        if name in flags:
            sources[name], shown[name], raw = "flag", flag_name(name), flags[name]
            textual = True
        elif file is not None and name in file:
            sources[name], shown[name], raw = f"file {file_name}", f"{name} in {file_name}", file[name]
            textual = False
        elif variable in environ:
            sources[name], shown[name], raw = f"env {variable}", variable, environ[variable]
            textual = True
        else:
            sources[name], shown[name] = "default", name
            continue
        values[name] = _convert(raw, hints[name], shown[name], textual=textual)
    value = cls(**values)
    validate(value, shown)
    return Resolved(value=value, sources=types.MappingProxyType(sources))


def read_file(path: Path) -> dict[str, object]:
    """The settings in a YAML file: one mapping of names to plain values, at most `MAX_FILE_BYTES` long."""
    import yaml  # not needed unless there is a file

    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read: {error.strerror}.", param="config", remedy="Name a readable YAML file."
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            f"--config {path} is larger than {MAX_FILE_BYTES} bytes.", param="config", remedy="Name a settings file."
        )
    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {path} is not YAML: {reason}", param="config", remedy="Mend the file.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"--config {path} holds {type(content).__name__}, not a mapping of names to values.",
            param="config",
            remedy="Write one 'name: value' per line, such as 'port: 8000'.",
        )
    return content


def _refuse_unknown(names: Any, allowed: set[str], show: Any, where: str) -> None:
    for name in names:
        if name not in allowed:
            close = difflib.get_close_matches(name.replace("-", "_"), allowed, n=1, cutoff=0.5)
            if not close:
                close = difflib.get_close_matches(name.lower(), allowed, n=1, cutoff=0.5)
            remedy = f"Did you mean {show(close[0])}?" if close else "`quire serve --help` lists all settings."
            raise ConfigError(f"{show(name)} {where} is not a setting.", param=name, remedy=remedy)


def _convert(raw: object, hint: Any, shown: str, *, textual: bool) -> object:
    """`raw` as a value of the type `hint`: str, int, float, bool, a Literal of strings, or one of these or None."""
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        (hint,) = (arm for arm in get_args(hint) if arm is not type(None))
        if raw is None or (textual and hint is not str and isinstance(raw, str) and raw.lower() == "none"):
            return None
    if textual and isinstance(raw, str):
        raw = _from_text(raw, hint)
    if get_origin(hint) is Literal:
        fits, wanted = raw in get_args(hint) and isinstance(raw, str), "one of " + ", ".join(get_args(hint))
    elif hint is bool:
        fits, wanted = isinstance(raw, bool), "true or false"
    elif hint is int:
        fits, wanted = isinstance(raw, int) and not isinstance(raw, bool), "an integer"
    elif hint is float:
        is_number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
        fits, wanted = is_number and math.isfinite(raw), "a number"  # type: ignore[arg-type]
        raw = float(raw) if fits else raw  # type: ignore[arg-type]
    else:
        assert hint is str, f"configuration fields of type {hint} are not supported"
        fits, wanted = isinstance(raw, str), "text (put it in quotes)" if not textual else "text"
    if not fits:
        if optional:
            wanted += ", or none" if textual and hint is not str else ", or null" if not textual else ""
        raise ConfigError(f"{shown} is {_short(raw)}.", param=shown, remedy=f"It must be {wanted}.")
    return raw


def _from_text(text: str, hint: Any) -> object:
    """What the text of a flag or a variable stands for; the text itself where it stands for nothing of that type."""
    if hint is bool:
        return True if text.lower() in _TRUE else False if text.lower() in _FALSE else text
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    return text


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
