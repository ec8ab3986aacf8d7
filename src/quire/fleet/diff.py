"""What a new manifest changes of what runs, and what that takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

from quire.fleet.spec import GATEWAY, RoleSpec, ServiceSpec

Effect = Literal["at once", "replaces the replicas", "restarts the gateway"]
_SECRET = re.compile(r"(--(?:api-key|hf-token))=.*", re.DOTALL)
_ADDRESS = frozenset({"host", "port"})
_LAUNCH = frozenset({"arguments", "environment", "cpu", "memory", *_ADDRESS})


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """`before` is None for what is new, `after` for what goes."""

    path: str
    before: str | None
    after: str | None
    effect: Effect

    def __str__(self) -> str:
        return f"{self.path}: {self.before or '(nothing)'} -> {self.after or '(nothing)'}; {self.effect}"


def diff(before: ServiceSpec | None, after: ServiceSpec) -> list[Change]:
    """Nothing if `after` is what is asked for already. Secrets are not told."""
    changes = []
    names = dict.fromkeys(role.role for spec in (before, after) if spec is not None for role in spec.roles)
    for name in names:
        old = None if before is None else before.role(name)
        new = after.role(name)
        if old is None or new is None:
            told = [None if role is None else f"{role.replicas} replicas" for role in (old, new)]
            changes.append(Change(path=name, before=told[0], after=told[1], effect="at once"))
        else:
            changes += _role(name, old, new)
    return changes


def _role(name: str, old: RoleSpec, new: RoleSpec) -> Iterator[Change]:
    replaced: Effect = "restarts the gateway" if name == GATEWAY else "replaces the replicas"
    for removed in _missing(old.arguments, new.arguments):
        yield Change(path=f"{name}.arguments", before=_shown(removed), after=None, effect=replaced)
    for added in _missing(new.arguments, old.arguments):
        yield Change(path=f"{name}.arguments", before=None, after=_shown(added), effect=replaced)
    for variable in sorted(old.environment.keys() | new.environment.keys()):
        if old.environment.get(variable) != new.environment.get(variable):
            told = ["set" if variable in environment else None for environment in (old.environment, new.environment)]
            yield Change(path=f"{name}.environment.{variable}", before=told[0], after=told[1], effect=replaced)
    for field in msgspec.structs.fields(RoleSpec):
        if field.name in ("role", "arguments", "environment", "documents"):
            continue
        values = getattr(old, field.name), getattr(new, field.name)
        if values[0] != values[1]:
            effect: Effect = replaced if field.name in _LAUNCH else "at once"
            yield Change(path=f"{name}.{field.name}", before=str(values[0]), after=str(values[1]), effect=effect)
    if old.documents != new.documents:
        effect = "at once" if old.revision == new.revision else replaced
        told = [f"{len(role.documents)} documents" for role in (old, new)]
        yield Change(path=f"{name}.policy", before=told[0], after=f"{told[1]}, other ones", effect=effect)


def _missing(these: tuple[str, ...], those: tuple[str, ...]) -> list[str]:
    return [argument for argument in these if argument not in those]


def _shown(argument: str) -> str:
    return _SECRET.sub(r"\1=***", argument)
