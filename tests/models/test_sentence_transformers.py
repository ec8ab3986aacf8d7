"""Files of sentence-transformers, and fields of config.json about pooling: what they mean, and what is refused."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from quire.config.engine import EngineConfig
from quire.core.errors import CheckpointError, ConfigError, MissingTensor, QuireError, ShapeMismatch
from quire.core.pooling import PoolingTask
from quire.engine.build import build_engine
from quire.models.checkpoint import Checkpoint
from quire.models.load import load_model
from quire.models.model_config import ModelConfig
from quire.models.plan import plan_model
from quire.models.pooling_fields import read_labels, read_matryoshka, read_score_activation
from quire.models.quantization.write import Source, rounded, write_checkpoint
from quire.models.sentence_transformers import read_modules
from quire.models.serving import Serving, identify_served, read_serving
from quire.ops.cpu.library import usable_isas
from quire.ops.weight import dequantize

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
POOLING, NORMALIZE = ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    torch.manual_seed(1)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def directory(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def write(directory: Path, *modules: tuple[str, str], **files: object) -> None:
    """modules.json of (path, kind) after the transformer, and the JSON files; `__` in their names is a slash."""
    found = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    found += [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (directory / "modules.json").write_text(json.dumps(found))
    for name, content in files.items():
        path = directory / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(content))


def served(directory: Path, **serving):
    return identify_served(Checkpoint.open(directory), Serving(**serving)).arch


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"], "embedding_dimension": 32}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"word_embedding_dimension": 32}, "mean"),
    ],
)
def test_the_pooling_mode(directory, fields, method):
    write(directory, POOLING, **{"1_Pooling__config": fields})
    pooling = served(directory).pooling
    assert (pooling.method, pooling.normalize) == (method, False)
    assert pooling.tasks == (PoolingTask.EMBED, PoolingTask.TOKEN_EMBED)
    write(directory, POOLING, NORMALIZE)
    assert served(directory).pooling.normalize


def test_without_pooling_there_are_rows_of_tokens_only(directory):
    write(directory)
    assert served(directory).pooling.tasks == (PoolingTask.TOKEN_EMBED,)


def test_max_seq_length_is_the_context(directory):
    write(directory, POOLING, **{"1_Pooling__config": {"pooling_mode": "cls"}, "sentence_bert_config": {}})
    assert load_model(directory).max_model_len == 64
    write(directory, POOLING, sentence_bert_config={"max_seq_length": 24, "do_lower_case": False})
    assert load_model(directory).max_model_len == 24
    assert load_model(directory, max_model_len=48).max_model_len == 48
    write(directory, POOLING, sentence_bert_config={"do_lower_case": True})
    with pytest.raises(CheckpointError, match="do_lower_case"):
        load_model(directory)


def test_files_count_unless_the_operator_says_otherwise(directory, plain):
    write(directory, POOLING, **{"1_Pooling__config": {"pooling_mode": "cls"}})
    assert served(directory).pooling is not None
    assert served(directory, runner="generate").pooling is None
    assert served(plain).pooling is None
    assert served(plain, runner="pooling").pooling.method == "last"


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ((("1_Pooling", "Pooling"), ("2_LSTM", "LSTM")), "LSTM are not supported"),
        ((("1_Normalize", "Normalize"), ("2_Pooling", "Pooling")), "in this order"),
        ((("1_Pooling", "Pooling"), ("2_Pooling", "Pooling")), "in this order"),
        ((("../../etc", "Pooling"),), "inside the checkpoint"),
        ((("/etc", "Pooling"),), "inside the checkpoint"),
        ((("a\\..\\b", "Pooling"),), "inside the checkpoint"),
        ((("x" * 300, "Pooling"),), "inside the checkpoint"),
        ((("", "Pooling"),), "no folder"),
        ((("1_Pooling", "Pooling"), (".", "Dense")), "no folder"),
        ((("1_Pooling", "Pooling"),) * 20, "has 21 modules"),
    ],
)
def test_modules_that_are_refused(directory, modules, words):
    write(directory, *modules)
    with pytest.raises(CheckpointError, match=words.replace("\\", "\\\\")) as caught:
        served(directory)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"path": ""}', "expected an array"),
        ("[", "not valid JSON"),
        ("[" * 100 + "]" * 100, "deeper"),
        ("[1]", "not a module"),
        ('[{"path": 1, "type": "Transformer"}]', "not a module"),
        ('[{"path": "0_Transformer", "type": "x.Transformer"}]', "own folder"),
        ("[]", "has 0 modules"),
    ],
)
def test_a_modules_file_that_is_none(directory, content, words):
    (directory / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        served(directory)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pooling_mode": "median"}, "pooling_mode"),
        ({"pooling_mode": ["cls", "mean"]}, "pooling_mode"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "exactly one"),
        ({"pooling_mode_mean_tokens": False}, "no pooling mode"),
        ({"pooling_mode_cls_token": "yes"}, "true or false"),
        ({"pooling_mode": [{}]}, "pooling_mode"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
    ],
)
def test_pooling_modes_that_are_refused(directory, fields, words):
    write(directory, POOLING, **{"1_Pooling__config": fields})
    with pytest.raises(CheckpointError, match=words):
        served(directory)


DENSE = {"in_features": 32, "out_features": 20, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


def with_dense(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **fields) -> None:
    write(
        directory,
        POOLING,
        ("2_Dense", "Dense"),
        **{"1_Pooling__config": {"pooling_mode": "mean"}, "2_Dense__config": {**DENSE, **fields}},
    )
    ones = {"linear.weight": torch.ones(20, 32), "linear.bias": torch.ones(20)}
    save_file(ones if tensors is None else tensors, directory / "2_Dense" / "model.safetensors")


def test_dense_layers_that_are_refused(directory):
    with_dense(directory)
    assert load_model(directory).arch.pooling.info.embedding_size == 20
    for fields, words in (
        ({"in_features": 31}, "in_features is 31"),
        ({"activation_function": "os.system"}, "activation_function"),
        ({"out_features": 0}, "out_features"),
    ):
        with_dense(directory, **fields)
        with pytest.raises(CheckpointError, match=words):
            load_model(directory)
    with_dense(directory, {"linear.weight": torch.ones(20, 32)})
    with pytest.raises(MissingTensor, match=r"2_Dense/linear\.bias"):
        load_model(directory)
    with_dense(directory, {"linear.weight": torch.ones(21, 32), "linear.bias": torch.ones(20)})
    with pytest.raises(ShapeMismatch, match=r"2_Dense/linear\.weight"):
        load_model(directory)
    with_dense(directory, {"linear.weight": torch.ones(20, 32), "linear.bias": torch.full((20,), float("nan"))})
    with pytest.raises(CheckpointError, match="finite"):
        load_model(directory)
    (directory / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2_Dense"):
        load_model(directory)
    os.mkfifo(directory / "2_Dense" / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_model(directory)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    modules=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("x.Pooling"),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["path", "type"]), inner),
        max_leaves=12,
    )
)
def test_whatever_stands_there_is_read_or_refused(tmp_path, modules):
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with contextlib.suppress(QuireError):
        read_modules(tmp_path)


def config(**fields) -> ModelConfig:
    return ModelConfig(fields, "config.json")


def test_labels():
    assert read_labels(config()) == ("LABEL_0", "LABEL_1")
    assert read_labels(config(num_labels=3)) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert read_labels(config(id2label={"1": "b", "0": "a"})) == ("a", "b")
    for fields in ({"id2label": {}}, {"id2label": {"0": "a", "2": "c"}}, {"id2label": [1]}, {"num_labels": 10**9}):
        with pytest.raises(CheckpointError):
            read_labels(config(**fields))


def test_the_activation_of_scores():
    sigmoid = "torch.nn.modules.activation.Sigmoid"
    for fields, one, three in (
        ({}, "sigmoid", "softmax"),
        ({"problem_type": "regression"}, "identity", "identity"),
        ({"problem_type": "multi_label_classification"}, "sigmoid", "sigmoid"),
        ({"problem_type": "single_label_classification"}, "sigmoid", "softmax"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "identity", "identity"),
        ({"sentence_transformers": {"activation_fn": sigmoid}, "problem_type": "regression"}, "sigmoid", "sigmoid"),
    ):
        found = tuple(read_score_activation(config(**fields), num_labels) for num_labels in (1, 3))
        assert found == (one, three), fields
    for fields in ({"problem_type": "x"}, {"sentence_transformers": {"activation_fn": "builtins.exec"}}):
        with pytest.raises(CheckpointError):
            read_score_activation(config(**fields), 1)


def test_sizes_that_vectors_may_be_cut_to():
    assert read_matryoshka(config(), 8) == ()
    assert read_matryoshka(config(is_matryoshka=True), 3) == (1, 2, 3)
    assert read_matryoshka(config(matryoshka_dimensions=[4, 2, 4]), 8) == (2, 4)
    with pytest.raises(CheckpointError, match="is_matryoshka"):
        read_matryoshka(config(is_matryoshka=True), 10**12)
    for sizes in ([0], [9], ["4"], 4):
        with pytest.raises(CheckpointError, match="matryoshka_dimensions"):
            read_matryoshka(config(matryoshka_dimensions=sizes), 8)


def test_the_operator_may_choose_the_method(directory, plain, tmp_path):
    assert served(plain, method="mean").pooling.method == "mean"
    write(directory, POOLING, **{"1_Pooling__config": {"pooling_mode": "cls"}})
    assert served(directory, method="last").pooling.method == "last"
    write(directory)
    assert PoolingTask.EMBED in served(directory, method="mean").pooling.tasks
    Qwen3ForSequenceClassification(Qwen3Config(**SHAPE)).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ConfigError, match="makes no embeddings") as caught:
        served(tmp_path / "classifier", method="mean")
    assert caught.value.param == "pooling_method"
    for fields in ({"pooling_method": "mean"}, {"classifier_tokens": "no,yes"}):
        with pytest.raises(ConfigError, match="has no effect"):
            read_serving(EngineConfig(runner="generate", **fields))


def test_tokens_to_judge_by(directory):
    for text in ("yes", "a,b,c", ",b"):
        with pytest.raises(ConfigError, match="classifier_tokens is"):
            read_serving(EngineConfig(classifier_tokens=text))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        served(directory, classifier_tokens=("no", "yes"))
    builtin = read_serving(EngineConfig(classifier_tokens="no way,yes indeed"))
    from quire.models.source import builtin_model

    with pytest.raises(ConfigError, match="tokens of 'no way'") as caught:
        identify_served(Checkpoint.open(builtin_model()), builtin)
    assert caught.value.param == "classifier_tokens"


def test_another_tokenizer_makes_the_tokens_to_judge_by(tmp_path):
    """Of texts that are named by the operator as of those that the checkpoint names."""
    for name, words in (("own", ["no", "yes", "other"]), ("else", ["?", "other", "yes", "no"])):
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        (tmp_path / name).mkdir()
        backend.save(str(tmp_path / name / "tokenizer.json"))
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(tmp_path / "own")
    for fields in ({}, {"classifier_from_token": ["no", "yes"]}):
        file = tmp_path / "own" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        asked = {} if fields else {"classifier_tokens": "no,yes"}
        for tokenizer, ids in ((None, [0, 1]), (str(tmp_path / "else"), [3, 2])):
            wish = read_serving(EngineConfig(tokenizer=tokenizer, **asked))
            choice = identify_served(Checkpoint.open(tmp_path / "own"), wish).arch.pooling.choice
            assert [choice.no, choice.yes] == ids


def test_the_plan_tells_tasks_and_the_sizes_that_are_loaded(directory, plain):
    def planned(where, **settings):
        return plan_model(where, EngineConfig(**settings), memory_available=1 << 30, bandwidth=1e9, flops=1e9)

    assert planned(plain).tasks == ("generate",)
    with_dense(directory)
    found = planned(directory)
    assert found.tasks == ("embed", "token_embed")
    assert ("tasks", "embed, token_embed") in found.rows()
    assert found.weight_bytes == load_model(directory).weight_bytes
    assert found.weight_bytes == planned(directory, runner="generate").weight_bytes - 2 * 64 * 32 + 4 * (20 * 32 + 20)


def test_a_head_without_its_tensor(tmp_path):
    Qwen3ForSequenceClassification(Qwen3Config(**SHAPE, num_labels=3)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MissingTensor, match=r"score\.weight"):
        load_model(tmp_path)


@pytest.mark.skipif(not usable_isas(), reason="no compiled kernels here")
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_head_stays_as_it_is_where_the_layers_are_rounded(directory, quantization):
    with_dense(directory)
    model = load_model(directory, quantization=quantization, threads=1)
    head = model.decoder.pooling.layers[0].linear.weight
    assert head.dtype == torch.float32
    assert torch.equal(head, torch.ones(20, 32))
    assert model.decoder.head is None
    assert model.unexpected_tensors == ()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_quantised_embedder_keeps_its_modules(directory, tmp_path, form):
    with_dense(directory)
    source = Source.open(directory, form, 32)
    write_checkpoint(source, tmp_path / "out", rounded(source, source.quantized))
    found, expected = (
        load_model(tmp_path / "out", isa="reference"),
        load_model(directory, quantization=form, isa="reference"),
    )
    assert found.arch == expected.arch
    assert found.unexpected_tensors == ()
    assert found.weight_bytes == expected.weight_bytes
    assert torch.equal(found.decoder.pooling.layers[0].linear.weight, torch.ones(20, 32))
    layers = (model.decoder.layers[1].mlp.down.weight for model in (found, expected))
    assert torch.equal(*(dequantize(weight) for weight in layers))


@pytest.mark.skipif(not usable_isas(), reason="no compiled kernels here")
def test_packed_weights_are_kept_without_a_head(directory, tmp_path, capsys):
    """And apart from those of the same checkpoint where it generates."""
    write(directory, POOLING, **{"1_Pooling__config": {"pooling_mode": "cls"}})
    found = {}
    for runner in ("auto", "generate", "auto", "generate"):
        config = EngineConfig(
            model=str(directory), num_kv_blocks=8, threads=1, runner=runner, packed_weights_cache=str(tmp_path / "kept")
        )
        engine = build_engine(config)
        assert (engine.info.pooling is None) == (runner == "generate")
        found.setdefault(runner, []).append("are kept in" in capsys.readouterr().err)
    assert found == {"auto": [True, False], "generate": [True, False]}
    assert len(list((tmp_path / "kept").iterdir())) == 2
