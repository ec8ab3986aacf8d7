"""Write a random-weight checkpoint of a published shape, so that benchmarks run without a download.

    python tools/make_checkpoint.py --shape qwen3-0.6b /tmp/qwen3-0.6b
    python tools/make_checkpoint.py --shape qwen3-30b-a3b --layers 4 /tmp/qwen3-30b-a3b-4

The directory is in Hugging Face format: config.json, safetensors shards with an index, a byte-level BPE tokenizer of
the right vocabulary size, generation_config.json. A shard is written tensor by tensor, in slices, so that memory stays
small whatever the shape. The same shape, dtype and seed give the same bytes. Weights are normal with standard deviation
0.02, norms are one: enough for speed, and for comparing implementations, but the text means nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

STD = 0.02
SHARD_BYTES = 2 * 1024**3
SLICE_VALUES = 16 * 1024**2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PRE_TOKENS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's published sizes. `family` is the `model_type` of its config.json.

    With `experts`, every layer is a mixture of that many, of which each token takes `experts_per_token`; `intermediate`
    is then one expert's, except in config.json, which also tells `dense_intermediate` of the layers there are none of.
    """

    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float
    rms_eps: float
    tied: bool
    rope_scaling: dict[str, Any] | None = None
    experts: int = 0
    experts_per_token: int = 0
    dense_intermediate: int = 0


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES = {
    # A toy of the same structure, for trying the tool and the benchmarks out.
    "tiny": Shape(family="qwen3", vocab_size=512, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2,
                  head_dim=32, max_positions=2048, rope_theta=1e4, rms_eps=1e-6, tied=True),
    # Nobody's: small enough that several engines fit one machine, large enough that a prompt costs something.
    "bench-50m": Shape(family="qwen3", vocab_size=8192, hidden=512, intermediate=2048, layers=12, heads=8, kv_heads=4,
                       head_dim=64, max_positions=8192, rope_theta=1e6, rms_eps=1e-6, tied=True),
    "qwen2-0.5b": Shape(family="qwen2", vocab_size=151936, hidden=896, intermediate=4864, layers=24, heads=14,
                        kv_heads=2, head_dim=64, max_positions=32768, rope_theta=1e6, rms_eps=1e-6, tied=True),
    "qwen2-1.5b": Shape(family="qwen2", vocab_size=151936, hidden=1536, intermediate=8960, layers=28, heads=12,
                        kv_heads=2, head_dim=128, max_positions=32768, rope_theta=1e6, rms_eps=1e-6, tied=True),
    "qwen3-0.6b": Shape(family="qwen3", vocab_size=151936, hidden=1024, intermediate=3072, layers=28, heads=16,
                        kv_heads=8, head_dim=128, max_positions=40960, rope_theta=1e6, rms_eps=1e-6, tied=True),
    "qwen3-1.7b": Shape(family="qwen3", vocab_size=151936, hidden=2048, intermediate=6144, layers=28, heads=16,
                        kv_heads=8, head_dim=128, max_positions=40960, rope_theta=1e6, rms_eps=1e-6, tied=True),
    "qwen3-4b": Shape(family="qwen3", vocab_size=151936, hidden=2560, intermediate=9728, layers=36, heads=32,
                      kv_heads=8, head_dim=128, max_positions=40960, rope_theta=1e6, rms_eps=1e-6, tied=True),
    "qwen3-8b": Shape(family="qwen3", vocab_size=151936, hidden=4096, intermediate=12288, layers=36, heads=32,
                      kv_heads=8, head_dim=128, max_positions=40960, rope_theta=1e6, rms_eps=1e-6, tied=False),
    "qwen3-30b-a3b": Shape(family="qwen3_moe", vocab_size=151936, hidden=2048, intermediate=768, layers=48, heads=32,
                           kv_heads=4, head_dim=128, max_positions=40960, rope_theta=1e6, rms_eps=1e-6, tied=False,
                           experts=128, experts_per_token=8, dense_intermediate=6144),
    "llama-3.2-1b": Shape(family="llama", vocab_size=128256, hidden=2048, intermediate=8192, layers=16, heads=32,
                          kv_heads=8, head_dim=64, max_positions=131072, rope_theta=5e5, rms_eps=1e-5, tied=True,
                          rope_scaling=LLAMA3_SCALING),
    "llama-3.2-3b": Shape(family="llama", vocab_size=128256, hidden=3072, intermediate=8192, layers=28, heads=24,
                          kv_heads=8, head_dim=128, max_positions=131072, rope_theta=5e5, rms_eps=1e-5, tied=True,
                          rope_scaling=LLAMA3_SCALING),
    "llama-3.1-8b": Shape(family="llama", vocab_size=128256, hidden=4096, intermediate=14336, layers=32, heads=32,
                          kv_heads=8, head_dim=128, max_positions=131072, rope_theta=5e5, rms_eps=1e-5, tied=False,
                          rope_scaling={**LLAMA3_SCALING, "factor": 8.0}),
}  # fmt: skip

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="keep so many layers; all of them otherwise")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="most bytes of tensors in one file")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        if not 1 <= arguments.layers <= shape.layers:
            parser.error(f"--layers is {arguments.layers}; {arguments.shape} has {shape.layers}")
        shape = replace(shape, layers=arguments.layers)
    make_checkpoint(
        arguments.directory,
        shape,
        dtype=arguments.dtype,
        seed=arguments.seed,
        shard_bytes=arguments.shard_bytes,
    )


