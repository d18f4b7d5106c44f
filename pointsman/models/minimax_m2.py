"""MiniMax-M2, M2.1, M2.5, M2.7: what is particular to the family.

Every layer is full attention and a mixture of experts; there is no dense layer and no shared expert. Particular are the norm of
q and k over all heads at once (hence its width: heads * head_dim), rotary on a part of each head, and a router whose sigmoid
scores are biased for the choice alone. The sources are the published config and checkpoint and transformers' `minimax_m2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pointsman.models.architecture import Architecture, ConfigReader, read_dtype, read_quantization, read_rotary
from pointsman.models.names import Kind, Model, Row
from pointsman.moe.spec import RoutingSpec

DEFAULT_THETA = 5_000_000.0
MOST_LAYERS = 1024
MOST_EXPERTS = 1 << 16  # what a routing record can name

# what the published config says, or what transformers' class computes, where the model is written for one value only
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("minimax_m2",),
    "hidden_act": ("silu",),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_layer",),
    "scoring_func": ("sigmoid",),
    "use_routing_bias": (True,),
    "norm_topk_prob": (True,),
    "routed_scaling_factor": (1.0,),
    "shared_intermediate_size": (0,),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "sliding_window": (),
    "is_encoder_decoder": (False,),
}

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MOE = _LAYER + "block_sparse_moe."
_EXPERT = _MOE + "experts.{expert}."
ROWS = (
    Row("model.embed_tokens.weight", "embed", Kind.PLAIN, ("vocab", "hidden")),
    Row(_LAYER + "input_layernorm.weight", "attention_norm", Kind.FLOAT32, ("hidden",)),
    Row(_ATTENTION + "q_proj.weight", "qkv", Kind.MATRIX, ("q", "hidden"), 0),
    Row(_ATTENTION + "k_proj.weight", "qkv", Kind.MATRIX, ("kv", "hidden"), 1),
    Row(_ATTENTION + "v_proj.weight", "qkv", Kind.MATRIX, ("kv", "hidden"), 2),
    Row(_ATTENTION + "q_norm.weight", "q_norm", Kind.FLOAT32, ("q",), where="qk_norm"),
    Row(_ATTENTION + "k_norm.weight", "k_norm", Kind.FLOAT32, ("kv",), where="qk_norm"),
    Row(_ATTENTION + "o_proj.weight", "o", Kind.MATRIX, ("hidden", "q")),
    Row(_LAYER + "post_attention_layernorm.weight", "expert_norm", Kind.FLOAT32, ("hidden",)),
    Row(_MOE + "gate.weight", "gate", Kind.FLOAT32, ("experts", "hidden"), where="experts"),
    Row(_MOE + "e_score_correction_bias", "bias", Kind.FLOAT32, ("experts",), where="routing_bias"),
    Row(_EXPERT + "w1.weight", "gate_up", Kind.MATRIX, ("width", "hidden"), 0, where="experts"),
    Row(_EXPERT + "w3.weight", "gate_up", Kind.MATRIX, ("width", "hidden"), 1, where="experts"),
    Row(_EXPERT + "w2.weight", "down", Kind.MATRIX, ("hidden", "width"), where="experts"),
    Row("model.norm.weight", "norm", Kind.FLOAT32, ("hidden",)),
    Row("lm_head.weight", "head", Kind.PLAIN, ("vocab", "hidden")),
)


def parse(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json, as published or as transformers 5 writes it.

    Raises:
        ValueError: it asks for something else than this model computes; the message names every such key.
    """
    reader = ConfigReader(config)
    for key, right in FIXED.items():
        reader.only(key, *right)
    num_layers = reader.whole("num_hidden_layers", high=MOST_LAYERS)
    reader.only("attn_type_list", [1] * num_layers)
    reader.only("layer_types", ["full_attention"] * num_layers)
    num_heads, num_kv_heads = reader.whole("num_attention_heads"), reader.whole("num_key_value_heads")
    if num_heads % num_kv_heads:
        reader.refuse("num_attention_heads", f"it must be a multiple of num_key_value_heads ({num_kv_heads})")
    num_experts, top_k = reader.whole("num_local_experts", "num_experts", high=MOST_EXPERTS), reader.whole("num_experts_per_tok")
    if top_k > num_experts:
        reader.refuse("num_experts_per_tok", f"it must be at most the number of experts ({num_experts})")
    head_dim = reader.whole("head_dim")
    rotary_dim, rope_theta = read_rotary(reader, head_dim, DEFAULT_THETA)
    reader.only("use_mtp", True, False)
    num_draft_layers = reader.whole("num_mtp_modules", low=0, default=0) * reader.whole("mtp_transformer_layers", low=0, default=1)
    architecture = Architecture(
        name="MiniMaxM2ForCausalLM",
        vocab_size=reader.whole("vocab_size"),
        hidden_size=reader.whole("hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        max_positions=reader.whole("max_position_embeddings"),
        norm_epsilon=reader.real("rms_norm_eps"),
        routing=RoutingSpec(num_experts=num_experts, top_k=min(top_k, num_experts), score="sigmoid"),
        routing_bias=True,
        expert_width=reader.whole("intermediate_size"),
        qk_norm="all",
        quantization_block=read_quantization(reader),
        num_draft_layers=num_draft_layers if reader.get("use_mtp", False) else 0,
        dtype=read_dtype(reader),
    )
    reader.finish()
    return architecture


MODEL = Model(parse, ROWS)
