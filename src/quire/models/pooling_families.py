"""The pooling models among decoders: what a family's checkpoints are called that have another head than the one for
tokens, or none. The blocks, the flags and the names of tensors are the family's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from quire.core.pooling import PoolingTask
from quire.models.arch import Arch
from quire.models.family import Family
from quire.models.model_config import ModelConfig
from quire.models.pooling_fields import classification, embedding, read_labels, token_classification
from quire.nn.pooling_config import HeadLayer, PoolingConfig

SCORE, CLASSIFIER = "score", "classifier"


@dataclass(frozen=True, slots=True)
class Stem:
    """What the names of `family`'s pooling models begin with; its head for sequences, and its head for tokens, by
    their modules' names; None where `transformers` has no such model."""

    family: str
    name: str
    sequence: str | None = None
    token: str | None = None


STEMS = (
    Stem("ApertusForCausalLM", "Apertus", None, SCORE),
    Stem("ArceeForCausalLM", "Arcee", SCORE, SCORE),
    Stem("BloomForCausalLM", "Bloom", SCORE, CLASSIFIER),
    Stem("CodeGenForCausalLM", "CodeGen"),
    Stem("Cohere2ForCausalLM", "Cohere2"),
    Stem("CohereForCausalLM", "Cohere"),
    Stem("CwmForCausalLM", "Cwm"),
    Stem("DbrxForCausalLM", "Dbrx"),
    Stem("Dots1ForCausalLM", "Dots1"),
    Stem("Ernie4_5ForCausalLM", "Ernie4_5"),
    Stem("Ernie4_5_MoeForCausalLM", "Ernie4_5_Moe"),
    Stem("Exaone4ForCausalLM", "Exaone4", SCORE, SCORE),
    Stem("ExaoneMoeForCausalLM", "ExaoneMoe"),
    Stem("FalconForCausalLM", "Falcon", SCORE, CLASSIFIER),
    Stem("FlexOlmoForCausalLM", "FlexOlmo"),
    Stem("GPT2LMHeadModel", "GPT2", SCORE, CLASSIFIER),
    Stem("GPTBigCodeForCausalLM", "GPTBigCode", SCORE, CLASSIFIER),
    Stem("GPTJForCausalLM", "GPTJ", SCORE),
    Stem("GPTNeoForCausalLM", "GPTNeo", SCORE, CLASSIFIER),
    Stem("GPTNeoXForCausalLM", "GPTNeoX", SCORE, CLASSIFIER),
    Stem("Gemma2ForCausalLM", "Gemma2", SCORE, SCORE),
    Stem("Gemma3ForCausalLM", "Gemma3Text", SCORE),
    Stem("GemmaForCausalLM", "Gemma", SCORE, SCORE),
    Stem("Glm4ForCausalLM", "Glm4", SCORE, SCORE),
    Stem("Glm4MoeForCausalLM", "Glm4Moe"),
    Stem("GlmForCausalLM", "Glm", SCORE, SCORE),
    Stem("GptOssForCausalLM", "GptOss", SCORE, SCORE),
    Stem("GraniteForCausalLM", "Granite"),
    Stem("GraniteMoeForCausalLM", "GraniteMoe"),
    Stem("GraniteMoeSharedForCausalLM", "GraniteMoeShared"),
    Stem("GraniteSWAForCausalLM", "GraniteSWA"),
    Stem("HeliumForCausalLM", "Helium", SCORE, SCORE),
    Stem("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1", SCORE),
    Stem("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1", SCORE),
    Stem("HyperCLOVAXForCausalLM", "HyperCLOVAX"),
    Stem("Jais2ForCausalLM", "Jais2"),
    Stem("Llama4ForCausalLM", "Llama4Text"),
    Stem("LlamaForCausalLM", "Llama", SCORE, SCORE),
    Stem("MellumForCausalLM", "Mellum"),
    Stem("MiniMaxM2ForCausalLM", "MiniMaxM2"),
    Stem("Ministral3ForCausalLM", "Ministral3", SCORE, SCORE),
    Stem("MinistralForCausalLM", "Ministral", SCORE, SCORE),
    Stem("MistralForCausalLM", "Mistral", SCORE, SCORE),
    Stem("MixtralForCausalLM", "Mixtral", SCORE, SCORE),
    Stem("MptForCausalLM", "Mpt", SCORE, CLASSIFIER),
    Stem("NemotronForCausalLM", "Nemotron", SCORE, SCORE),
    Stem("OPTForCausalLM", "OPT", SCORE),
    Stem("Olmo2ForCausalLM", "Olmo2", SCORE),
    Stem("Olmo3ForCausalLM", "Olmo3", SCORE),
    Stem("OlmoForCausalLM", "Olmo", SCORE),
    Stem("OlmoeForCausalLM", "Olmoe"),
    Stem("PersimmonForCausalLM", "Persimmon", SCORE, SCORE),
    Stem("Phi3ForCausalLM", "Phi3", SCORE, SCORE),
    Stem("PhiForCausalLM", "Phi", SCORE, SCORE),
    Stem("PhimoeForCausalLM", "Phimoe", SCORE),
    Stem("Qwen2ForCausalLM", "Qwen2", SCORE, SCORE),
    Stem("Qwen2MoeForCausalLM", "Qwen2Moe", SCORE, SCORE),
    Stem("Qwen3ForCausalLM", "Qwen3", SCORE, SCORE),
    Stem("Qwen3MoeForCausalLM", "Qwen3Moe", SCORE, SCORE),
    Stem("SeedOssForCausalLM", "SeedOss", SCORE, SCORE),
    Stem("SmolLM3ForCausalLM", "SmolLM3", SCORE, SCORE),
    Stem("StableLmForCausalLM", "StableLm", SCORE, SCORE),
    Stem("Starcoder2ForCausalLM", "Starcoder2", SCORE, SCORE),
    Stem("VaultGemmaForCausalLM", "VaultGemma"),
)

