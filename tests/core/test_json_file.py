"""Files of a checkpoint are read within bounds, whoever wants them."""

import os
from pathlib import Path

import pytest

from quire.core.errors import CheckpointError, MissingFile
from quire.core.json_file import MAX_JSON_BYTES, read_json_object, read_optional_json_object, read_text


def test_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_optional_json_object(path) == {}
    with pytest.raises(MissingFile, match=r"a\.json"):
        read_json_object(path)
    path.write_text('{"ä": [1]}', encoding="utf-8")
    assert read_json_object(path) == read_optional_json_object(path) == {"ä": [1]}
    assert read_text(path) == '{"ä": [1]}'


@pytest.mark.parametrize("read", [read_text, read_json_object, read_optional_json_object])
@pytest.mark.parametrize("content", [b" " * (MAX_JSON_BYTES + 1), b'{"a": "\xff"}'], ids=["too large", "not UTF-8"])
def test_what_cannot_be_read_is_named(tmp_path: Path, read, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json"):
        read(path)


@pytest.mark.parametrize("read", [read_text, read_json_object, read_optional_json_object])
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path, read) -> None:
    path = tmp_path / "a.json"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read(path)


def test_the_bound_can_be_another(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path, max_bytes=8) == {"a": 1}
    with pytest.raises(CheckpointError, match="larger than 7"):
        read_json_object(path, max_bytes=7)
