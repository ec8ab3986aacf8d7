"""docs/gateway-plugins.md, from the table of stock plugins. `python -m quire.gateway.plugins.reference` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_origin

import msgspec

from quire.gateway.plugin import struct_in
from quire.gateway.plugins import stock

_INTRO = """# Gateway plugins

<!-- Written by `python -m quire.gateway.plugins.reference`; a test compares them. -->

What `type` an `EndpointPickerConfig` may name, with its parameters and their defaults. What is accepted without effect
is told by a warning at the start, with the reason (`*`: all else in that section). Names and meanings are llm-d's,
except for `expected-cost-scorer` and `round-robin-picker`, which are quire's own. Flow control's plugins are not listed
here. Others come through the entry-point group `quire.gateway_plugins`: an entry of the type's name, which loads a
function of the parameters and the gateway's `Services` that returns the plugin.
"""
_TITLES = (
    ("Scorers", (*stock.SCORERS, *stock.DEFAULT_POLICY)),
    ("Filters", stock.FILTERS),
    ("Pickers", stock.PICKERS),
    ("Profile handlers and deciders", stock.HANDLERS),
    ("Admitters", stock.ADMITTERS),
    ("Producers", stock.PRODUCERS),
)


def page() -> str:
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _INTRO
    for title, plugins in _TITLES:
        yield f"## {title}\n"
        yield "| Type | Parameters | Accepted, without effect |"
        yield "|---|---|---|"
        for plugin in plugins:
            parameters, unheeded = _parameters(plugin.parameters), ", ".join(_without_effect(plugin.parameters))
            yield f"| `{plugin.type_name}` | {parameters or 'none'} | {unheeded} |"
        yield ""
    yield "## Older names\n"
    yield "Accepted, with a warning.\n"
    yield "| Older | Now |"
    yield "|---|---|"
    yield from (f"| `{old}` | `{new}` |" for old, new in sorted(stock.ALIASES.items()))
    yield "\n## Without effect\n"
    yield "llm-d's types that have nothing to do here; each is told by a warning.\n"
    yield "| Type | Why |"
    yield "|---|---|"
    yield from (f"| `{name}` | {why} |" for name, why in sorted(stock.MEANINGLESS.items()))


def _parameters(kind: type[msgspec.Struct], prefix: str = "") -> str:
    return ", ".join(_one(field, prefix) for field in msgspec.structs.fields(kind))


def _one(field: msgspec.structs.FieldInfo, prefix: str) -> str:
    name = prefix + field.encode_name
    nested = struct_in(field.type)
    if nested is not None:
        listed = "[]" if get_origin(field.type) is tuple else ""
        return _parameters(nested, f"{name}{listed}.") or f"`{name}`"
    if field.required:
        return f"`{name}` (required)"
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return f"`{name}` = `{msgspec.json.encode(default).decode()}`"


def _without_effect(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    yield from (f"`{prefix}{name}`" for name in getattr(kind, "WITHOUT_EFFECT", ()))
    for field in msgspec.structs.fields(kind):
        nested = struct_in(field.type)
        if nested is not None:
            yield from _without_effect(nested, f"{prefix}{field.encode_name}.")


if __name__ == "__main__":
    print(page(), end="")