def make_checkpoint(directory: Path, shape: Shape, *, dtype: str, seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config(shape, dtype))
    eos = shape.vocab_size - 1  # <|im_end|>
    write_json(directory / "generation_config.json", {"eos_token_id": [eos], "do_sample": False})
    write_json(directory / "tokenizer.json", tokenizer(shape.vocab_size))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": shape.max_positions,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    write_weights(directory, list(tensors(shape)), dtype, seed, shard_bytes)


def config(shape: Shape, dtype: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense_intermediate or shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_eps,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "torch_dtype": dtype,
        "eos_token_id": shape.vocab_size - 1,
        "use_cache": True,
    }
    if shape.rope_scaling is not None:
        content["rope_scaling"] = shape.rope_scaling
    if shape.experts:
        content |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return content


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights, in file order."""
    yield "model.embed_tokens.weight", (shape.vocab_size, shape.hidden)
    outs = {
        "q": shape.heads * shape.head_dim,
        "k": shape.kv_heads * shape.head_dim,
        "v": shape.kv_heads * shape.head_dim,
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (shape.hidden,)
        for name, out in outs.items():
            yield f"{prefix}.self_attn.{name}_proj.weight", (out, shape.hidden)
            if shape.family == "qwen2":
                yield f"{prefix}.self_attn.{name}_proj.bias", (out,)
        yield f"{prefix}.self_attn.o_proj.weight", (shape.hidden, outs["q"])
        if shape.family in ("qwen3", "qwen3_moe"):
            yield f"{prefix}.self_attn.q_norm.weight", (shape.head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (shape.head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (shape.hidden,)
        if shape.experts:
            yield f"{prefix}.mlp.gate.weight", (shape.experts, shape.hidden)
        mlps = [f"experts.{expert}." for expert in range(shape.experts)] or [""]
        for mlp in mlps:
            yield f"{prefix}.mlp.{mlp}gate_proj.weight", (shape.intermediate, shape.hidden)
            yield f"{prefix}.mlp.{mlp}up_proj.weight", (shape.intermediate, shape.hidden)
            yield f"{prefix}.mlp.{mlp}down_proj.weight", (shape.hidden, shape.intermediate)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab_size, shape.hidden)


def write_weights(
    directory: Path, wanted: list[tuple[str, tuple[int, ...]]], dtype: str, seed: int, shard_bytes: int
) -> None:
    """Shards of at most `shard_bytes`, and an index if there are several."""
    size = DTYPES[dtype][1]
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dims in wanted:
        num_bytes = int(np.prod(dims)) * size
        if shards[-1] and filled + num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dims))
        filled += num_bytes
    if len(shards) == 1:
        write_shard(directory / "model.safetensors", shards[0], dtype, seed)
        return
    weight_map = {}
    for index, shard in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / file_name, shard, dtype, seed)
        weight_map.update(dict.fromkeys((name for name, _ in shard), file_name))
    total = sum(int(np.prod(dims)) * size for _, dims in wanted)
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def write_shard(path: Path, wanted: list[tuple[str, tuple[int, ...]]], dtype: str, seed: int) -> None:
    """The safetensors format: length of the header (u64, little-endian), header in JSON, then the tensors' bytes."""
    label, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in wanted:
        end = offset + int(np.prod(dims)) * size
        header[name] = {"dtype": label, "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, dims in wanted:
            write_tensor(file, name, dims, dtype, seed)


def write_tensor(file: BinaryIO, name: str, dims: tuple[int, ...], dtype: str, seed: int) -> None:
    # Seeded by name, so that a tensor is the same however the checkpoint is sharded.
    rng = np.random.default_rng([seed, *name.encode()])
    left = int(np.prod(dims))
    while left:
        count = min(left, SLICE_VALUES)
        if name.endswith("norm.weight"):
            values = np.ones(count, dtype=np.float32)
        else:
            values = rng.standard_normal(count, dtype=np.float32)
            values *= STD
        file.write(encode(values, dtype).data)
        left -= count


def encode(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16)
    # bfloat16 is the upper half of float32, rounded to nearest even.
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE of exactly `vocab_size` entries: bytes, then pairs and triples of bytes, then special tokens."""
    symbols = list(byte_symbols().values())
    assert vocab_size >= len(symbols) + len(SPECIAL_TOKENS), "the vocabulary does not hold all bytes"
    num_merges = vocab_size - len(symbols) - len(SPECIAL_TOKENS)
    merges = list(itertools.islice(all_merges(symbols), num_merges))
    assert len(merges) == num_merges
    vocab = {token: index for index, token in enumerate([*symbols, *(left + right for left, right in merges)])}
    special = [
        {
            "id": len(vocab) + index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PRE_TOKENS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def all_merges(symbols: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs and triples of small letters first (Ġ is the space before a word), then those of all bytes."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    seen: set[str] = set()
    small = itertools.chain(
        itertools.product(["Ġ", *letters], letters),
        ((a + b, c) for a, b, c in itertools.product(["Ġ", *letters], letters, letters)),
    )
    everything = itertools.chain(
        itertools.product(symbols, symbols),
        ((a + b, c) for a, b, c in itertools.product(symbols, symbols, symbols)),
    )
    for left, right in itertools.chain(small, everything):
        if left + right not in seen:
            seen.add(left + right)
            yield left, right


def byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level BPE (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return table


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=None if "model" in content else 2) + "\n")


if __name__ == "__main__":
    main()
