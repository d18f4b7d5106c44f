"""A model as data: sizes, and which parts its layers have. No tensors and no names of models: whoever asks can plan without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pointsman.moe.spec import RoutingSpec

Part = Literal["experts", "dense", "shared", "qk_norm", "qkv_bias", "routing_bias"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model as data: its sizes, and which parts its layers have. Whoever computes reads it here; nothing asks for a model's name.

    A layer is attention, then experts or, in a dense layer, one matrix pair for all tokens.

    Attributes:
        name: entry of the model registry.
        rotary_dim: channels of a head that rotate.
        routing: how router logits become experts.
        routing_bias: whether scores are biased for the choice.
        expert_width: width of an expert's hidden layer.
        shared_width: width of the expert that every token has beside its chosen ones; 0 where there is none.
        dense_layers: the layers that have no experts, ascending; `dense_width` is their width.
        qk_norm: whether q and k are normed over "all" of their heads at once, over "each", or not at all.
        qkv_bias: whether the projections to q, k and v add a bias.
        quantization_block: rows and columns of an FP8 block; None for a plain checkpoint.
        scalar_scales: the checkpoint has one scale for each matrix, which is that of all its blocks here.
        input_scales: and one for what each matrix multiplies.
        num_draft_layers: layers past the last that a checkpoint may have for multi-token prediction; they are not loaded.
        dtype: type of the checkpoint's plain weights.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    max_positions: int
    norm_epsilon: float
    routing: RoutingSpec
    routing_bias: bool
    expert_width: int
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()
    dense_width: int = 0
    qk_norm: Literal["all", "each"] | None
    qkv_bias: bool = False
    quantization_block: tuple[int, int] | None
    scalar_scales: bool = False
    input_scales: bool = False
    num_draft_layers: int = 0
    dtype: str

    @property
    def num_experts(self) -> int:
        """Experts of a layer that has any."""
        return self.routing.num_experts

    @property
    def top_k(self) -> int:
        """Experts that a token chooses."""
        return self.routing.top_k

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers that have experts; a routing row has these, in this order."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)

    def layers_with(self, part: Part | None) -> tuple[int, ...]:
        """The layers that have a part; None is what all have."""
        if part in ("experts", "shared", "routing_bias"):
            there = part == "experts" or bool(self.shared_width if part == "shared" else self.routing_bias)
            return self.expert_layers if there else ()
        if part == "dense":
            return self.dense_layers
        there = part is None or (self.qkv_bias if part == "qkv_bias" else self.qk_norm is not None)
        return tuple(range(self.num_layers)) if there else ()

    @property
    def sizes(self) -> dict[str, int]:
        """The dimensions that tensors are declared with."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head": self.head_dim,
            "experts": self.num_experts,
            "width": self.expert_width,
            "shared": self.shared_width,
            "dense": self.dense_width,
        }
