"""The cases: each architecture that is served, with the settings that change what it computes."""

from __future__ import annotations

from typing import Any

from conformance import rewrites
from conformance.case import VOCAB, Case, cases


def rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1000.0, **fields}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
FACTORS = {"short_factor": [1.0 + index / 9 for index in range(6)], "long_factor": [9.0] * 6}
LONGROPE = rope("longrope", factor=2.0, original_max_position_embeddings=200, **FACTORS)
WINDOW = {"sliding_window": 24}
FULL, SLIDING = "full_attention", "sliding_attention"
ALTERNATING = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING], **WINDOW}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

GPT = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 4}
MPT = {"vocab_size": VOCAB, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}
FALCON = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

LOCAL: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 1.7,
}

LLAMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 12,
    "num_local_experts": 6,
    "num_experts_per_tok": 1,
    "intermediate_size": 40,
    "intermediate_size_mlp": 72,
    "attention_chunk_size": 32,
    "floor_scale": 40,
    "no_rope_layers": [1, 0, 1, 1],
}

CASES: tuple[Case, ...] = (
    *cases(
        "Llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "": {},
            "head dim 40": {"head_dim": 40},
            "scaled by layer": {**GPT, "scale_attn_by_inverse_layer_idx": True},
            "odd sizes": {
                "hidden_size": 100,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
                "intermediate_size": 101,
            },
            "tied biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
            "gelu": {"hidden_act": "gelu"},
            "linear rope": rope("linear", factor=3.0),
            "dynamic rope": rope("dynamic", factor=2.0),
            "llama3 rope": LLAMA3,
            "yarn rope": YARN,
            "longrope": LONGROPE,
        },
    ),
    *cases(
        "Mistral",
        "MistralForCausalLM",
        "MistralConfig",
        {
            "": WINDOW,
            "no window": {"sliding_window": None},
        },
    ),
    *cases(
        "Mistral",
        "MinistralForCausalLM",
        "MinistralConfig",
        {
            "": {"head_dim": 16, **ALTERNATING},
        },
    ),
    *cases(
        "Mistral",
        "Ministral3ForCausalLM",
        "Ministral3Config",
        {
            "": {
                "head_dim": 16,
                **rope(
                    "yarn",
                    factor=4.0,
                    original_max_position_embeddings=64,
                    llama_4_scaling_beta=0.1,
                    mscale=1.0,
                    mscale_all_dim=1.0,
                ),
            },
        },
    ),
    *cases(
        "Qwen",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            "": {},
            "some windows": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},
            "window not used": {"use_sliding_window": False, **WINDOW},
        },
    ),
    *cases(
        "Qwen",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            "": {"head_dim": 24},
            "default head dim": {},
            "biases yarn rope": {"head_dim": 16, "attention_bias": True, **YARN},
        },
    ),
    *cases(
        "Qwen",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "": {**EXPERTS, "norm_topk_prob": True},
            "some dense": {
                **EXPERTS,
                "num_hidden_layers": 4,
                "head_dim": 24,
                "mlp_only_layers": [2],
                "decoder_sparse_step": 2,
            },
            "all experts": {**EXPERTS, "num_experts_per_tok": 6},
        },
    ),
    *cases(
        "Phi",
        "PhiForCausalLM",
        "PhiConfig",
        {
            "": {"num_key_value_heads": 4},
            "qk layernorm": {"qk_layernorm": True, "hidden_size": 64},
        },
    ),
    *cases(
        "Phi",
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "": WINDOW,
            "longrope": {"original_max_position_embeddings": 200, **rope("longrope", **FACTORS)},
            "partial rope": {"hidden_size": 64, **rope("default", partial_rotary_factor=0.75)},
        },
    ),
    *cases(
        "Gemma",
        "GemmaForCausalLM",
        "GemmaConfig",
        {
            "": {"head_dim": 16},
        },
    ),
    *cases(
        "Gemma",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            "": {"head_dim": 16, "query_pre_attn_scalar": 20, **ALTERNATING},
            "no caps": {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None, **WINDOW},
        },
    ),
    *cases(
        "Gemma",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "": {"head_dim": 16, "query_pre_attn_scalar": 20, **ALTERNATING},
            "linear rope": {
                "head_dim": 16,
                "num_hidden_layers": 6,
                "rope_parameters": {
                    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                    SLIDING: {"rope_type": "default", "rope_theta": 500.0},
                },
                **WINDOW,
            },
        },
    ),
    *cases(
        "Gemma",
        "VaultGemmaForCausalLM",
        "VaultGemmaConfig",
        {
            "": {"head_dim": 16, **ALTERNATING},
        },
    ),
    *cases(
        "Granite",
        "GraniteForCausalLM",
        "GraniteConfig",
        {
            "": {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.4,
                "attention_multiplier": 0.2,
                "logits_scaling": 4.0,
            },
            "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        },
    ),
    *cases(
        "Granite",
        "HyperCLOVAXForCausalLM",
        "HyperCLOVAXConfig",
        {
            "": {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.4,
                "attention_multiplier": 0.2,
                "logits_scaling": 0.3,
            },
        },
    ),
    *cases(
        "MiniCPM",
        "MiniCPMForCausalLM",
        "GraniteConfig",
        {
            "": {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 1.4 / 2**0.5,
                "attention_multiplier": 12**-0.5,
                "logits_scaling": 4.0,
                "tie_word_embeddings": True,
            }
        },
        rewrite=rewrites.MINICPM,
    ),
    *cases(
        "Cohere",
        "CohereForCausalLM",
        "CohereConfig",
        {
            "": {},
            "qk norm": {"use_qk_norm": True, "logit_scale": 0.5, "attention_bias": True},
        },
    ),
    *cases(
        "Cohere",
        "Cohere2ForCausalLM",
        "Cohere2Config",
        {
            "": ALTERNATING,
        },
    ),
    *cases(
        "GLM",
        "GlmForCausalLM",
        "GlmConfig",
        {
            "": {"head_dim": 16},
            "no bias": {"head_dim": 24, "attention_bias": False},
        },
    ),
    *cases(
        "GLM",
        "Glm4ForCausalLM",
        "Glm4Config",
        {
            "": {"head_dim": 16},
        },
    ),
    *cases("EXAONE", "ExaoneForCausalLM", "LlamaConfig", rewrite=rewrites.EXAONE3),
    *cases(
        "EXAONE",
        "Exaone4ForCausalLM",
        "Exaone4Config",
        {
            "": ALTERNATING,
            "no window": {"sliding_window": None, "layer_types": [FULL] * 2},
        },
    ),
    *cases(
        "OLMo",
        "OlmoForCausalLM",
        "OlmoConfig",
        {
            "": {},
            "clipped": {"clip_qkv": 0.5},
        },
    ),
    *cases("OLMo", "Olmo2ForCausalLM", "Olmo2Config"),
    *cases(
        "OLMo",
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {
            "": ALTERNATING,
        },
    ),
    *cases(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {
            "": {"num_hidden_layers": 4},
            "windows": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, **WINDOW},
        },
    ),
    *cases(
        "Seed-OSS",
        "SeedOssForCausalLM",
        "SeedOssConfig",
        {
            "": {"head_dim": 16},
            "out bias": {"head_dim": 16, "attention_bias": False, "attention_out_bias": True},
        },
    ),
    *cases("Arcee", "ArceeForCausalLM", "ArceeConfig"),
    *cases("Jais", "Jais2ForCausalLM", "Jais2Config"),
    *cases(
        "Helium",
        "HeliumForCausalLM",
        "HeliumConfig",
        {
            "": {"head_dim": 12},
        },
    ),
    *cases(
        "ERNIE",
        "Ernie4_5ForCausalLM",
        "Ernie4_5Config",
        {
            "": {"head_dim": 16},
            "biases": {"head_dim": 16, "use_bias": True},
        },
    ),
    *cases(
        "Hunyuan",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanDenseV1Config",
        {
            "": {"head_dim": 12},
            "alpha": {"head_dim": 12, **rope("dynamic", alpha=50.0, factor=1.0)},
        },
    ),
    *cases(
        "StarCoder",
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        {
            "": WINDOW,
        },
    ),
    *cases(
        "StableLM",
        "StableLmForCausalLM",
        "StableLmConfig",
        {
            "": {"hidden_size": 64},
            "qk layernorm": {"hidden_size": 64, "qk_layernorm": True},
            "parallel": {"hidden_size": 64, "use_parallel_residual": True, "use_qkv_bias": True},
        },
    ),
    *cases("Nemotron", "NemotronForCausalLM", "NemotronConfig"),
    *cases("Llama", "AquilaForCausalLM", "LlamaConfig", rewrite=rewrites.SAME),
    *cases("Llama", "AquilaModel", "LlamaConfig", rewrite=rewrites.SAME),
    *cases("Llama", "XverseForCausalLM", "LlamaConfig", rewrite=rewrites.SAME),
    *cases("Llama", "IQuestCoderForCausalLM", "IQuestCoderConfig", {"": {"head_dim": 16}}, rewrite=rewrites.SAME),
    *cases(
        "Llama",
        "CwmForCausalLM",
        "CwmConfig",
        {"": {"head_dim": 16, "num_hidden_layers": 5, "bos_token_id": 1, "eos_token_id": 2, **LLAMA3, **WINDOW}},
    ),
    *cases(
        "Llama",
        "OrionForCausalLM",
        "StableLmConfig",
        {"": rope("default", partial_rotary_factor=1.0)},
        rewrite=rewrites.ORION,
    ),
    *cases(
        "Qwen",
        "QWenLMHeadModel",
        "Qwen2Config",
        {"": {"num_key_value_heads": 4, "hidden_act": "silu"}},
        rewrite=rewrites.QWEN1,
    ),
    *cases("InternLM", "InternLMForCausalLM", "LlamaConfig", {"": {"attention_bias": True}}, rewrite=rewrites.INTERNLM),
    *cases(
        "InternLM", "InternLM2ForCausalLM", "LlamaConfig", {"": {"attention_bias": False}}, rewrite=rewrites.INTERNLM2
    ),
    *cases(
        "InternLM",
        "InternLM3ForCausalLM",
        "InternLM3Config",
        {"": {"head_dim": 16}, "biases": {"head_dim": 16, "attention_bias": True, "mlp_bias": True}},
        rewrite=rewrites.SAME,
    ),
    *cases(
        "Baichuan", "BaichuanForCausalLM", "LlamaConfig", {"": {"num_key_value_heads": 4}}, rewrite=rewrites.BAICHUAN
    ),
    *cases(
        "Baichuan", "BaiChuanForCausalLM", "LlamaConfig", {"": {"num_key_value_heads": 4}}, rewrite=rewrites.BAICHUAN
    ),
    *cases(
        "GPT",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "": GPT,
            "scaled by layer": {**GPT, "scale_attn_by_inverse_layer_idx": True},
            "odd sizes": {**GPT, "n_inner": 70, "activation_function": "relu", "scale_attn_weights": False},
        },
        sizes=False,
    ),
    *cases(
        "GPT",
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"": GPT, "a key for each head": {**GPT, "multi_query": False}},
        sizes=False,
    ),
    *cases(
        "GPT",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "": {
                "vocab_size": VOCAB,
                "hidden_size": 48,
                "num_layers": 2,
                "num_heads": 4,
                "max_position_embeddings": 256,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 24,
            }
        },
        sizes=False,
    ),
    *cases("GPT", "GPTJForCausalLM", "GPTJConfig", {"": {**GPT, "rotary_dim": 8}}, sizes=False),
    *cases("GPT", "CodeGenForCausalLM", "CodeGenConfig", {"": {**GPT, "rotary_dim": 8}}, sizes=False),
    *cases(
        "GPT-NeoX",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            "": {"hidden_size": 64},
            "in a row": {
                "hidden_size": 64,
                "use_parallel_residual": False,
                "attention_bias": False,
                **rope("default", partial_rotary_factor=1.0),
            },
        },
    ),
    *cases(
        "Persimmon",
        "PersimmonForCausalLM",
        "PersimmonConfig",
        {"": {"hidden_size": 64}, "no qk norm": {"hidden_size": 64, "qk_layernorm": False}},
    ),
    *cases(
        "OPT",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "": {"ffn_dim": 72, "word_embed_proj_dim": 48},
            "no biases": {"ffn_dim": 72, "word_embed_proj_dim": 48, "enable_bias": False},
        },
    ),
    *cases("BLOOM", "BloomForCausalLM", "BloomConfig", {"": BLOOM, "6 heads": {**BLOOM, "n_head": 6}}, sizes=False),
    *cases(
        "MPT",
        "MptForCausalLM",
        "MptConfig",
        {"": MPT, "clipped": {**MPT, "n_heads": 6, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2}}},
        sizes=False,
    ),
    *cases(
        "Falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {
            "": FALCON,
            "new decoder": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
            "new decoder with one norm": {
                **FALCON,
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1,
            },
        },
        sizes=False,
    ),
    # The oracle's eager attention adds the slopes twice.
    *cases(
        "Falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {"slopes in a row": {**FALCON, "alibi": True, "bias": True, "parallel_attn": False, "multi_query": False}},
        sizes=False,
        attention="sdpa",
    ),
    *cases(
        "Mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        {"": LOCAL, "window": {**LOCAL, **WINDOW, "num_experts_per_tok": 3}},
    ),
    *cases(
        "Mixtral",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {
            "": {**LOCAL, "attention_bias": True, "lm_head_bias": True},
            "wide mixer": {**LOCAL, "router_jitter_noise": 0.9},
        },
    ),
    *cases("Mixtral", "MiniMaxM2ForCausalLM", "MiniMaxM2Config", {"": {**LOCAL, "head_dim": 16, "rotary_dim": 8}}),
    *cases(
        "Qwen",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            "": {**EXPERTS, "shared_expert_intermediate_size": 56},
            "some dense": {
                **EXPERTS,
                "shared_expert_intermediate_size": 56,
                "num_hidden_layers": 4,
                "decoder_sparse_step": 2,
                "norm_topk_prob": True,
                "qkv_bias": False,
            },
        },
    ),
    *cases(
        "OLMo",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {
            "": {"num_experts": 6, "num_experts_per_tok": 2},
            "renormalised": {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True},
        },
    ),
    *cases("OLMo", "FlexOlmoForCausalLM", "FlexOlmoConfig", {"": {"num_experts": 6, "num_experts_per_tok": 2}}),
    *cases(
        "Granite",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {"": {**LOCAL, "attention_multiplier": 0.2, "residual_multiplier": 0.4}},
    ),
    *cases(
        "Granite",
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {"": {**LOCAL, "shared_intermediate_size": 56}},
    ),
    *cases(
        "DBRX",
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "": {
                "vocab_size": VOCAB,
                "d_model": 48,
                "n_heads": 4,
                "n_layers": 2,
                "max_seq_len": 256,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1000.0},
                "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 6, "moe_top_k": 2},
            }
        },
        sizes=False,
    ),
    *cases(
        "GLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            "": {**ROUTED, "head_dim": 16, "first_k_dense_replace": 1, "attention_bias": True},
            "groups": {**ROUTED, "head_dim": 16, "n_group": 3, "topk_group": 2, "use_qk_norm": True},
        },
    ),
    *cases(
        "dots",
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            "": {
                **ROUTED,
                "head_dim": 16,
                "first_k_dense_replace": 1,
                "max_window_layers": 2,
                "norm_topk_prob": True,
                **WINDOW,
            }
        },
    ),
    *cases(
        "ERNIE",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"": {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 40, "num_hidden_layers": 3}},
    ),
    *cases(
        "Hunyuan",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {"": {"head_dim": 12, "num_experts": 6, "moe_topk": 2}},
    ),
    *cases(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "": {
                **LOCAL,
                "head_dim": 16,
                **WINDOW,
                **rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False),
            },
            "tight bound": {**LOCAL, "head_dim": 16, "swiglu_limit": 0.5, **WINDOW, **rope("default")},
        },
    ),
    *cases("Apertus", "ApertusForCausalLM", "ApertusConfig", {"": LLAMA3}),
    *cases(
        "Solar", "SolarOpenForCausalLM", "SolarOpenConfig", {"": {**ROUTED, "head_dim": 16, "first_k_dense_replace": 1}}
    ),
    *cases(
        "EXAONE",
        "ExaoneMoeForCausalLM",
        "ExaoneMoeConfig",
        {
            "": {
                **ALTERNATING,
                "head_dim": 16,
                "num_experts": 6,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 40,
                "n_group": 3,
                "topk_group": 2,
            }
        },
    ),
    *cases(
        "Qwen",
        "MellumForCausalLM",
        "MellumConfig",
        {"": {**EXPERTS, **ALTERNATING, "head_dim": 16, "mlp_layer_types": ["sparse", "dense", "sparse"]}},
    ),
    *cases(
        "Granite",
        "GraniteSWAForCausalLM",
        "GraniteSWAConfig",
        {"": {**ALTERNATING, "layer_rope_theta": [1000.0, 0, 500.0], "attention_multiplier": 0.2}},
    ),
    *cases(
        "Llama",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "": LLAMA4,
            "two experts": {
                **LLAMA4,
                "num_experts_per_tok": 2,
                "moe_layers": [1, 2],
                "use_qk_norm": False,
                "attention_chunk_size": 64,
                **LLAMA3,
            },
        },
    ),
)
