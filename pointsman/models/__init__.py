"""The models, by the name that a config.json gives under `architectures`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pointsman.models import glm4_moe, minimax_m2, mixtral, qwen3_moe
from pointsman.models.architecture import Architecture
from pointsman.models.names import Model

MODELS: dict[str, Model] = {
    "MiniMaxM2ForCausalLM": minimax_m2.MODEL,
    "Qwen3MoeForCausalLM": qwen3_moe.MODEL,
    "MixtralForCausalLM": mixtral.MODEL,
    "Glm4MoeForCausalLM": glm4_moe.MODEL,
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Parse a config.json.

    Raises:
        ValueError: no model here is of its architecture, or it asks for what the model does not compute.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(MODELS):
        raise ValueError(f"architectures in config.json is {names!r:.200}; this version has {', '.join(map(repr, MODELS))}")
    return MODELS[names[0]].parse(config)
