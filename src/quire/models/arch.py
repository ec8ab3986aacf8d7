"""A model's architecture as frozen flags, which one decoder reads. No torch here: `quire plan` reads it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quire.nn.pooling_config import PoolingConfig
from quire.nn.rope_config import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NormKind:
    """`rms`: root mean square; `layer`: less the mean, too. `weight_offset`: what is to be added to stored weights;
    `weight` false: there are none, they are ones."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    weight: bool = True
    bias: bool = False
    weight_offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QKNorm:
    """How queries and keys are normalised. `over`: each `head` by itself, all with one weight; each head with its own
    (`own_heads`); or all heads as one vector (`whole`). `after_rope`: once they are rotated. `rotated_only`: only in
    layers that rotate them."""

    norm: NormKind
    over: Literal["head", "own_heads", "whole"] = "head"
    after_rope: bool = False
    rotated_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How many heads ask, how many share keys and values, and the dimensions of each."""

    num: int
    num_kv: int
    dim: int

    @property
    def q_size(self) -> int:
        return self.num * self.dim

    @property
    def kv_size(self) -> int:
        return self.num_kv * self.dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What differs between the layers of one model.

    `rope` None: positions are not told to its attention. `window`: a token sees so many tokens, itself included.
    `chunk`: positions are cut into chunks of so many, and a token sees its own chunk only. `scale` multiplies
    `attention_scale`.

    `heads`: those of the model unless they are given. `kv_from`: the earlier layer whose keys and values it reads, with
    none of its own; that layer has some. `keys_are_values`: values are projected as keys are, by the same weight.
    `intermediate_size`: of its feed-forward block, the model's unless it is given.
    """

    rope: RopeConfig | None
    window: int | None = None
    chunk: int | None = None
    scale: float = 1.0
    heads: Heads | None = None
    kv_from: int | None = None
    keys_are_values: bool = False
    intermediate_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGate:
    """What attention finds is multiplied by a function of a projection of what it reads: a number for each dimension,
    or for each head."""

    function: Literal["sigmoid", "softplus"]
    per_head: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryGrowth:
    """Queries are multiplied by 1 + beta * log(1 + floor((position + offset) / period)): Llama 4's temperature.
    `unrotated_only`: only in layers that do not rotate them; otherwise only in those that do."""

    beta: float
    period: int
    offset: int = 0
    unrotated_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """Chooses `top_k` tokens of its past for each token to attend to (DeepSeek-V3.2).

    `layers` have one each, and the others see what the last of these chose. `interleaved`: as `Arch.rope_interleaved`,
    of the first dimensions of its heads.
    """

    num_heads: int
    head_dim: int
    top_k: int
    layers: tuple[int, ...]
    interleaved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention: a token's keys and values are products of one latent, which is what is kept.

    * `kv_lora_rank`: numbers of a latent; `q_lora_rank`: of what queries are made from, None for the hidden state.
      `norm` is applied to both.
    * A head's query and key have `qk_nope_head_dim` dimensions that are not rotated and `qk_rope_head_dim` that are,
      these last; the rotated part of a key is one for all heads. `v_head_dim`: of a head's value.
    * `indexer`: None where a token sees all of its past.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm: NormKind
    indexer: Indexer | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """Widths of what a token leaves in a layer's cache: its latent, its rotated key, and the indexer's."""
        own = self.kv_lora_rank, self.qk_rope_head_dim
        return own if self.indexer is None else (*own, self.indexer.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A sparse feed-forward block: of `num` experts a row sees the `top_k` that the router finds best.

    * `scoring`: how the router's outputs become scores (see `nn.moe.Routing`, for `jitter` as well). `correction`: a
      bias is added to scores where experts are chosen, and not where they are weighed; with `rank_logits` it is added
      to the outputs instead, which then choose. `renormalize`: a row's scores are made to add up to 1. `scale`
      multiplies them then.
      `weigh_input`: they multiply what goes into an expert, not what comes out.
    * `num_groups`, `top_groups`: only experts of the best groups may be chosen, by the sum of the `group_best` best
      scores of each.
    * `router_bias`, `bias`: whether the router, and the experts' projections, have one.
    * `shared_size`: features inside an expert that every row sees besides; `shared_gate`: weighed by a gate of its own;
      `shared_averaged`: the result is the mean of it and the others.
    * `correction_optional`: a checkpoint without the bias has one of zeros. `out_norm`: what the block gives is normed.
    * `dense_layers` have a feed-forward block as other models.
    """

    num: int
    top_k: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    jitter: float = 0.01
    correction: bool = False
    rank_logits: bool = False
    renormalize: bool = False
    scale: float = 1.0
    weigh_input: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    router_bias: bool = False
    bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    correction_optional: bool = False
    out_norm: bool = False
    shared_averaged: bool = False
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayer:
    """Each layer's own input: `size` features of a token, from a table for `vocab_size` tokens and the embedding."""

    size: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AltUp:
    """`num` streams, of which layers compute with the one at `active`; `scaled` as in `models.blocks.altup`. Beside
    attention stands a residual of rank `laurel_rank`. `cutoffs`: of each layer, by how many standard deviations a gate
    has to exceed the mean to be open; None: all are."""

    num: int
    active: int
    scaled: bool
    laurel_rank: int
    cutoffs: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """What a family's function makes of config.json. Names are the checkpoint's where it has them.

    * `architecture`: the class name that the checkpoint gives itself. `max_positions`: the context it was made for.
    * `layer_kinds`: one per layer.
    * `causal`: a token sees those before it; otherwise those after it as well, as in an encoder.
    * `norms`: where norms are: before attention and feed-forward block (`pre`), after them (`post`), both
      (`sandwich`), or of what a block and the stream add up to, which is the stream from there on (`sum`).
      `first_norm`, `final_norm`: whether there is one before the first attention, and one after the last layer.
      `parallel`: both blocks read the same stream, through one norm if `shared_norm`.
    * `qkv_bias`, `o_bias`, `mlp_bias`, `head_bias`: which projections have a bias. `down_bias`: of the feed-forward
      block's, the last one has.
    * `attention_scale` multiplies scores. `attention_softcap`, `alibi_slopes`: as in `ops.attention`.
      `distance_buckets`: a learned bias for so many kinds of distances, see `nn.distance`. `clip_qkv` bounds queries,
      keys and values. `sinks`: each head has a score of its own that takes weight and gives no value.
      `value_norm`: of each head's values. `output_gate`: None for a model without.
    * `rope_interleaved`: the checkpoint pairs dimensions 2i and 2i+1 where `ops.rotary` pairs i and i + r/2; its rows
      are brought to that order when they are loaded.
    * `gated`: the feed-forward block is down(act(gate(x)) * up(x)), otherwise down(act(up(x))).
      `swiglu_limit`: gate and up are bounded, see `ops.activation.clamped_swiglu`, with `swiglu_alpha`.
    * `embedding_multiplier`, `residual_multiplier` (of what a block adds), `logit_multiplier`; `logit_softcap`.
    * `num_learned_positions`: rows of a table of positions that is added to the embedding; `position_offset`: so many
      rows stand before them. `num_token_types`: rows of a table of token types that is added as well.
      `embedding_norm`: the norm of all that. `embedding_size`: its features, where they are projected to `hidden_size`.
      `token_size`: of a token's row alone, where that is brought to `hidden_size` before the others are added, and
      hidden states back to it in the end. `normed_head`: the head's rows are divided by their lengths.
    * `lm_head`: whether there are logits of tokens. `pooling`: what a model without them gives instead.
    * `latent`: None for a model whose keys and values are kept as they are. With it, `head_dim` is the rotated part's,
      and `qkv_bias` is of the projections that make latents.
    * `experts`: None for a model without. `beside_dense`: they are added to a dense block, with norms for both.
    * `per_layer`, `altup`: None for a model without. `layer_scalar`: a number multiplies the stream after each layer.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: NormKind
    layer_kinds: tuple[LayerKind, ...]
    causal: bool = True
    norms: Literal["pre", "post", "sandwich", "sum"] = "pre"
    first_norm: bool = True
    final_norm: bool = True
    parallel: bool = False
    shared_norm: bool = False
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    down_bias: bool = False
    head_bias: bool = False
    qk_norm: QKNorm | None = None
    attention_scale: float
    attention_softcap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    distance_buckets: int = 0
    clip_qkv: float | None = None
    sinks: bool = False
    value_norm: NormKind | None = None
    output_gate: OutputGate | None = None
    query_growth: QueryGrowth | None = None
    rope_interleaved: bool = False
    activation: str = "silu"
    gated: bool = True
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    embedding_size: int | None = None
    normed_head: bool = False
    token_size: int | None = None
    num_learned_positions: int = 0
    position_offset: int = 0
    num_token_types: int = 0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    lm_head: bool = True
    pooling: PoolingConfig | None = None
    latent: Latent | None = None
    experts: Experts | None = None
    beside_dense: bool = False
    per_layer: PerLayer | None = None
    altup: AltUp | None = None
    layer_scalar: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def heads(self, layer: int) -> Heads:
        return self.layer_kinds[layer].heads or Heads(num=self.num_heads, num_kv=self.num_kv_heads, dim=self.head_dim)

    def mlp_size(self, layer: int) -> int:
        return self.layer_kinds[layer].intermediate_size or self.intermediate_size

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers with keys and values of their own: those that the cache has."""
        return tuple(layer for layer, kind in enumerate(self.layer_kinds) if kind.kv_from is None)

    @property
    def output_size(self) -> int:
        """Features of the final hidden states, which the head of any kind reads."""
        return self.token_size or self.hidden_size

    @property
    def num_experts(self) -> int:
        return 0 if self.experts is None else self.experts.num

    @property
    def expert_size(self) -> int:
        return 0 if self.experts is None else self.experts.intermediate_size

    @property
    def shared_size(self) -> int:
        return 0 if self.experts is None else self.experts.shared_size

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward block of a layer is a choice of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def has_mlp_out_norm(self, layer: int) -> bool:
        """Whether what the feed-forward block of a layer gives is normed."""
        sparse = self.experts is not None and self.experts.out_norm and self.is_sparse(layer)
        return self.norms in ("post", "sandwich") or sparse

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different ones."""
        return tuple(dict.fromkeys(kind.rope for kind in self.layer_kinds if kind.rope is not None))

    @property
    def default_context(self) -> int:
        """See `RopeConfig.default_context`: of several kinds of layers the shortest."""
        limits = [self.max_positions, *(rope.default_context for rope in self.ropes)]
        if self.pooling is not None and self.pooling.max_length is not None:
            limits.append(self.pooling.max_length)
        return min(limits)

    @property
    def longest_context(self) -> int:
        """Positions that the model can tell apart as it is meant to. A longer context is the caller's mistake."""
        if self.num_learned_positions:
            return self.num_learned_positions
        return min([rope.longest_context for rope in self.ropes], default=self.max_positions)
