"""Where a model comes from: a name becomes a local directory. Loads no torch, and a downloader only when one is needed.

    quire-tiny            the built-in model, in the package
    /a/path, ./path       a directory in Hugging Face format
    organisation/name     a Hugging Face repository                     → hub.py
    s3://bucket/prefix    objects under a prefix                        → s3.py

The built-in name wins over a directory of that name; write ./quire-tiny for the directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from quire.config.engine import BUILTIN_MODEL, EngineConfig
from quire.core.errors import ConfigError, MissingFile
from quire.core.json_file import shorten
from quire.models.checkpoint import FILE_PATTERNS, TOKENIZER_PATTERNS

_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?:{_HUB_PART}/)?{_HUB_PART}")
_FORMS = f"a directory, a Hugging Face id (organisation/name), an s3:// URL, or the built-in '{BUILTIN_MODEL}'"


def resolve_model(config: EngineConfig) -> Path:
    """The local directory of `config.model`, fetched first if it is remote and not here already.

    Raises ConfigError when the name means nothing or the model cannot be fetched; the message says what was tried.
    MissingFile when there is a directory, but of something else than a model.
    """
    directory = _resolve(config.model, config, param="model", patterns=FILE_PATTERNS, revision=config.revision)
    if not (directory / "config.json").is_file():
        raise MissingFile(
            f"The model '{shorten(config.model)}' holds no config.json (looked in {directory}).",
            param="model",
            remedy="A model in Hugging Face format has config.json, tokenizer.json and *.safetensors in one folder.",
        )
    return directory


def resolve_tokenizer(config: EngineConfig, model: Path) -> Path:
    """The directory whose tokeniser is to be used: `model`, the model's own, unless `config.tokenizer` names another.

    Of another model everything but the weights is fetched. Errors as of `resolve_model`.
    """
    if config.tokenizer is None:
        return model
    return _resolve(config.tokenizer, config, param="tokenizer", patterns=TOKENIZER_PATTERNS, revision=None)


def builtin_model() -> Path:
    """The directory of the model that ships with the package."""
    directory = Path(str(resources.files("quire.assets") / BUILTIN_MODEL.replace("-", "_")))
    if not (directory / "config.json").is_file():
        raise MissingFile(
            f"The built-in model is missing: {directory} holds no config.json.",
            param="model",
            remedy="The installation is incomplete; install the package again.",
        )
    return directory


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hugging Face id: `name` or `organisation/name`."""
    return _HUB_ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def _resolve(name: str, config: EngineConfig, *, param: str, patterns: Sequence[str], revision: str | None) -> Path:
    if name == BUILTIN_MODEL:
        return builtin_model()
    if name.startswith("s3://"):
        from quire.models import s3

        required = ("config.json",) if param == "model" else ()
        try:
            return s3.fetch(name, cache=_cache_directory(config), patterns=patterns, required=required)
        except ConfigError as error:
            error.param = error.param or param
            raise
    path = _local_path(name, param)
    if path is not None:
        return path
    if not is_hub_id(name):
        raise ConfigError(
            f"The {param} '{shorten(name)}' is not there: no such directory, and not a Hugging Face id either.",
            param=param,
            remedy=f"Give {_FORMS}.",
        )
    from quire.models import hub

    return hub.fetch(
        name,
        revision=revision,
        token=config.hf_token,
        cache=Path(config.download_dir).expanduser() if config.download_dir else None,
        patterns=patterns,
        param=param,
    )


def _local_path(name: str, param: str) -> Path | None:
    """The directory that `name` is, or None when there is no such path."""
    if not name or not name.isprintable():
        raise ConfigError(f"The {param}'s name is {shorten(repr(name))}.", param=param, remedy=f"Give {_FORMS}.")
    try:
        path = Path(name).expanduser()
        exists, is_directory = os.path.lexists(path), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user's home, no permission
        reason = shorten(getattr(error, "strerror", None) or str(error))  # str(error) would repeat the whole name
        raise ConfigError(
            f"The {param}'s path '{shorten(name)}' cannot be read: {reason}.",
            param=param,
            remedy=f"Give {_FORMS}.",
        ) from error
    if not exists:
        return None
    if not is_directory:
        raise ConfigError(
            f"The {param} '{shorten(name)}' is not a directory.",
            param=param,
            remedy="Give the directory with config.json, tokenizer.json and *.safetensors; single files such as GGUF "
            "are not read.",
        )
    return path.resolve()


def _cache_directory(config: EngineConfig) -> Path:
    if config.download_dir:
        return Path(config.download_dir).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "quire"
