"""Which fields of a manifest are set and have no use here, and why."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import msgspec


def warnings(part: msgspec.Struct, path: str) -> Iterator[str]:
    """One line for each field that is set without effect: `spec.template.volumes: not used by processes, because …`.

    An empty value (`route: {}`) asks for nothing.
    """
    for field, encoded, because in _fields(type(part)):
        value = getattr(part, field)
        if value is None or value in ({}, [], "", False):
            continue
        where = f"{path}.{encoded}"
        if because is not None:
            yield f"{where}: not used by provider processes, because {because}."
        elif isinstance(value, msgspec.Struct):
            yield from warnings(value, where)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, msgspec.Struct):
                    yield from warnings(item, f"{where}[{index}]")


@cache
def _fields(cls: type[msgspec.Struct]) -> tuple[tuple[str, str, str | None], ...]:
    """Each field with its name in the file, and why it is not used, if it is not."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple((field.name, field.encode_name, _reason(hints[field.name])) for field in msgspec.structs.fields(cls))


def _reason(hint: Any) -> str | None:
    for part in (hint, *get_args(hint)) if get_origin(hint) is not None else (hint,):
        for meta in getattr(part, "__metadata__", ()):
            if isinstance(meta, msgspec.Meta) and meta.extra is not None and "unused" in meta.extra:
                return str(meta.extra["unused"])
    return None
