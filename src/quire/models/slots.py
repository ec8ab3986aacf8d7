"""Every parameter that a decoder of given flags has, by its path and shape. No torch: `quire plan` reads it too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quire.models.arch import Arch, Indexer, Latent, NormKind, QKNorm
from quire.nn.pooling_config import PoolingConfig

XIELU_SHAPES: Mapping[str, tuple[int, ...]] = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
"""What the activation xIELU learns."""
EMBEDDING, PER_LAYER_EMBEDDING, HEAD = "embedding.weight", "embedding.per_layer.weight", "head.weight"
POOLING = "pooling."
"""What the paths of a pooling head's parameters begin with."""
TOKENS = "pooling.tokens"


def head_path(index: int) -> str:
    """Of a layer of a pooling head."""
    return f"pooling.layers.{index}"


@dataclass(frozen=True, slots=True)
class Slot:
    """`pattern` is the attribute path in `Decoder`, with `{}` for the layer and `{expert}` for the
    expert, or for the head where each has its own. `rotated`:
    the first dimension is heads whose dimensions are rotated in pairs; of `head_dim`, where that is not the
    architecture's. `wide`: it runs in float32 whatever the dtype. `optional`: a checkpoint may lack it. `normed`: its
    rows are divided by their lengths."""

    pattern: str
    shape: tuple[int, ...]
    layer: int = 0
    expert: int = 0
    rotated: bool = False
    wide: bool = False
    head_dim: int = 0
    optional: bool = False
    normed: bool = False

    @property
    def path(self) -> str:
        return self.pattern.format(self.layer, expert=self.expert)


def slots(arch: Arch) -> Iterator[Slot]:
    """In the order in which a decoder is built."""
    e = arch.hidden_size
    yield from _embedding(arch)
    yield from _wide_inputs(arch)
    for layer in range(arch.num_layers):
        yield from _layer_norms(arch, layer)
        yield from _attention(arch, layer) if arch.latent is None else _latent(arch, arch.latent, layer)
        if not arch.is_sparse(layer):
            yield from _dense(arch, "layers.{}.mlp", layer)
        elif arch.beside_dense:
            yield from _dense_and_sparse(arch, layer)
        else:
            yield from _experts(arch, layer)
        yield from _layer_extras(arch, layer)
    if arch.final_norm:
        yield from _norm(arch.norm, "norm", (e,), 0)
    if arch.pooling is not None:
        yield from _pooling(arch.pooling)
    if arch.output_size != e:
        yield Slot("projection.weight", (arch.output_size, e))
    if arch.lm_head and not arch.tie_word_embeddings:
        yield Slot(HEAD, (arch.vocab_size, arch.output_size), normed=arch.normed_head)
    if arch.lm_head and arch.head_bias:
        yield Slot("head.bias", (arch.vocab_size,))


def _embedding(arch: Arch) -> Iterator[Slot]:
    features = arch.embedding_size or arch.hidden_size
    width = arch.token_size or features
    yield Slot(EMBEDDING, (arch.vocab_size, width))
    if width != features:
        yield Slot("embedding.token_projection.weight", (features, width))
    if arch.num_token_types:
        yield Slot("embedding.token_types.weight", (arch.num_token_types, features))
    if arch.num_learned_positions:
        yield Slot("embedding.positions.weight", (arch.num_learned_positions, features))
    if arch.embedding_norm:
        yield from _norm(arch.norm, "embedding.norm", (features,), 0)
    if arch.embedding_size is not None:
        yield from _linear("embedding.projection", (arch.hidden_size, features), True, 0)
    if arch.distance_buckets:
        yield Slot("embedding.distances.weight", (arch.distance_buckets, arch.num_heads))


def _pooling(config: PoolingConfig) -> Iterator[Slot]:
    for index, layer in enumerate(config.layers):
        path = head_path(index)
        yield Slot(f"{path}.linear.weight", (layer.out_size, layer.in_size), wide=True)
        if layer.bias:
            yield Slot(f"{path}.linear.bias", (layer.out_size,), wide=True)
        if layer.norm is not None:
            yield Slot(f"{path}.norm.weight", (layer.out_size,), wide=True)
            if layer.norm.bias:
                yield Slot(f"{path}.norm.bias", (layer.out_size,), wide=True)
    if config.choice is not None:
        for index in range(2):
            yield Slot(f"{TOKENS}.{index}.weight", (1, config.hidden_size), wide=True)


def _wide_inputs(arch: Arch) -> Iterator[Slot]:
    """What Gemma 3n and 4 make of the embedding besides."""
    e, own, altup = arch.hidden_size, arch.per_layer, arch.altup
    if own is not None:
        size = arch.num_layers * own.size
        yield Slot(PER_LAYER_EMBEDDING, (own.vocab_size, size))
        yield Slot("per_layer.projection.weight", (size, e))
        yield from _norm(arch.norm, "per_layer.norm", (own.size,), 0)
    for stream in range(1, altup.num if altup is not None else 1):
        yield Slot("widen.projections.{expert}.weight", (e, e), expert=stream - 1)
        yield Slot("norm.projections.{expert}.weight", (e, e), expert=stream - 1)


