"""A model's architecture as frozen flags, which one decoder reads. No torch here: `quire plan` reads it too."""

from __future__ import annotations

from dataclasses import dataclass

from quire.nn.rope_config import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """What a family's function makes of config.json. Names are the checkpoint's where it has them.

    * `architecture`: the class name that the checkpoint gives itself.
    * `qkv_bias`, `o_bias`, `mlp_bias`: which projections have a bias.
    * `qk_norm`: queries and keys are normalised per head, before they are rotated.
    * `num_experts`: 0 for a model without; otherwise the feed-forward blocks are sparse, but for those of
      `dense_layers`. A row's `num_experts_per_tok` experts have probabilities that `norm_topk_prob` makes add up to 1.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    dense_layers: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward block of a layer is a choice of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def untied_head(self) -> bool:
        """The output head has a weight of its own."""
        return not self.tie_word_embeddings
