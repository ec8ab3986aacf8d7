"""Cases of decoders that give vectors or scores in other ways than their class's name says: by files of
sentence-transformers, by fields of config.json, by rows of the output head, and reward models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional

from conformance.case import SIZES, VOCAB, Case
from conformance.pooling import Expected, Oracle, PoolingCase, label_scores, last_vector
from conformance.rewrites import INTERNLM2
from quire.core.pooling import PoolingTask

HIDDEN = SIZES["hidden_size"]
NO, YES = 11, 74
QWEN3 = {"head_dim": 16}
Write = Callable[[Path], None]


def edited(*, prefix: str = "", tensors: Mapping[str, torch.Tensor] | None = None, **fields: Any) -> Write:
    """Changes config.json's fields, puts `prefix` before names of tensors, and adds some."""

    def write(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        weights = directory / "model.safetensors"
        named = {prefix + name: tensor for name, tensor in load_file(weights).items()}
        save_file({**named, **(tensors or {})}, weights)

    return write


def modules(*parts: tuple[str, Mapping[str, Any]], max_seq_length: int | None = None) -> Write:
    """Files of sentence-transformers: after the transformer modules of these kinds and configurations. A dense one
    gets random weights."""

    def write(directory: Path) -> None:
        found = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        for index, (kind, config) in enumerate(parts, start=1):
            path = f"{index}_{kind}"
            found.append({"path": path, "type": f"sentence_transformers.models.{kind}"})
            (directory / path).mkdir()
            (directory / path / "config.json").write_text(json.dumps(config))
            if kind == "Dense":
                save_file(dense_weights(config), directory / path / "model.safetensors")
        (directory / "modules.json").write_text(json.dumps(found))
        if max_seq_length is not None:
            size = {"max_seq_length": max_seq_length, "do_lower_case": False}
            (directory / "sentence_bert_config.json").write_text(json.dumps(size))

    return write


def dense_weights(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What `modules` writes: the same each time."""
    generator = torch.Generator().manual_seed(config["out_features"])
    shape = (config["out_features"], config["in_features"])
    weights = {"linear.weight": 0.15 * torch.randn(shape, generator=generator)}
    if config["bias"]:
        weights["linear.bias"] = torch.randn(shape[:1], generator=generator)
    return weights


def dense(out_features: int, activation: str, *, bias: bool = True, in_features: int = HIDDEN) -> dict[str, Any]:
    return {
        "in_features": in_features,
        "out_features": out_features,
        "bias": bias,
        "activation_function": f"torch.nn.modules.{activation}",
    }


def sentence_vectors(method: Callable[[torch.Tensor], torch.Tensor], *parts: tuple[str, Mapping[str, Any]]) -> Oracle:
    """The modules after pooling, as sentence-transformers defines them."""

    def expected(model: Any, tokens: torch.Tensor) -> Expected:
        rows = model(tokens).last_hidden_state[0]
        return {
            PoolingTask.EMBED: _through(method(rows)[None], parts),
            PoolingTask.TOKEN_EMBED: _through(rows, parts),
        }

    return expected


def _through(rows: torch.Tensor, parts: Sequence[tuple[str, Mapping[str, Any]]]) -> torch.Tensor:
    for kind, config in parts:
        if kind == "Normalize":
            rows = functional.normalize(rows, dim=-1)
        if kind == "Dense":
            weights = dense_weights(config)
            rows = functional.linear(rows, weights["linear.weight"], weights.get("linear.bias"))
            rows = getattr(torch.nn, config["activation_function"].rpartition(".")[2])()(rows)
    return rows


def tokenizer(directory: Path) -> None:
    """A vocabulary of words, of which two say no and yes."""
    vocab = {f"w{index}": index for index in range(VOCAB)}
    del vocab[f"w{NO}"], vocab[f"w{YES}"]
    made = Tokenizer(models.WordLevel({**vocab, "no": NO, "yes": YES}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(directory / "tokenizer.json"))


def internlm2_reward(directory: Path) -> None:
    """A Llama's checkpoint, as one of InternLM2's with a value head."""
    file, weights = directory / "config.json", directory / "model.safetensors"
    tensors, config = INTERNLM2(load_file(weights), json.loads(file.read_text()))
    del tensors["output.weight"]
    save_file({name: tensor.contiguous() for name, tensor in {**tensors, **_VALUE}.items()}, weights)
    file.write_text(json.dumps({**config, "architectures": ["InternLM2ForRewardModel"]}))


def both(*writes: Write) -> Write:
    def write(directory: Path) -> None:
        for each in writes:
            each(directory)

    return write


def yes_or_no(model: Any, tokens: torch.Tensor) -> Expected:
    logits = model(tokens).logits[:, -1, [NO, YES]]
    score = logits.softmax(-1)[:, 1:]
    return {PoolingTask.CLASSIFY: score, PoolingTask.SCORE: score}


def scores(activation: Callable[[torch.Tensor], torch.Tensor], *, one: bool = False) -> Oracle:
    def expected(model: Any, tokens: torch.Tensor) -> Expected:
        found = activation(model(tokens).logits)
        return {PoolingTask.CLASSIFY: found, **({PoolingTask.SCORE: found} if one else {})}

    return expected


def head_weights(*shapes: tuple[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes}


def deep_score(num_labels: int) -> dict[str, torch.Tensor]:
    return head_weights(
        ("score.0.weight", (HIDDEN, HIDDEN)),
        ("score.0.bias", (HIDDEN,)),
        ("score.2.weight", (num_labels, HIDDEN)),
        ("score.2.bias", (num_labels,)),
    )


def rewards(weights: Mapping[str, torch.Tensor], activation: Callable[[torch.Tensor], torch.Tensor]) -> Oracle:
    def expected(model: Any, tokens: torch.Tensor) -> Expected:
        rows = model(tokens).last_hidden_state[0]
        if "v_head.weight" in weights:
            rows = functional.linear(rows, weights["v_head.weight"])
        else:
            rows = functional.linear(rows, weights["score.0.weight"], weights["score.0.bias"]).relu()
            rows = functional.linear(rows, weights["score.2.weight"], weights["score.2.bias"])
        found = activation(rows)
        return {PoolingTask.CLASSIFY: found[-1:], PoolingTask.TOKEN_CLASSIFY: found}

    return expected


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


def _softmax(values: torch.Tensor) -> torch.Tensor:
    return values.softmax(-1)


def _made(
    architecture: str, config: str, model: str, variant: str, fields: Mapping[str, Any], **settings: Any
) -> PoolingCase:
    family = {"Ll": "InternLM", "Mi": "Mistral", "Ge": "Gemma", "Qw": "Qwen", "OP": "OPT"}[config[:2]]
    case = Case(family=family, architecture=architecture, config=config, variant=variant, fields=fields)
    return PoolingCase(case=case, model=model, **settings)


_LAST = (
    "Pooling",
    {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": True},
)
_MEAN = ("Pooling", {"embedding_dimension": HIDDEN, "pooling_mode": "mean", "include_prompt": True})
_NORMAL: tuple[str, Mapping[str, Any]] = ("Normalize", {})
_WIDE, _FLAT = dense(72, "activation.Tanh"), dense(20, "linear.Identity", bias=False, in_features=72)
_TOKENS = {"classifier_tokens": "no,yes"}
_SIGMOID = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.1"}}
_PROCESS, _REWARD = deep_score(2), deep_score(1)
_VALUE = head_weights(("v_head.weight", (1, HIDDEN)))

_NARROW: Mapping[str, Any] = {"ffn_dim": 72, "word_embed_proj_dim": 24}
_NARROW_SUMS = {**_NARROW, "do_layer_norm_before": False}

CASES: tuple[PoolingCase, ...] = (
    _made(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        "Qwen3Model",
        "embedding",
        QWEN3,
        prepare=both(edited(architectures=["Qwen3ForCausalLM"]), modules(_LAST, _NORMAL)),
        expected=sentence_vectors(lambda rows: rows[-1], _NORMAL),
    ),
    _made(
        "MistralModel",
        "MistralConfig",
        "MistralModel",
        "mean and dense",
        {"sliding_window": 24},
        prepare=modules(_MEAN, ("Dense", _WIDE), ("Dense", _FLAT)),
        expected=sentence_vectors(lambda rows: rows.mean(0), ("Dense", _WIDE), ("Dense", _FLAT)),
    ),
    _made(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        "runner pooling",
        {},
        engine={"runner": "pooling"},
        expected=lambda model, tokens: sentence_vectors(lambda rows: rows[-1], _NORMAL)(model.model, tokens),
    ),
    _made(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        "judging by two tokens",
        {**QWEN3, "tie_word_embeddings": True},
        prepare=tokenizer,
        engine=_TOKENS,
        expected=yes_or_no,
    ),
    _made(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        "judging by two tokens",
        {"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 24},
        prepare=both(tokenizer, edited(classifier_from_token=["no", "yes"])),
        expected=yes_or_no,
    ),
    _made(
        "Qwen3ForSequenceClassification",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        "judging by two tokens",
        QWEN3,
        prepare=both(
            tokenizer, edited(classifier_from_token=["no", "yes"], architectures=["Qwen3ForSequenceClassification"])
        ),
        expected=yes_or_no,
    ),
    _made(
        "Qwen2ForSequenceClassification",
        "Qwen2Config",
        "Qwen2ForSequenceClassification",
        "one label",
        {"num_labels": 1},
        expected=scores(torch.sigmoid, one=True),
    ),
    _made(
        "GemmaForSequenceClassification",
        "GemmaConfig",
        "GemmaForSequenceClassification",
        "regression",
        {"num_labels": 1, "problem_type": "regression"},
        expected=scores(_same, one=True),
    ),
    _made(
        "MistralForSequenceClassification",
        "MistralConfig",
        "MistralForSequenceClassification",
        "several labels at once",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        expected=scores(torch.sigmoid),
    ),
    _made(
        "Qwen3ForSequenceClassification",
        "Qwen3Config",
        "Qwen3ForSequenceClassification",
        "activation by name",
        {**QWEN3, "num_labels": 4, **_SIGMOID},
        expected=scores(_same),
    ),
    _made(
        "InternLM2ForRewardModel",
        "LlamaConfig",
        "LlamaForCausalLM",
        "",
        {"attention_bias": False},
        prepare=internlm2_reward,
        expected=lambda model, tokens: rewards(_VALUE, _same)(model.model, tokens),
    ),
    _made(
        "Qwen2ForProcessRewardModel",
        "Qwen2Config",
        "Qwen2Model",
        "",
        {},
        prepare=edited(prefix="model.", tensors=_PROCESS, architectures=["Qwen2ForProcessRewardModel"]),
        expected=rewards(_PROCESS, _softmax),
    ),
    _made(
        "Qwen2ForRewardModel",
        "Qwen2Config",
        "Qwen2Model",
        "",
        {},
        prepare=edited(prefix="model.", tensors=_REWARD, architectures=["Qwen2ForRewardModel"]),
        expected=rewards(_REWARD, _same),
    ),
    *(
        _made("OPTModel", "OPTConfig", "OPTModel", variant, fields, expected=last_vector)
        for variant, fields in (("projected", _NARROW), ("projected, norms of the stream", _NARROW_SUMS))
    ),
    _made(
        "OPTForSequenceClassification",
        "OPTConfig",
        "OPTForSequenceClassification",
        "projected",
        {**_NARROW, "num_labels": 3},
        expected=label_scores,
    ),
    _made(
        "OPTForCausalLM",
        "OPTConfig",
        "OPTForCausalLM",
        "projected, judging by two tokens",
        _NARROW,
        prepare=tokenizer,
        engine=_TOKENS,
        expected=yes_or_no,
    ),
)
