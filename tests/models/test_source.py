"""From a model's name to a directory: the built-in model, local directories, and names that mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from quire.config.engine import BUILTIN_MODEL, EngineConfig
from quire.core.errors import ConfigError, MissingFile, QuireError
from quire.models.source import builtin_model, is_hub_id, resolve_model, resolve_tokenizer


def test_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "models" / "mine"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [str(directory), "models/mine", "./models/mine", "~/models/mine", "models/../models/mine"]:
        assert resolve_model(EngineConfig(model=name)) == directory.resolve()


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFile, match=r"no config\.json"):
        resolve_model(EngineConfig(model="org/name"))


def test_the_builtin_model() -> None:
    directory = builtin_model()
    assert resolve_model(EngineConfig()) == directory
    assert resolve_model(EngineConfig(model=BUILTIN_MODEL)) == directory
    assert (directory / "tokenizer.json").is_file()


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is not a directory"):
        resolve_model(EngineConfig(model=str(path)))


@pytest.mark.parametrize(
    "name",
    ["/absent/model", "./absent", "a/b/c", "../absent", "with space", "org/", "/", "a//b", "ä/ö", "x" * 300],
)
def test_names_that_mean_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuireError) as caught:
        resolve_model(EngineConfig(model=name))
    assert caught.value.param == "model"
    assert caught.value.remedy
    if name != "/" and len(name) < 255:
        assert "no such directory" in str(caught.value)
        assert "Hugging Face id" in str(caught.value)


@pytest.mark.parametrize("name", ["", "\0", "a\nb", "x" * 5000])
def test_hostile_names(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(EngineConfig(model=name))
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_hub_ids() -> None:
    for name in ["gpt2", "Qwen/Qwen3-0.6B", "a/b", "org_1/x.y-z", "meta-llama/Llama-3.1-8B"]:
        assert is_hub_id(name)
    for name in ["", "a/b/c", "/a", "a/", "a b", "-a/b", "a/b.", "a--b/c", "a/..", "a/b?", "~/x", "x" * 97]:
        assert not is_hub_id(name)


def test_every_hub_id_is_one_to_the_hub_client_too() -> None:
    from huggingface_hub.utils import validate_repo_id

    for name in ["gpt2", "Qwen/Qwen3-0.6B", "a/b", "org_1/x.y-z", "_a/_b", "x" * 96]:
        assert is_hub_id(name)
        validate_repo_id(name)


def test_a_local_model_loads_no_downloader(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys\n"
        "from quire.config.engine import EngineConfig\n"
        "from quire.models.source import resolve_model\n"
        "resolve_model(EngineConfig(model=sys.argv[1]))\n"
        "sys.exit(' '.join({'torch', 'numpy', 'transformers', 'huggingface_hub', 'obstore'} & sys.modules.keys()))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert run.stderr.strip() == ""


def test_another_tokenizer(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    other.mkdir()
    assert resolve_tokenizer(EngineConfig(), model) == model
    assert resolve_tokenizer(EngineConfig(tokenizer=str(other)), model) == other
    with pytest.raises(ConfigError, match="no such directory") as caught:
        resolve_tokenizer(EngineConfig(tokenizer="./absent"), model)
    assert caught.value.param == "tokenizer"
