"""YAML of several documents, as manifests are written; bounded, since they may come from strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from quire.core.errors import ConfigError

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 64
MAX_DOCUMENTS = 256


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, of which YAML would keep the last in silence, and leaves dates as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_documents(path: Path, *, max_bytes: int = MAX_BYTES) -> list[dict[str, Any]]:
    """The mappings in a file, empty documents left out. Raises `ConfigError` for anything else."""
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", remedy="Name a readable YAML file.") from error
    if len(data) > max_bytes:
        raise ConfigError(f"{path} is larger than {max_bytes} bytes.", remedy="Split it.")
    return parse_documents(data, str(path))


def parse_documents(data: bytes, name: str) -> list[dict[str, Any]]:
    """As `read_documents`, of bytes. JSON is YAML too. Aliases are refused: ten lines of them can stand for
    gigabytes."""
    try:
        _check_events(data, name)
        documents = list(yaml.load_all(data, Loader=_Loader))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}", remedy="Mend the file.") from error
    for document in documents:
        if document is not None and not _is_mapping(document):
            raise ConfigError(
                f"{name} holds a {type(document).__name__} where a mapping should be.",
                remedy="Each document is a mapping of names to values.",
            )
    return [document for document in documents if document is not None]


def _check_events(data: bytes, name: str) -> None:
    depth = documents = 0
    for event in yaml.parse(data, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{name} uses YAML aliases (*{event.anchor}).", remedy="Write the value out.")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        if depth > MAX_DEPTH or documents > MAX_DOCUMENTS:
            raise ConfigError(
                f"{name} is nested deeper than {MAX_DEPTH}, or has more than {MAX_DOCUMENTS} documents.",
                remedy="Split or flatten it.",
            )


def _is_mapping(document: object) -> bool:
    return isinstance(document, dict) and all(isinstance(key, str) for key in document)
