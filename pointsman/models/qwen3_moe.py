"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): what is particular to the family.

Experts are chosen by softmax; whether the weights of the chosen are normed is the config's to say. q and k are normed head by head.
Some layers may be dense: those that `mlp_only_layers` names and those between every `decoder_sparse_step`-th. The sources are the published
config and checkpoint and transformers' `qwen3_moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pointsman.models.architecture import Architecture
from pointsman.models.config_reader import MOST_EXPERTS, ConfigReader, read_rotary, read_routing, read_sizes
from pointsman.models.names import DECODER_ROWS, LAYER, Kind, Model, Row, pair_rows, qk_norm_rows

DEFAULT_THETA = 10_000.0

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3_moe",),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
}
UNUSED = ("sliding_window", "max_window_layers")  # where no window is used, they say nothing

_MLP = LAYER + "mlp."
ROWS = (
    *DECODER_ROWS,
    *qk_norm_rows("head", "head"),
    Row(_MLP + "gate.weight", "gate", Kind.FLOAT32, ("experts", "hidden"), where="experts"),
    *pair_rows(_MLP + "experts.{expert}.", "experts", "width"),
    *pair_rows(_MLP, "dense", "dense", "dense_"),
)


def parse(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json, as published or as transformers 5 writes it.

    Raises:
        ValueError: it asks for something else than this model computes; the message names every such key.
    """
    reader = ConfigReader(config, FIXED)
    for key in UNUSED:
        reader.get(key)
    sizes = read_sizes(reader)
    rotary_dim, rope_theta = read_rotary(reader, sizes["head_dim"], DEFAULT_THETA)
    num_experts = reader.whole("num_experts", "num_local_experts", high=MOST_EXPERTS)
    dense_layers, dense_width = _dense_layers(reader, sizes["num_layers"]), reader.whole("intermediate_size")
    architecture = Architecture(
        **sizes,
        name="Qwen3MoeForCausalLM",
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        routing=read_routing(reader, num_experts, "softmax", renormalize=reader.flag("norm_topk_prob", False)),
        routing_bias=False,
        expert_width=reader.whole("moe_intermediate_size"),
        dense_layers=dense_layers,
        dense_width=dense_width if dense_layers else 0,
        qk_norm="each",
    )
    reader.finish()
    return architecture


def _dense_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """The layers without experts; one at least must have some."""
    named, step = reader.get("mlp_only_layers", []), reader.whole("decoder_sparse_step", default=1)
    if not isinstance(named, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in named):
        reader.refuse("mlp_only_layers", f"it must be numbers of layers, from 0 to {num_layers - 1}")
        named = []
    dense = tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
    if len(dense) == num_layers:
        reader.problems.append(
            "mlp_only_layers and decoder_sparse_step leave no layer with experts; this version serves models that have some"
        )
    return dense


MODEL = Model(parse, ROWS)
