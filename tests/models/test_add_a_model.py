"""The worked example of docs/add-a-model.md, installed as its page says, against the same model in `transformers`."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.case import Case, Tensors
from conformance.oracle import check
from conformance.rewrites import joined, renamed, then
from quire.core.errors import UnknownArchitecture
from quire.models.registry import identify

PAGE = Path(__file__).parents[2] / "docs" / "add-a-model.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def halved(stored: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """The embedding halved, because the family doubles it."""
    name = "falstaff.tokens.weight"
    return {**stored, name: stored[name] / 2}, {**config, "rope_theta": 10000.0, "rope_parameters": None}


# StableLM that rotates whole heads; windows of 256 tokens, which is more than the matrix looks at.
CASE = Case(
    family="Falstaff",
    architecture="FalstaffForCausalLM",
    config="StableLmConfig",
    fields={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    rewrite=then(
        joined("self_attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        renamed(
            {
                r"model\.embed_tokens": "falstaff.tokens",
                r"model\.": "falstaff.",
                "self_attn.o_proj": "out",
                r"self_attn\.": "",
                "input_layernorm": "norm_1",
                "post_attention_layernorm": "norm_2",
                r"mlp\.(\w+)_proj": r"\1",
                "lm_head": "falstaff.head",
            },
            values={"sliding_window": 256},
        ),
        halved,
    ),
)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip would lay it out."""
    (module,), (settings,) = blocks("py"), blocks("toml")
    assert len(module.splitlines()) <= 40
    (tmp_path / "falstaff.py").write_text(module)
    information = tmp_path / "falstaff-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: falstaff\nVersion: 1.0\n")
    line = settings.splitlines()[1].replace('"', "")
    (information / "entry_points.txt").write_text(f"[quire.models]\n{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "falstaff", raising=False)


def test_the_example_computes_what_its_oracle_does(installed: None, tmp_path: Path) -> None:
    check(CASE, tmp_path / "checkpoint")


def test_the_example_would_be_seen_to_be_wrong(installed: None, tmp_path: Path) -> None:
    def windowed(stored: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        assert CASE.rewrite is not None
        stored, config = CASE.rewrite(stored, config)
        return stored, {**config, "sliding_window": 24}

    with pytest.raises(AssertionError):
        check(replace(CASE, rewrite=windowed), tmp_path / "checkpoint")


def test_without_it_the_architecture_is_unknown() -> None:
    with pytest.raises(UnknownArchitecture, match="FalstaffForCausalLM"):
        identify({"architectures": ["FalstaffForCausalLM"]}, "config.json")
