"""Precedence, conversion, refusal: whatever is set anywhere comes out as one value with its source, or as an error."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config.engine import EngineConfig
from quire.config.resolve import MAX_FILE_BYTES, env_name, flag_name, read_file, resolve
from quire.config.server import ServerConfig
from quire.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    count: int = 1
    share: float = 0.5
    name: str | None = None
    kind: Literal["red", "blue"] | None = None
    limit: int | None = None
    enabled: bool = True


VALUES = {
    "count": st.integers(-1000, 1000),
    "share": st.floats(-1e6, 1e6),
    "name": st.text(min_size=1),
    "kind": st.sampled_from(["red", "blue"]),
    "limit": st.integers(-1000, 1000),
    "enabled": st.booleans(),
}
SETTINGS = st.fixed_dictionaries({}, optional=VALUES)


def toy(flags=(), file=None, environ=()):
    return resolve(Toy, flags=dict(flags), file=file, environ=dict(environ), file_name="q.yaml", known=())


@given(flags=SETTINGS, file=SETTINGS, environ=SETTINGS)
def test_a_flag_wins_over_the_file_which_wins_over_the_environment(flags, file, environ):
    resolved = toy(
        {name: str(value) for name, value in flags.items()},
        file,
        {env_name(name): str(value) for name, value in environ.items()},
    )
    for field in fields(Toy):
        name = field.name
        expected = [(flags, "flag"), (file, "file q.yaml"), (environ, f"env {env_name(name)}")]
        value, source = next(
            ((place[name], label) for place, label in expected if name in place), (field.default, "default")
        )
        got = getattr(resolved.value, name)
        if isinstance(value, str) and value.lower() == "none" and name != "name":
            value = None
        assert got == value
        assert type(got) is type(value)
        assert resolved.sources[name] == source


def test_the_sources_cannot_be_changed():
    with pytest.raises(TypeError):
        toy().sources["count"] = "flag"


@pytest.mark.parametrize(
    ("flags", "file", "environ", "words"),
    [
        ({"count": "many"}, None, {}, ["--count", "'many'", "an integer"]),
        ({"count": "1.5"}, None, {}, ["--count", "'1.5'", "an integer"]),
        ({"share": "nan"}, None, {}, ["--share", "a number"]),
        ({"share": "inf"}, None, {}, ["--share", "a number"]),
        ({"kind": "green"}, None, {}, ["--kind", "'green'", "red, blue"]),
        ({"enabled": "perhaps"}, None, {}, ["--enabled", "'perhaps'", "true or false"]),
        ({}, {"count": "3"}, {}, ["count in q.yaml", "'3'", "an integer"]),
        ({}, {"count": True}, {}, ["count in q.yaml", "True", "an integer"]),
        ({}, {"count": None}, {}, ["count in q.yaml", "None", "an integer"]),
        ({}, {"enabled": 1}, {}, ["enabled in q.yaml", "1", "true or false"]),
        ({}, {"name": 5}, {}, ["name in q.yaml", "5", "quotes"]),
        ({}, {"kind": ["red"]}, {}, ["kind in q.yaml", "['red']", "red, blue"]),
        ({}, {"share": "0.5"}, {}, ["share in q.yaml", "'0.5'", "a number"]),
        ({}, None, {"QUIRE_COUNT": ""}, ["QUIRE_COUNT", "''", "an integer"]),
        ({}, None, {"QUIRE_LIMIT": "x" * 500}, ["QUIRE_LIMIT", "...", "an integer"]),
        ({}, {"cuont": 3}, {}, ["cuont in q.yaml", "Did you mean count"]),
        ({}, None, {"QUIRE_CONUT": "3"}, ["QUIRE_CONUT", "Did you mean QUIRE_COUNT"]),
        ({"coutn": "3"}, None, {}, ["--coutn", "Did you mean --count"]),
        ({"zzz": "3"}, None, {}, ["--zzz", "--help"]),
    ],
)
def test_an_error_names_the_place_the_value_and_the_remedy(flags, file, environ, words):
    with pytest.raises(ConfigError) as caught:
        toy(flags, file, environ)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_setting_that_is_overridden_is_still_checked_for_its_name_only():
    assert toy({"count": "2"}, {"count": "not a number"}, {"QUIRE_COUNT": "neither"}).value.count == 2


def test_null_and_none_unset_an_optional_setting():
    assert toy({}, {"limit": None}, {"QUIRE_LIMIT": "4"}).value.limit is None
    assert toy({"limit": "none"}, {"limit": 4}).value.limit is None
    assert toy({"name": "none"}).value.name == "none"


def test_one_file_and_one_environment_serve_both_configurations():
    file = {"block_size": 32, "port": 9000}
    environ = {"QUIRE_MAX_NUM_SEQS": "3", "QUIRE_LOG_JSON": "true", "HOME": "/nowhere", "QUIREX": "1"}
    engine = resolve(EngineConfig, flags={}, file=file, environ=environ)
    server = resolve(ServerConfig, flags={}, file=file, environ=environ)
    assert (engine.value.block_size, engine.value.max_num_seqs) == (32, 3)
    assert (server.value.port, server.value.log_json) == (9000, True)
    with pytest.raises(ConfigError):
        resolve(ServerConfig, flags={"block_size": 32}, file=None, environ={})


@pytest.mark.parametrize(
    ("cls", "flags"),
    [
        (EngineConfig, {"block_size": 12}),
        (EngineConfig, {"block_size": 4}),
        (EngineConfig, {"block_size": 512}),
        (EngineConfig, {"memory_utilization": 0.0}),
        (EngineConfig, {"memory_utilization": 1.01}),
        (EngineConfig, {"kv_cache_memory": 0.0}),
        (EngineConfig, {"max_num_seqs": 0}),
        (EngineConfig, {"max_model_len": 0}),
        (EngineConfig, {"max_num_batched_tokens": -1}),
        (EngineConfig, {"max_logprobs": 1000}),
        (EngineConfig, {"threads": 0}),
        (EngineConfig, {"swap_space": -1.0}),
        (EngineConfig, {"model": " "}),
        (EngineConfig, {"preemption": "swap"}),
        (EngineConfig, {"seed": 2**63}),
        (ServerConfig, {"port": -1}),
        (ServerConfig, {"port": 65536}),
        (ServerConfig, {"api_key": ""}),
        (ServerConfig, {"log_level": "loud"}),
        (ServerConfig, {"max_body_bytes": 0}),
        (ServerConfig, {"heartbeat_timeout": 0.0}),
        (ServerConfig, {"ssl_certfile": "cert.pem"}),
        (ServerConfig, {"ssl_keyfile": "key.pem"}),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(cls, flags):
    (name,) = flags
    with pytest.raises(ConfigError, match=flag_name(name)):
        resolve(cls, flags=flags, file=None, environ={})


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_the_defaults_are_valid_and_every_field_can_be_read_from_each_place(cls):
    default = resolve(cls, flags={}, file=None, environ={})
    assert default.value == cls()
    assert set(default.sources.values()) == {"default"}
    written = {field.name: getattr(cls(), field.name) for field in fields(cls) if field.default is not None}
    texts = {name: str(value) for name, value in written.items()}
    assert resolve(cls, flags=texts, file=None, environ={}).value == cls()
    assert resolve(cls, flags={}, file=written, environ={}).value == cls()
    environ = {env_name(name): text for name, text in texts.items()}
    assert resolve(cls, flags={}, file=None, environ=environ).value == cls()


def test_a_file_is_read_as_plain_data(tmp_path: Path):
    path = tmp_path / "q.yaml"
    path.write_text("# settings\nport: 9000\nserved_model_name: tiny\nlog_json: true\n")
    assert read_file(path) == {"port": 9000, "served_model_name": "tiny", "log_json": True}
    path.write_text("")
    assert read_file(path) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"port: [unclosed",
        b"- a\n- b\n",
        b"just words",
        b"1: 2\n",
        b"port: !!python/object/apply:os.getcwd []\n",
        b"\xff\xfe\xfa",
        b"[" * 50_000,
        b"x" * (MAX_FILE_BYTES + 1),
    ],
    ids=["syntax", "list", "text", "numbers as keys", "code", "not utf-8", "deep", "too long"],
)
def test_a_file_that_is_no_mapping_of_settings_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "q.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"q\.yaml"):
        read_file(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*No such file"):
        read_file(tmp_path / "nowhere.yaml")
