"""Mixtral: what is particular to the family.

Every layer has experts, chosen by softmax and weighed among the chosen. q and k are not normed, and all of a head rotates. The
sources are the published config and checkpoint and transformers' `mixtral`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pointsman.models.architecture import Architecture
from pointsman.models.config_reader import MOST_EXPERTS, ConfigReader, read_rotary, read_routing, read_sizes
from pointsman.models.names import DECODER_ROWS, LAYER, Kind, Model, Row, pair_rows

DEFAULT_THETA = 1_000_000.0

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("mixtral",),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "sliding_window": (),
    "is_encoder_decoder": (False,),
}

_MOE = LAYER + "block_sparse_moe."
ROWS = (
    *DECODER_ROWS,
    Row(_MOE + "gate.weight", "gate", Kind.FLOAT32, ("experts", "hidden"), where="experts"),
    *pair_rows(_MOE + "experts.{expert}.", "experts", "width", names=("w1", "w3", "w2")),
)


def parse(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json, as published or as transformers 5 writes it.

    Raises:
        ValueError: it asks for something else than this model computes; the message names every such key.
    """
    reader = ConfigReader(config, FIXED)
    sizes = read_sizes(reader)
    rotary_dim, rope_theta = read_rotary(reader, sizes["head_dim"], DEFAULT_THETA)
    architecture = Architecture(
        **sizes,
        name="MixtralForCausalLM",
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        routing=read_routing(reader, reader.whole("num_local_experts", "num_experts", high=MOST_EXPERTS), "softmax"),
        routing_bias=False,
        expert_width=reader.whole("intermediate_size"),
        qk_norm=None,
    )
    reader.finish()
    return architecture


MODEL = Model(parse, ROWS)
