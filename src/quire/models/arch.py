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

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def untied_head(self) -> bool:
        """The output head has a weight of its own."""
        return not self.tie_word_embeddings
