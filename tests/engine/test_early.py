"""Weights that are packed before torch is imported: by the engine's process, to the same tokens."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quire.config.engine import EngineConfig
from quire.core.errors import CheckpointError, ConfigError
from quire.core.request import EngineRequest
from quire.core.sampling import SamplingParams
from quire.engine.build import build_engine
from quire.engine.early import EarlyWeights, packed_early
from quire.ops.cpu.library import usable_isas

pytestmark = pytest.mark.skipif(not usable_isas(), reason="this installation has no compiled kernels")

PROGRAM = """
import sys
from quire.config.engine import EngineConfig
from quire.engine.early import EarlyWeights
early = EarlyWeights(EngineConfig(model=sys.argv[1], dtype="bfloat16", packed_weights_cache=sys.argv[2])).result()
sys.exit(0 if early.packed and early.kept is None and "torch" not in sys.modules else 1)
"""


@pytest.fixture
def config(checkpoints, tmp_path) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoints["llama-float32"]),
        dtype="bfloat16",
        num_kv_blocks=8,
        packed_weights_cache=str(tmp_path / "cache"),
    )


def tokens(config: EngineConfig, early: EarlyWeights | None = None) -> list[int]:
    engine = build_engine(config, early=early)
    sampling = SamplingParams(seed=0, temperature=0, max_tokens=8, ignore_eos=True)
    engine.submit(EngineRequest(request_id="r", prompt_token_ids=[5, 6, 7], sampling=sampling, arrival_time=0.0))
    found: list[int] = []
    while engine.has_work:
        found += [token for output in engine.step() for token in output.token_ids]
    return found


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_same_tokens_without_a_cache_with_an_empty_one_and_with_a_full_one(config, quantization):
    plain = tokens(replace(config, quantization=quantization, packed_weights_cache=None))
    with_cache = replace(config, quantization=quantization)
    assert len(plain) == 8
    assert tokens(with_cache) == plain
    [file] = Path(config.packed_weights_cache).iterdir()
    written = file.stat().st_mtime_ns
    assert tokens(with_cache, EarlyWeights(with_cache)) == plain
    assert file.stat().st_mtime_ns > written  # when it was used


def test_torch_is_not_needed(config):
    build_engine(config)
    command = [sys.executable, "-c", PROGRAM, config.model, config.packed_weights_cache]
    assert subprocess.run(command, check=False).returncode == 0


def test_what_is_wrong_is_raised_where_it_is_waited_for(config, tmp_path):
    with pytest.raises(ConfigError, match="instruction set"):
        build_engine(config, early=EarlyWeights(replace(config, isa="sparc")))
    with pytest.raises(CheckpointError):
        build_engine(config, early=EarlyWeights(replace(config, model=str(tmp_path))))


def test_a_cache_without_effect_is_told(config, capfd):
    config = replace(config, dtype="float32")
    assert packed_early(config) is None
    build_engine(config)
    assert "packed_weights_cache has no effect" in capfd.readouterr().err
    assert not Path(config.packed_weights_cache).exists()
