"""GLM-4.5, GLM-4.5-Air, GLM-4.6: what is particular to the family.

The router is DeepSeek-V3's: sigmoid scores, biased for the choice alone, experts from the best groups, weights normed and scaled. The
first layers are dense, and each of the others has an expert that all tokens share. Projections to q, k and v may have a bias, q and k
may be normed head by head, and half of a head rotates unless told. The sources are the published config and checkpoint and transformers'
`glm4_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pointsman.models.architecture import Architecture
from pointsman.models.config_reader import MOST_EXPERTS, ConfigReader, read_rotary, read_routing, read_sizes
from pointsman.models.names import ATTENTION, DECODER_ROWS, LAYER, Kind, Model, Row, pair_rows, qk_norm_rows

DEFAULT_THETA = 10_000.0
DEFAULT_ROTARY_FACTOR = 0.5

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("glm4_moe",),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "is_encoder_decoder": (False,),
}

_MLP = LAYER + "mlp."
ROWS = (
    *DECODER_ROWS,
    Row(ATTENTION + "q_proj.bias", "qkv_bias", Kind.FLOAT32, ("q",), 0, "qkv_bias"),
    Row(ATTENTION + "k_proj.bias", "qkv_bias", Kind.FLOAT32, ("kv",), 1, "qkv_bias"),
    Row(ATTENTION + "v_proj.bias", "qkv_bias", Kind.FLOAT32, ("kv",), 2, "qkv_bias"),
    *qk_norm_rows("head", "head"),
    Row(_MLP + "gate.weight", "gate", Kind.FLOAT32, ("experts", "hidden"), where="experts"),
    Row(_MLP + "gate.e_score_correction_bias", "bias", Kind.FLOAT32, ("experts",), where="routing_bias"),
    *pair_rows(_MLP + "experts.{expert}.", "experts", "width"),
    *pair_rows(_MLP + "shared_experts.", "shared", "shared", "shared_"),
    *pair_rows(_MLP, "dense", "dense", "dense_"),
)


def parse(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json, as published or as transformers 5 writes it.

    Raises:
        ValueError: it asks for something else than this model computes; the message names every such key.
    """
    reader = ConfigReader(config, FIXED)
    sizes = read_sizes(reader)
    rotary_dim, rope_theta = read_rotary(reader, sizes["head_dim"], DEFAULT_THETA, DEFAULT_ROTARY_FACTOR)
    num_dense = reader.whole("first_k_dense_replace", low=0, high=sizes["num_layers"] - 1, default=1)
    expert_width, dense_width = reader.whole("moe_intermediate_size"), reader.whole("intermediate_size")
    architecture = Architecture(
        **sizes,
        name="Glm4MoeForCausalLM",
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        routing=read_routing(
            reader,
            reader.whole("n_routed_experts", "num_local_experts", high=MOST_EXPERTS),
            "sigmoid",
            renormalize=reader.flag("norm_topk_prob", True),
            scale=reader.real("routed_scaling_factor", 1.0),
            num_groups=reader.whole("n_group", default=1),
            top_groups=reader.whole("topk_group", default=1),
        ),
        routing_bias=True,
        expert_width=expert_width,
        shared_width=expert_width * reader.whole("n_shared_experts", default=1),
        dense_layers=tuple(range(num_dense)),
        dense_width=dense_width if num_dense else 0,
        qk_norm="each" if reader.flag("use_qk_norm", False) else None,
        qkv_bias=reader.flag("attention_bias", False),
        num_draft_layers=reader.whole("num_nextn_predict_layers", "num_mtp_layers", low=0, default=0),
    )
    reader.finish()
    return architecture


MODEL = Model(parse, ROWS)