def _layer_extras(arch: Arch, layer: int) -> Iterator[Slot]:
    path, e, n = "layers.{}", arch.hidden_size, 0 if arch.altup is None else arch.altup.num
    if arch.per_layer is not None:
        yield Slot(f"{path}.per_layer.gate.weight", (arch.per_layer.size, e), layer)
        yield Slot(f"{path}.per_layer.projection.weight", (e, arch.per_layer.size), layer)
        yield from _norm(arch.norm, f"{path}.per_layer.norm", (e,), layer)
    if arch.layer_scalar:
        yield Slot(f"{path}.scalar", (1,), layer)
    if arch.altup is not None:
        yield from _norm(arch.norm, f"{path}.altup.norm", (e,), layer)
        yield Slot(f"{path}.altup.router.weight", (n, e), layer)
        yield Slot(f"{path}.altup.predictor.weight", (n * n, n), layer)
        yield Slot(f"{path}.altup.corrector.weight", (n, n), layer)
        if arch.altup.scaled:
            yield Slot(f"{path}.altup.scale", (e,), layer)
        yield Slot(f"{path}.laurel.left.weight", (arch.altup.laurel_rank, e), layer)
        yield Slot(f"{path}.laurel.right.weight", (e, arch.altup.laurel_rank), layer)
        yield from _norm(arch.norm, f"{path}.laurel.norm", (e,), layer)


def _linear(
    path: str, shape: tuple[int, int], bias: bool, layer: int, *, expert: int = 0, rotated: bool = False
) -> Iterator[Slot]:
    yield Slot(f"{path}.weight", shape, layer, expert, rotated)
    if bias:
        yield Slot(f"{path}.bias", shape[:1], layer, expert, rotated)


def _norm(norm: NormKind, path: str, shape: tuple[int, ...], layer: int, rotated: bool = False) -> Iterator[Slot]:
    if norm.weight:
        yield Slot(f"{path}.weight", shape, layer, rotated=rotated)
    if norm.bias:
        yield Slot(f"{path}.bias", shape, layer, rotated=rotated)


def _layer_norms(arch: Arch, layer: int) -> Iterator[Slot]:
    names = {
        "pre": ["attention_norm", "mlp_norm"],
        "post": ["attention_out_norm"],
        "sandwich": ["attention_norm", "attention_out_norm", "mlp_norm"],
        "sum": ["mlp_norm", "sum_norm"],
    }[arch.norms]
    if arch.has_mlp_out_norm(layer):
        names.append("mlp_out_norm")
    absent = {"mlp_norm": arch.shared_norm, "attention_norm": layer == 0 and not arch.first_norm}
    for name in names:
        if name == "mlp_norm" and arch.beside_dense and arch.is_sparse(layer):
            continue
        if not absent.get(name, False):
            yield from _norm(arch.norm, f"layers.{{}}.{name}", (arch.hidden_size,), layer)


def _attention(arch: Arch, layer: int) -> Iterator[Slot]:
    path, e = "layers.{}.attention", arch.hidden_size
    heads, kind = arch.heads(layer), arch.layer_kinds[layer]
    yield from _linear(f"{path}.q", (heads.q_size, e), arch.qkv_bias, layer, rotated=True)
    if kind.kv_from is None:
        yield from _linear(f"{path}.k", (heads.kv_size, e), arch.qkv_bias, layer, rotated=True)
        if not kind.keys_are_values:
            yield from _linear(f"{path}.v", (heads.kv_size, e), arch.qkv_bias, layer)
    yield from _linear(f"{path}.o", (e, heads.q_size), arch.o_bias, layer)
    if arch.output_gate is not None:
        yield Slot(f"{path}.gate.weight", (heads.num if arch.output_gate.per_head else heads.q_size, e), layer)
    if arch.qk_norm is not None and (kind.rope is not None or not arch.qk_norm.rotated_only):
        yield from _qk_norm(arch.qk_norm, f"{path}.q_norm", heads.num, heads.dim, layer)
        if kind.kv_from is None:
            yield from _qk_norm(arch.qk_norm, f"{path}.k_norm", heads.num_kv, heads.dim, layer)
    if arch.value_norm is not None and kind.kv_from is None:
        yield from _norm(arch.value_norm, f"{path}.v_norm", (heads.dim,), layer)
    if arch.sinks:
        yield Slot(f"{path}.sinks", (heads.num,), layer)


def _qk_norm(qk_norm: QKNorm, path: str, heads: int, d: int, layer: int) -> Iterator[Slot]:
    if qk_norm.over == "own_heads":
        for head in range(heads):
            yield Slot(f"{path}.heads.{{expert}}.weight", (d,), layer, head, rotated=True)
        return
    size = d if qk_norm.over == "head" else heads * d
    yield from _norm(qk_norm.norm, path, (size,), layer, rotated=True)


