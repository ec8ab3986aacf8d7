"""Models that `transformers` serves, beside what tests/models/test_conformance.py checks of all of them."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conformance.case import Case
from conformance.cases import CASES
from conformance.fallback import CASES as SERVED
from conformance.fallback import REFUSED
from conformance.oracle import check, save
from quire.core.errors import (
    BadValue,
    ConfigError,
    MissingTensor,
    QuireError,
    ShapeMismatch,
    UnknownArchitecture,
    UnsupportedModel,
)
from quire.models.fallback.attention import Unfit
from quire.models.fallback.rowwise import Rowwise
from quire.models.fallback.visible import Mask, Visible, visible
from quire.models.load import LoadedModel, load_model
from quire.ops.kernels import select
from quire.ops.target import Target

BLOCK, LENGTH = 16, 100


def case_of(architecture: str) -> Case:
    return next(case for case in (*SERVED, *CASES) if case.architecture == architecture)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of tiny checkpoints by architecture."""
    made: dict[str, Path] = {}

    def checkpoint(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            save(case_of(architecture), made[architecture])
        return made[architecture]

    return checkpoint


@pytest.mark.parametrize(("case", "word"), REFUSED, ids=[case.architecture for case, _ in REFUSED])
def test_what_paged_attention_cannot_see_is_refused_with_the_reason(case: Case, word: str, tmp_path: Path) -> None:
    save(case, tmp_path)
    with pytest.raises(UnsupportedModel, match=word):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GraniteForCausalLM", "Gemma2ForCausalLM", "OPTForCausalLM"]
)
def test_it_agrees_with_quires_own_code(architecture: str, checkpoints: Any, lay_out: Any) -> None:
    directory = checkpoints(architecture)
    tokens = torch.randint(0, 97, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for impl in ("quire", "transformers"):
        model = load_model(directory, dtype="float32", model_impl=impl)  # type: ignore[arg-type]
        assert model.served_by == impl
        found.append(logits(model, lay_out, [(tokens, 0, LENGTH, range(1, 8))]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


KINDS = [
    ("AfmoeForCausalLM", "float32"),
    ("AfmoeForCausalLM", "bfloat16"),
    ("MiMoV2FlashForCausalLM", "float32"),
    ("MiMoV2FlashForCausalLM", "bfloat16"),
    ("DiffLlamaForCausalLM", "float32"),
    ("JetMoeForCausalLM", "bfloat16"),
    ("DiffLlamaForCausalLM", "bfloat16"),
    ("Qwen3VLMoeForConditionalGeneration", "bfloat16"),
    ("GPT2LMHeadModel", "float32"),
    ("LagunaForCausalLM", "float32"),
    ("LagunaForCausalLM", "bfloat16"),
    ("AriaForConditionalGeneration", "float32"),
    ("AriaForConditionalGeneration", "bfloat16"),
]


@pytest.mark.parametrize(("architecture", "dtype"), KINDS)
def test_a_row_has_the_same_bits_whatever_else_is_in_the_step(
    architecture: str, dtype: str, checkpoints: Any, lay_out: Any
) -> None:
    model = load_model(checkpoints(architecture), dtype=dtype, model_impl="transformers")
    dice = random.Random(architecture)
    prompts = [[dice.randrange(97) for _ in range(LENGTH)] for _ in range(3)]
    blocks = [range(1 + 7 * index, 8 + 7 * index) for index in range(3)]
    alone = [logits(model, lay_out, [(prompt, 0, LENGTH, blocks[0])]) for prompt in prompts]
    kv = model.new_kv_cache(30, BLOCK)
    done = [0, 0, 0]
    while min(done) < LENGTH:
        parts = []
        for index in dice.sample(range(3), dice.randint(1, 3)):
            if done[index] < LENGTH:
                stop = min(LENGTH, done[index] + dice.choice([1, 1, 5, 33]))
                parts.append((index, done[index], stop))
                done[index] = stop
        if not parts:
            continue
        batch = lay_out([(prompts[index], start, stop, blocks[index]) for index, start, stop in parts], BLOCK)
        found = model.decoder.logits(model.decoder.forward(batch, kv))
        expected = torch.cat([alone[index][start:stop] for index, start, stop in parts])
        assert torch.equal(found, expected)


# --- what torch computes ------------------------------------------------------------------------------------


@pytest.fixture(params=["float32", "bfloat16"])
def rowwise(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Rowwise]:
    """A model of one matrix of [48, 40] and one for each of three experts, and what surrounds its code."""
    torch.manual_seed(3)
    dtype = getattr(torch, request.param)
    model = torch.nn.Module()
    model.matrix = torch.nn.Parameter(torch.randn(48, 40, dtype=dtype), requires_grad=False)
    model.experts = torch.nn.Parameter(torch.randn(3, 48, 40, dtype=dtype), requires_grad=False)
    return model, Rowwise(model, {dtype: select(Target(torch.device("cpu"), dtype))})


@pytest.mark.parametrize("beta", [1, 2.5])
def test_softplus_of_an_element_is_the_same_wherever_it_stands(rowwise: Any, beta: float) -> None:
    model, mode = rowwise
    x = torch.linspace(-30, 30, 1003).to(model.matrix.dtype)
    with mode:
        whole = torch.nn.functional.softplus(x, beta)
        same = torch.nn.Softplus(beta)(x)
        alone = torch.cat([torch.nn.functional.softplus(x[index : index + 1], beta=beta) for index in range(len(x))])
    assert torch.equal(whole, alone)
    assert torch.equal(whole, same)
    torch.testing.assert_close(whole, torch.nn.functional.softplus(x, beta))


@pytest.mark.parametrize("product", [torch.matmul, torch.mm, torch.Tensor.matmul, lambda a, b: a @ b])
def test_rows_by_a_matrix_of_the_model_do_not_depend_on_one_another(rowwise: Any, product: Any) -> None:
    model, mode = rowwise
    x = torch.randn(37, 48).to(model.matrix.dtype)
    for matrix in (model.matrix, model.experts[1]):
        with mode:
            whole = product(x, matrix)
            alone = torch.cat([product(x[index : index + 1], matrix) for index in range(len(x))])
        assert torch.equal(whole, alone)
        torch.testing.assert_close(whole, x @ matrix, rtol=2e-2, atol=2e-2)


PRODUCTS: dict[str, Any] = {
    "matrix from the left": lambda x, model: model.matrix.T @ x.T,
    "all experts": lambda x, model: x @ model.experts,
    "bmm": lambda x, model: torch.bmm(x.expand(3, *x.shape), model.experts),
    "einsum": lambda x, model: torch.einsum("tk,ekn->etn", x, model.experts),
    "einsum of a list": lambda x, model: torch.einsum("tk,kn->tn", [x, model.matrix]),
    "baddbmm": lambda x, model: torch.baddbmm(torch.zeros(1, dtype=x.dtype), x.expand(3, *x.shape), model.experts),
    "by name": lambda x, model: torch.matmul(x, other=model.matrix),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_other_products_with_parameters_are_unfit(rowwise: Any, name: str) -> None:
    model, mode = rowwise
    x = torch.randn(5, 48).to(model.matrix.dtype)
    with mode, pytest.raises(Unfit, match="number of rows"):
        PRODUCTS[name](x, model)
    with mode:
        x @ x.T  # what tokens do with one another is another matter


def logits(model: LoadedModel, lay_out: Any, parts: Any) -> torch.Tensor:
    batch = lay_out(parts, BLOCK)
    return model.decoder.logits(model.decoder.forward(batch, model.new_kv_cache(30, BLOCK)))


def test_two_engines_of_one_process_do_not_meet(checkpoints: Any, lay_out: Any) -> None:
    prompt = list(range(40))
    directories = [checkpoints(name) for name in ("NanoChatForCausalLM", "AfmoeForCausalLM")]
    alone = [
        logits(load_model(directory, dtype="float32"), lay_out, [(prompt, 0, 40, [1, 2, 3])])
        for directory in directories
    ]
    models = [load_model(directory, dtype="float32") for directory in directories]
    caches = [model.new_kv_cache(5, BLOCK) for model in models]
    found: list[list[torch.Tensor]] = [[], []]
    for start, stop in itertools.pairwise((0, 9, 10, 40)):
        for index, (model, kv) in enumerate(zip(models, caches, strict=True)):
            hidden = model.decoder.forward(lay_out([(prompt, start, stop, [1, 2, 3])], BLOCK), kv)
            found[index].append(model.decoder.logits(hidden))
    for pieces, expected in zip(found, alone, strict=True):
        assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize(
    ("architecture", "copied"), [("DiffLlamaForCausalLM", 0.0), ("AfmoeForCausalLM", 0.6), ("GPT2LMHeadModel", 0.8)]
)
def test_bytes_are_those_of_the_parameters(architecture: str, copied: float, checkpoints: Any) -> None:
    directory = checkpoints(architecture)
    stored = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
    model = load_model(directory, dtype="float32", model_impl="transformers")
    assert model.weight_bytes == pytest.approx(stored, rel=0.02)
    # Afmoe's experts are put together, GPT-2's matrices are turned.
    assert model.converted_bytes <= copied * stored
    narrow = load_model(directory, dtype="bfloat16", isa="reference", model_impl="transformers")
    assert narrow.weight_bytes == pytest.approx(stored / 2, rel=0.02)
    assert narrow.converted_bytes == narrow.weight_bytes


# --- masks ---------------------------------------------------------------------------------------------------


def test_masks_are_read_as_what_they_are() -> None:
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    zero = torch.zeros(1, dtype=torch.int64)
    assert visible(Mask(causal_mask_function), 5000) == Visible()
    assert visible(Mask(sliding_window_causal_mask_function(1)), 500) == Visible(window=1)
    assert visible(Mask(sliding_window_causal_mask_function(300)), 5000) == Visible(window=300)
    assert visible(Mask(sliding_window_causal_mask_function(4999)), 5000) == Visible(window=4999)
    assert visible(Mask(sliding_window_causal_mask_function(5000)), 5000) == Visible()
    assert visible(Mask(chunked_causal_mask_function(300, zero)), 5000) == Visible(chunk=300)
    assert visible(Mask(bidirectional_mask_function), 5000) is None
    assert visible(Mask(lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0)), 5000) is None


# --- what is refused -----------------------------------------------------------------------------------------


def edited(directory: Path, tmp_path: Path, **fields: Any) -> Path:
    config = {**json.loads((directory / "config.json").read_text()), **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return tmp_path


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], type[QuireError], str]] = {
    "an architecture of nobody": ({"architectures": ["NewestForCausalLM"]}, {}, UnknownArchitecture, "Newest"),
    "a model type of nobody": ({"model_type": "newest"}, {}, UnknownArchitecture, "'newest'"),
    "code of its own": (
        {"model_type": "newest", "auto_map": {"AutoModelForCausalLM": "modeling.Newest"}},
        {},
        UnknownArchitecture,
        "own code never is",
    ),
    "no architecture": ({"architectures": []}, {}, BadValue, "architectures"),
    "a value that transformers refuses": ({"hidden_size": "wide"}, {}, BadValue, "hidden_size"),
    "many experts": ({"num_local_experts": 10**9}, {}, BadValue, "num_local_experts"),
    "many layers": ({"num_hidden_layers": 10**9}, {}, BadValue, "num_hidden_layers"),
    "one layer more": ({"num_hidden_layers": 3, "layer_types": None}, {}, ShapeMismatch, "parameters"),
    "another width": ({"intermediate_size": 71}, {}, ShapeMismatch, "shape"),
    "quantised weights": ({"quantization_config": {"quant_method": "gptq"}}, {}, UnsupportedModel, "quantised"),
    "a quantised part": ({"text_config": {"compression_config": {"a": 1}}}, {}, UnsupportedModel, "quantised"),
    "quantization": ({}, {"quantization": "int8"}, ConfigError, "quantization"),
    "a longer context": ({}, {"max_model_len": 257}, ConfigError, "256"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_named(name: str, checkpoints: Any, tmp_path: Path) -> None:
    fields, settings, error, word = REFUSALS[name]
    directory = edited(checkpoints("NanoChatForCausalLM"), tmp_path, **fields)
    impl = "auto" if "architectures" in fields else "transformers"
    with pytest.raises(error, match=word):
        load_model(directory, model_impl=impl, **settings)  # type: ignore[arg-type]


FETCHED: dict[str, dict[str, Any]] = {
    "its model type": {"vision_config": {"model_type": "timm_wrapper", "label_names": ["a"]}},
    "its backbone": {"parts": [{"vision_config": {"backbone_config": {"model_type": "timm_backbone"}}}]},
    "a name": {"vision_config": {"architecture": "hf_hub:somebody/something"}},
    "a backbone by name": {"vision_config": {"model_type": "dpt", "backbone": "somebody/something"}},
    "a backbone of the model": {"backbone": "somebody/something"},
    "arguments": {"vision_config": {"model_args": {"pretrained_cfg_overlay": {"hf_hub_id": "somebody/something"}}}},
}


@pytest.mark.parametrize("kind", FETCHED)
def test_a_part_that_could_be_fetched_is_refused(kind: str, checkpoints: Any, tmp_path: Path) -> None:
    directory = edited(checkpoints("LlavaForConditionalGeneration"), tmp_path, **FETCHED[kind])
    with pytest.raises(UnsupportedModel, match="network"):
        load_model(directory, model_impl="transformers")


def test_a_part_that_would_be_fetched_by_default_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    """Where config.json says nothing of it."""
    fields = {"architectures": ["FastVlmForConditionalGeneration"], "model_type": "fast_vlm", "vision_config": None}
    fields |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    directory = edited(checkpoints("LlavaForConditionalGeneration"), tmp_path, **fields)
    with pytest.raises(UnsupportedModel, match="network"):
        load_model(directory)


def test_missing_and_infinite_tensors_are_named(checkpoints: Any, tmp_path: Path) -> None:
    directory = edited(checkpoints("DiffLlamaForCausalLM"), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file({**missing, "unused": torch.zeros(10_000)}, directory / "model.safetensors")
    with pytest.raises(MissingTensor, match=name):
        load_model(directory)
    save_file({**tensors, name: torch.full_like(tensors[name], float("inf"))}, directory / "model.safetensors")
    with pytest.raises(BadValue, match=name):
        load_model(directory)


def test_a_wrong_checkpoint_of_the_matrix_would_be_seen(tmp_path: Path) -> None:
    def halved(stored: Any, config: Any) -> Any:
        return {name: tensor / 2 if "q_proj" in name else tensor for name, tensor in stored.items()}, config

    from dataclasses import replace

    with pytest.raises(AssertionError):
        check(replace(case_of("DiffLlamaForCausalLM"), rewrite=halved), tmp_path)


def test_without_transformers_it_is_said_how_to_install_it(checkpoints: Any) -> None:
    """And a model of quire's own is loaded without it."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from pathlib import Path\nfrom quire.models.load import load_model\n"
        "load_model(Path(sys.argv[1]))\n"
        "load_model(Path(sys.argv[2]))\n"
    )
    paths = [str(checkpoints(name)) for name in ("LlamaForCausalLM", "DiffLlamaForCausalLM")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "UnknownArchitecture" in last
    assert "DiffLlamaForCausalLM" in last
    assert "pip install 'quire-llm[transformers]'" in last


# --- positions -----------------------------------------------------------------------------------------------


def test_longrope_keeps_the_factors_of_the_context_it_was_started_with(tmp_path: Path, lay_out: Any) -> None:
    """As quire's own decoder does: a request's bits may not hang on how long its neighbours are."""
    save(next(case for case in CASES if case.id == "Phi3ForCausalLM-longrope"), tmp_path)
    tokens = torch.randint(0, 97, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    for length in (None, 240):
        found = []
        for impl in ("quire", "transformers"):
            model = load_model(tmp_path, dtype="float32", max_model_len=length, model_impl=impl)  # type: ignore[arg-type]
            found.append(logits(model, lay_out, [(tokens, 0, LENGTH, range(1, 8))]))
            assert model.max_model_len == (length or 200)
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_dynamic_scaling_ends_where_it_would_begin(tmp_path: Path) -> None:
    save(next(case for case in CASES if case.id == "LlamaForCausalLM-dynamic-rope"), tmp_path)
    longest = load_model(tmp_path, model_impl="transformers").max_model_len
    with pytest.raises(ConfigError, match="dynamically"):
        load_model(tmp_path, model_impl="transformers", max_model_len=longest + 1)
