"""What a checkpoint recommends: default sampling parameters, and the tokens that end a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from quire.core.errors import BadValue, CheckpointError, InvalidParameter
from quire.core.json_file import MAX_TOKENIZER_BYTES, read_bytes, read_optional_json_object, shorten
from quire.core.sampling import SamplingParams
from quire.text.tokenizer import read_named_tokens

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(directory: Path) -> dict[str, object]:
    """Arguments for `SamplingParams` from generation_config.json; empty when there is no such file.

    `do_sample: false` means greedy. Raises `BadValue` for values that `SamplingParams` refuses.
    """
    path = directory / "generation_config.json"
    values = read_optional_json_object(path)
    defaults = {ours: values[theirs] for theirs, ours in _SAMPLING.items() if values.get(theirs) is not None}
    if values.get("do_sample") is False:
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)  # type: ignore[arg-type]  # it is what checks the types
    except InvalidParameter as error:
        raise BadValue(f"{path}: {error}", remedy="Mend the file, or leave the entry out.") from None
    return defaults


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end a sequence: those of generation_config.json, or else of config.json, and the tokenizer's EOS.

    The tokenizer's own is always among them: chat models are often published with a generation config that names
    only the base model's. It is looked up among the added tokens, without loading a tokenizer.
    """
    found: list[int] = []
    for file in ("generation_config.json", "config.json"):
        path = directory / file
        config = read_optional_json_object(path)
        value = config.get("eos_token_id")
        text_config = config.get("text_config")
        if value is None and isinstance(text_config, dict):
            value = text_config.get("eos_token_id")
        found = _token_ids(value, path)
        if found:
            break
    own = _added_token_id(directory, read_named_tokens(directory).get("eos_token"))
    return tuple(dict.fromkeys(found if own is None else [*found, own]))


def _added_token_id(directory: Path, content: str | None) -> int | None:
    """The id of an added token: from tokenizer_config.json, which is small, or else from tokenizer.json."""
    if content is None:
        return None
    decoder = read_optional_json_object(directory / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for token_id, token in decoder.items():
            if isinstance(token, dict) and token.get("content") == content and token_id.isdecimal():
                return int(token_id)
    added = _read_field(directory / "tokenizer.json", "added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("content") == content and isinstance(token.get("id"), int):
            return int(token["id"])
    return None


def _token_ids(value: object, path: Path) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in values:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise BadValue(
                f"{path}: eos_token_id is {value!r}, expected token ids.", remedy="Mend the file's eos_token_id."
            )
    return list(values)


def _read_field(path: Path, name: str) -> object:
    """One field of the JSON object in a file that may be large; None where it has none, or there is no file. The rest
    is not made into objects, which takes longer than all else that a start does with a tokenizer.json."""
    if not path.is_file():
        return None
    try:
        data = read_bytes(path, max_bytes=MAX_TOKENIZER_BYTES)
        found = msgspec.json.decode(data, type=msgspec.defstruct("File", [(name, Any, None)]))
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {shorten(str(error))}.", param="model") from None
    return getattr(found, name)