def _latent(arch: Arch, latent: Latent, layer: int) -> Iterator[Slot]:
    path, e, heads = "layers.{}.attention", arch.hidden_size, arch.num_heads
    inner = e
    if latent.q_lora_rank is not None:
        inner = latent.q_lora_rank
        yield from _linear(f"{path}.q_down", (inner, e), arch.qkv_bias, layer)
        yield from _norm(latent.norm, f"{path}.q_norm", (inner,), layer)
    yield from _linear(f"{path}.q_nope", (heads * latent.qk_nope_head_dim, inner), False, layer)
    yield from _linear(f"{path}.q_rope", (heads * latent.qk_rope_head_dim, inner), False, layer, rotated=True)
    yield from _linear(f"{path}.kv_down", (latent.kv_lora_rank, e), arch.qkv_bias, layer)
    yield from _norm(latent.norm, f"{path}.kv_norm", (latent.kv_lora_rank,), layer)
    yield from _linear(f"{path}.k_rope", (latent.qk_rope_head_dim, e), arch.qkv_bias, layer, rotated=True)
    for head in range(heads):
        shape = latent.kv_lora_rank, latent.qk_nope_head_dim
        yield from _linear(f"{path}.k_up.{{expert}}", shape, False, layer, expert=head)
    for head in range(heads):
        shape = latent.v_head_dim, latent.kv_lora_rank
        yield from _linear(f"{path}.v_up.{{expert}}", shape, False, layer, expert=head)
    yield from _linear(f"{path}.o", (e, heads * latent.v_head_dim), arch.o_bias, layer)
    if latent.indexer is not None and layer in latent.indexer.layers:
        yield from _indexer(latent.indexer, f"{path}.index", inner, e, layer)


def _indexer(indexer: Indexer, path: str, inner: int, e: int, layer: int) -> Iterator[Slot]:
    d, rotated = indexer.head_dim, indexer.interleaved
    yield Slot(f"{path}.q.weight", (indexer.num_heads * d, inner), layer, rotated=rotated, head_dim=d)
    yield Slot(f"{path}.k.weight", (d, e), layer, rotated=rotated, head_dim=d)
    for name in ("weight", "bias"):
        yield Slot(f"{path}.k_norm.{name}", (d,), layer, rotated=rotated, head_dim=d)
    yield Slot(f"{path}.weights.weight", (indexer.num_heads, e), layer)


def _mlp(
    arch: Arch, path: str, inner: int, layer: int, *, expert: int = 0, bias: bool, down_bias: bool
) -> Iterator[Slot]:
    e = arch.hidden_size
    if arch.gated:
        yield from _linear(f"{path}.gate", (inner, e), bias, layer, expert=expert)
    yield from _linear(f"{path}.up", (inner, e), bias, layer, expert=expert)
    yield from _linear(f"{path}.down", (e, inner), down_bias, layer, expert=expert)


def _dense(arch: Arch, path: str, layer: int) -> Iterator[Slot]:
    down_bias = arch.mlp_bias or arch.down_bias
    yield from _mlp(arch, path, arch.mlp_size(layer), layer, bias=arch.mlp_bias, down_bias=down_bias)
    if arch.activation == "xielu":
        for name, shape in XIELU_SHAPES.items():
            yield Slot(f"{path}.activation.{name}", shape, layer)


def _dense_and_sparse(arch: Arch, layer: int) -> Iterator[Slot]:
    path, e = "layers.{}.mlp", arch.hidden_size
    for name in ("dense_norm", "dense_out_norm", "experts_norm", "experts_out_norm"):
        yield from _norm(arch.norm, f"{path}.{name}", (e,), layer)
    yield from _dense(arch, f"{path}.dense", layer)
    yield Slot(f"{path}.scale", (e,), layer)
    yield Slot(f"{path}.expert_scale", (arch.num_experts,), layer)
    yield from _experts(arch, layer)


def _experts(arch: Arch, layer: int) -> Iterator[Slot]:
    experts, path = arch.experts, "layers.{}.mlp"
    assert experts is not None
    yield from _linear(f"{path}.router", (experts.num, arch.hidden_size), experts.router_bias, layer)
    if experts.correction:
        optional = experts.correction_optional
        yield Slot(f"{path}.correction", (experts.num,), layer, wide=True, optional=optional)
    for expert in range(experts.num):
        inner = experts.intermediate_size
        yield from _mlp(
            arch, f"{path}.experts.{{expert}}", inner, layer, expert=expert, bias=experts.bias, down_bias=experts.bias
        )
    if experts.shared_size:
        yield from _mlp(arch, f"{path}.shared", experts.shared_size, layer, bias=experts.bias, down_bias=experts.bias)
    if experts.shared_gate:
        yield Slot(f"{path}.shared_gate.weight", (1, arch.hidden_size), layer)