Read = Callable[[ModelConfig, Arch], PoolingConfig]


def pooled(family: Family, architecture: str, read: Read) -> Family:
    """The family's blocks under another name, with a head that `read` describes instead of the one for tokens."""

    def arch(config: ModelConfig) -> Arch:
        plain = family.arch(config)
        return replace(plain, lm_head=False, pooling=read(config, plain))

    return replace(family, architecture=architecture, arch=arch)


def pooling_families(families: dict[str, Family]) -> Iterator[Family]:
    """Of those families by architecture that have pooling models."""
    for stem in STEMS:
        family = families[stem.family]
        yield pooled(family, f"{stem.name}Model", vectors)
        if stem.sequence is not None:
            yield pooled(family, f"{stem.name}ForSequenceClassification", _sequence(stem.sequence))
        if stem.token is not None:
            yield pooled(family, f"{stem.name}ForTokenClassification", _token(stem.token))
    for name, base, read in _REWARD_MODELS:
        yield pooled(families[base], name, read)


def vectors(config: ModelConfig, arch: Arch) -> PoolingConfig:
    """Of a decoder without a head: where tokens see only what is before them, just the last one has seen all."""
    return embedding(config, arch.output_size, method="last" if arch.causal else "mean")


def _sequence(module: str) -> Read:
    return lambda config, arch: classification(config, arch.output_size, method="last", module=module, bias=False)


def _token(module: str) -> Read:
    return lambda config, arch: token_classification(config, arch.output_size, module=module, bias=True)


def _qwen2_reward(_config: ModelConfig, arch: Arch) -> PoolingConfig:
    return _deep_score(arch, ("reward",))


def _qwen2_process(config: ModelConfig, arch: Arch) -> PoolingConfig:
    return replace(_deep_score(arch, read_labels(config)), activation="softmax")


def _internlm2_reward(_config: ModelConfig, arch: Arch) -> PoolingConfig:
    return _reward(arch, ("reward",), (_layer(arch, "v_head", 1, bias=False),))


def _deep_score(arch: Arch, labels: tuple[str, ...]) -> PoolingConfig:
    """Two layers, of which the checkpoint counts the activation between them as well."""
    first = replace(_layer(arch, "score.0", arch.output_size, bias=True), activation="relu")
    return _reward(arch, labels, (first, _layer(arch, "score.2", len(labels), bias=True)))


def _reward(arch: Arch, labels: tuple[str, ...], layers: tuple[HeadLayer, ...]) -> PoolingConfig:
    """A judgement of every token, of which that of the last one is about the whole."""
    return PoolingConfig(
        tasks=(PoolingTask.CLASSIFY, PoolingTask.TOKEN_CLASSIFY),
        method="last",
        hidden_size=arch.output_size,
        layers=layers,
        labels=labels,
    )


def _layer(arch: Arch, module: str, size: int, *, bias: bool) -> HeadLayer:
    return HeadLayer(module=module, in_size=arch.output_size, out_size=size, bias=bias)


_REWARD_MODELS: tuple[tuple[str, str, Read], ...] = (
    ("InternLM2ForRewardModel", "InternLM2ForCausalLM", _internlm2_reward),
    ("Qwen2ForProcessRewardModel", "Qwen2ForCausalLM", _qwen2_process),
    ("Qwen2ForRewardModel", "Qwen2ForCausalLM", _qwen2_reward),
)
