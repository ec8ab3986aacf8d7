"""A model with experts: which layers have them, what they take, and their weights in eight bits and four."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig

from quire.config.engine import EngineConfig
from quire.core.errors import BadValue, MissingTensor
from quire.models.checkpoint import Checkpoint
from quire.models.load import load_model
from quire.models.plan import plan_model
from quire.models.registry import identify
from quire.ops.weight import Int4Weight, Int8Weight

CONFIG = Qwen3MoeConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    mlp_only_layers=[1],
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def directory(save_random: Any) -> Path:
    found: Path = save_random(CONFIG, torch.bfloat16)[1]
    return found


def fields(directory: Path, **changes: Any) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text()) | changes


def test_either_name_for_the_number_of_experts_and_either_way_to_say_which_layers(directory: Path) -> None:
    _, arch = identify(fields(directory, num_local_experts=None, num_experts=5), "config.json")
    assert arch.experts.num == 5
    assert [arch.is_sparse(layer) for layer in range(4)] == [True, False, True, True]
    _, arch = identify(fields(directory, decoder_sparse_step=2), "config.json")
    assert arch.experts.dense_layers == (0, 1, 2)


@pytest.mark.parametrize(
    "changes",
    [{"num_experts_per_tok": 9}, {"num_local_experts": 0}, {"mlp_only_layers": 3}, {"decoder_sparse_step": 0}],
)
def test_what_cannot_be_is_refused(directory: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=next(iter(changes)).replace("num_local_experts", "experts")):
        identify(fields(directory, **changes), "config.json")


def test_a_missing_expert_is_named(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(directory / "config.json")
    stored = load_file(directory / "model.safetensors")
    del stored["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(MissingTensor, match=r"layers\.2\.mlp\.experts\.7\.up_proj"):
        load_model(tmp_path)


@pytest.mark.parametrize(("quantization", "kind"), [("int8", Int8Weight), ("int4", Int4Weight)])
def test_experts_are_quantised_and_the_router_is_not(
    directory: Path, lay_out: Any, quantization: Any, kind: type
) -> None:
    decoder = load_model(directory, quantization=quantization, isa="reference").decoder
    sparse = decoder.layers[0].mlp
    assert isinstance(sparse.router.weight, torch.Tensor)
    assert all(type(expert.down.weight) is kind for expert in sparse.experts)
    tokens = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = lay_out([(tokens, 0, 40, [1, 2, 3])], 16)
    logits = {}
    for isa in ("reference", None):
        model = load_model(directory, quantization=quantization, isa=isa)
        logits[isa] = model.decoder.logits(model.decoder.forward(batch, model.new_kv_cache(4, 16)))
    # Here and there a row sees another expert, where two are nearly as likely.
    assert torch.corrcoef(torch.stack([logits["reference"].flatten(), logits[None].flatten()]))[0, 1] > 0.9


def test_a_token_meets_a_few_experts_and_memory_holds_all(directory: Path) -> None:
    model = load_model(directory, isa="reference")
    planned = plan_model(directory, EngineConfig(model=str(directory)), bandwidth=1e10, flops=1e12)
    assert (
        model.num_parameters
        == planned.num_parameters
        == sum(info.num_elements for info in Checkpoint.open(directory).tensors.values())
    )
    expert = 3 * 32 * 64
    assert model.num_parameters - model.elements_per_row == 3 * 6 * expert
