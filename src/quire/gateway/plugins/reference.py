"""docs/gateway-plugins.md, from the table of stock plugins. `python -m quire.gateway.plugins.reference` prints it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from quire.gateway.plugins import stock

_INTRO = """# Gateway plugins

<!-- Written by `python -m quire.gateway.plugins.reference`; a test compares them. -->

What `type` an `EndpointPickerConfig` may name, with its parameters and their defaults. Names and meanings are llm-d's,
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
        yield "| Type | Parameters |"
        yield "|---|---|"
        for plugin in plugins:
            yield f"| `{plugin.type_name}` | {_parameters(plugin.parameters) or 'none'} |"
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
    nested = field.default if isinstance(field.default, msgspec.Struct) else None
    if nested is not None:
        return _parameters(type(nested), f"{name}.")
    if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
        return _parameters(field.type, f"{name}.")
    if field.required:
        return f"`{name}` (required)"
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return f"`{name}` = `{msgspec.json.encode(default).decode()}`"


if __name__ == "__main__":
    print(page(), end="")
