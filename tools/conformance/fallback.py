"""What `transformers` serves, with quire's attention and cache: its own classes, each with its own tiny checkpoint, and
those that are refused, with a word of why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.case import Case
from quire.models.registry import model_registry

_TEXT: Mapping[str, str] = {
    "AfmoeForCausalLM": "AfmoeConfig",
    "AriaTextForCausalLM": "AriaTextConfig",
    "BeamForCausalLM": "BeamConfig",
    "BertGenerationDecoder": "BertGenerationConfig",
    "BertLMHeadModel": "BertConfig",
    "BioGptForCausalLM": "BioGptConfig",
    "BitNetForCausalLM": "BitNetConfig",
    "CTRLLMHeadModel": "CTRLConfig",
    "Cohere2MoeForCausalLM": "Cohere2MoeConfig",
    "DeepseekV2ForCausalLM": "DeepseekV2Config",
    "DeepseekV3ForCausalLM": "DeepseekV3Config",
    "DiffLlamaForCausalLM": "DiffLlamaConfig",
    "ElectraForCausalLM": "ElectraConfig",
    "ErnieForCausalLM": "ErnieConfig",
    "FlintForCausalLM": "FlintConfig",
    "Gemma4UnifiedForCausalLM": "Gemma4UnifiedTextConfig",
    "Glm4MoeLiteForCausalLM": "Glm4MoeLiteConfig",
    "GraniteMoeSWAForCausalLM": "GraniteMoeSWAConfig",
    "HYV3ForCausalLM": "HYV3Config",
    "HrmTextForCausalLM": "HrmTextConfig",
    "JetMoeForCausalLM": "JetMoeConfig",
    "Kolibri1ForCausalLM": "Kolibri1Config",
    "LagunaForCausalLM": "LagunaConfig",
    "MiMoV2FlashForCausalLM": "MiMoV2FlashConfig",
    "MiniCPM3ForCausalLM": "MiniCPM3Config",
    "MiniMaxM3VLForCausalLM": "MiniMaxM3VLTextConfig",
    "Mistral4ForCausalLM": "Mistral4Config",
    "ModernBertDecoderForCausalLM": "ModernBertDecoderConfig",
    "MoshiForCausalLM": "MoshiConfig",
    "NanoChatForCausalLM": "NanoChatConfig",
    "RoCBertForCausalLM": "RoCBertConfig",
    "WhisperForCausalLM": "WhisperConfig",
    "YoutuForCausalLM": "YoutuConfig",
}
"""Models of text, by the name in config.json, with the configuration that makes their oracle."""

_TEXT_OF: Mapping[str, str] = {
    "AriaForConditionalGeneration": "AriaConfig",
    "AyaVisionForConditionalGeneration": "AyaVisionConfig",
    "ChameleonForConditionalGeneration": "ChameleonConfig",
    "Cohere2VisionForConditionalGeneration": "Cohere2VisionConfig",
    "Cosmos3EdgeForConditionalGeneration": "Cosmos3EdgeConfig",
    "Cosmos3OmniForConditionalGeneration": "Cosmos3OmniConfig",
    "DeepseekVLForConditionalGeneration": "DeepseekVLConfig",
    "Exaone4_5_ForConditionalGeneration": "Exaone4_5_Config",
    "FuyuForCausalLM": "FuyuConfig",
    "Gemma3ForConditionalGeneration": "Gemma3Config",
    "Glm46VForConditionalGeneration": "Glm46VConfig",
    "Glm4vForConditionalGeneration": "Glm4vConfig",
    "Glm4vMoeForConditionalGeneration": "Glm4vMoeConfig",
    "GlmOcrForConditionalGeneration": "GlmOcrConfig",
    "GraniteDoclingForConditionalGeneration": "GraniteDoclingConfig",
    "HunYuanVLForConditionalGeneration": "HunYuanVLConfig",
    "HyperCLOVAXVisionV2ForConditionalGeneration": "HyperCLOVAXVisionV2Config",
    "Idefics2ForConditionalGeneration": "Idefics2Config",
    "Idefics3ForConditionalGeneration": "Idefics3Config",
    "InternVLForConditionalGeneration": "InternVLConfig",
    "JanusForConditionalGeneration": "JanusConfig",
    "Kimi_K25ForConditionalGeneration": "Kimi_K25Config",
    "LightOnOcrForConditionalGeneration": "LightOnOcrConfig",
    "Llama4ForConditionalGeneration": "Llama4Config",
    "LlavaForConditionalGeneration": "LlavaConfig",
    "LlavaNextForConditionalGeneration": "LlavaNextConfig",
    "LlavaNextVideoForConditionalGeneration": "LlavaNextVideoConfig",
    "LlavaOnevisionForConditionalGeneration": "LlavaOnevisionConfig",
    "MiniMaxM3SparseForConditionalGeneration": "MiniMaxM3VLConfig",
    "Mistral3ForConditionalGeneration": "Mistral3Config",
    "MllamaForConditionalGeneration": "MllamaConfig",
    "Molmo2ForConditionalGeneration": "Molmo2Config",
    "MossTranscribeDiarizeForConditionalGeneration": "MossTranscribeDiarizeConfig",
    "MuseGlimmerForConditionalGeneration": "MuseGlimmerConfig",
    "Ovis2ForConditionalGeneration": "Ovis2Config",
    "PaddleOCRVLForConditionalGeneration": "PaddleOCRVLConfig",
    "Phi4MultimodalForCausalLM": "Phi4MultimodalConfig",
    "QianfanOCRForConditionalGeneration": "QianfanOCRConfig",
    "Qwen2VLForConditionalGeneration": "Qwen2VLConfig",
    "Qwen2_5OmniThinkerForConditionalGeneration": "Qwen2_5OmniThinkerConfig",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VLConfig",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "Qwen3OmniMoeThinkerConfig",
    "Qwen3VLForConditionalGeneration": "Qwen3VLConfig",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLMoeConfig",
    "SmolVLMForConditionalGeneration": "SmolVLMConfig",
    "Step3p7ForConditionalGeneration": "Step3p7Config",
    "VideoLlama3ForConditionalGeneration": "VideoLlama3Config",
    "VideoLlavaForConditionalGeneration": "VideoLlavaConfig",
    "VipLlavaForConditionalGeneration": "VipLlavaConfig",
}
"""Models that see or hear as well; of these, text alone is served."""

_REFUSED: Mapping[str, tuple[str, str]] = {
    "BailingHybridForCausalLM": ("BailingHybridConfig", "recurrent"),
    "BartForCausalLM": ("BartConfig", "trial prompt|in chunks"),
    "BigBirdForCausalLM": ("BigBirdConfig", "attention interface"),
    "BlenderbotForCausalLM": ("BlenderbotConfig", "trial prompt|in chunks"),
    "CpmAntForCausalLM": ("CpmAntConfig", "attention interface"),
    "DeepseekV4ForCausalLM": ("DeepseekV4Config", "recurrent"),
    "DogeForCausalLM": ("DogeConfig", "Mask"),
    "GPTNeoXJapaneseForCausalLM": ("GPTNeoXJapaneseConfig", "attention interface"),
    "HYV4ForCausalLM": ("HYV4Config", "layers of type"),
    "InklingForCausalLM": ("InklingTextConfig", "layers of type"),
    "KimiLinearForCausalLM": ("KimiLinearConfig", "recurrent"),
    "Lfm3ForCausalLM": ("Lfm3Config", "layers of type"),
    "MarianForCausalLM": ("MarianConfig", "trial prompt|in chunks"),
    "MegatronBertForCausalLM": ("MegatronBertConfig", "attention interface"),
    "MiniMaxForCausalLM": ("MiniMaxConfig", "layers of type"),
    "OlmoHybridForCausalLM": ("OlmoHybridConfig", "recurrent"),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", "attention interface"),
    "PaliGemmaForConditionalGeneration": ("PaliGemmaConfig", "not causal"),
    "PegasusForCausalLM": ("PegasusConfig", "trial prompt|in chunks"),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", "recurrent"),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", "recurrent"),
    "RemBertForCausalLM": ("RemBertConfig", "attention interface"),
    "RwkvForCausalLM": ("RwkvConfig", "recurrent"),
    "XGLMForCausalLM": ("XGLMConfig", "attention interface"),
}
"""Architectures of transformers that are refused when they are loaded, and a word of the reason."""

_WHY: Mapping[str, str] = {
    "recurrent": "some layers keep a recurrent state",
    "trial prompt|in chunks": "positions are not told to its decoder",
    "attention interface": "its attention does not go through transformers' attention interface",
    "Mask": "it computes a mask of its own",
    "layers of type": "some layers are of another kind than attention to all, to a window or in chunks",
    "not causal": "a prompt's tokens see each other",
}
_DECODERS = (
    "BertGenerationDecoder",
    "BertLMHeadModel",
    "ElectraForCausalLM",
    "ErnieForCausalLM",
    "RoCBertForCausalLM",
)
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"is_decoder": True} for name in _DECODERS},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 4}},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [0, 1]}},
}


def _case(architecture: str, config: str, family: str) -> Case:
    fields = _FIELDS.get(architecture, {})
    return Case(family=family, architecture=architecture, config=config, fields=fields, served_by="transformers")


_NATIVE = frozenset(model_registry().names())
CASES = (
    *(_case(name, _TEXT[name], "text") for name in _TEXT if name not in _NATIVE),
    *(_case(name, _TEXT_OF[name], "text alone") for name in _TEXT_OF if name not in _NATIVE),
)
REFUSED = tuple(
    (_case(name, config, "refused"), word) for name, (config, word) in _REFUSED.items() if name not in _NATIVE
)
REASONS = {case.architecture: _WHY[word] for case, word in REFUSED}
