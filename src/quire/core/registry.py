"""A named set of things of one kind, filled by us and, through an entry-point group, by others."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from quire.core.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to values. `group` is the entry-point group that outsiders register under (read on first miss)."""

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self._group = group
        self._items: dict[str, T] = {}

    def add(self, name: str, value: T) -> T:
        if name in self._items:
            raise ConfigError(f"{self.kind} {name!r} is registered twice.", remedy="Choose another name.")
        self._items[name] = value
        return value

    def get(self, name: str) -> T | None:
        if name not in self._items and self._group is not None:
            for entry in entry_points(group=self._group, name=name):
                self._items[name] = entry.load()
        return self._items.get(name)

    def names(self) -> list[str]:
        return sorted(self._items)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return iter(sorted(self._items.items()))

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None
