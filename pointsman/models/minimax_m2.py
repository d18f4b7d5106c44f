"""MiniMax-M2, M2.1, M2.5, M2.7: what is particular to the family.

Every layer is full attention and a mixture of experts; there is no dense layer and no shared expert. Particular are the norm of
q and k over all heads at once (hence its width: heads * head_dim), rotary on a part of each head, and a router whose sigmoid
scores are biased for the choice alone. The sources are the published config and checkpoint and transformers' `minimax_m2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pointsman.models.architecture import Architecture
from pointsman.models.config_reader import MOST_EXPERTS, ConfigReader, read_rotary, read_routing, read_sizes
from pointsman.models.names import DECODER_ROWS, LAYER, Kind, Model, Row, pair_rows, qk_norm_rows

DEFAULT_THETA = 5_000_000.0

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

_MOE = LAYER + "block_sparse_moe."
ROWS = (
    *DECODER_ROWS,
    *qk_norm_rows("q", "kv"),
    Row(_MOE + "gate.weight", "gate", Kind.FLOAT32, ("experts", "hidden"), where="experts"),
    Row(_MOE + "e_score_correction_bias", "bias", Kind.FLOAT32, ("experts",), where="routing_bias"),
    *pair_rows(_MOE + "experts.{expert}.", "experts", "width", names=("w1", "w3", "w2")),
)


def parse(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json, as published or as transformers 5 writes it.

    Raises:
        ValueError: it asks for something else than this model computes; the message names every such key.
    """
    reader = ConfigReader(config, FIXED)
    sizes = read_sizes(reader, head_dim=reader.whole("head_dim"))
    reader.only("attn_type_list", [1] * sizes["num_layers"])
    num_experts = reader.whole("num_local_experts", "num_experts", high=MOST_EXPERTS)
    rotary_dim, rope_theta = read_rotary(reader, sizes["head_dim"], DEFAULT_THETA)
    num_draft_layers = reader.whole("num_mtp_modules", low=0, default=0) * reader.whole("mtp_transformer_layers", low=0, default=1)
    architecture = Architecture(
        **sizes,
        name="MiniMaxM2ForCausalLM",
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        routing=read_routing(reader, num_experts, "sigmoid"),
        routing_bias=True,
        expert_width=reader.whole("intermediate_size"),
        qk_norm="all",
        num_draft_layers=num_draft_layers if reader.flag("use_mtp", False) else 0,
    )
    reader.finish()
    return architecture


MODEL = Model(parse, ROWS)
