"""The routers of Hugging Face's models that a record can be read from and forced upon, by the names of their classes.

The library itself is not imported: the model is given, and a router is known by its class and read by its attributes. All of these
return (logits, weights, ids) of the flat tokens of a batch, and all of them are one function with other values
(`pointsman.moe.routing`). A class that is not in the table is refused by name, for a guess would train a wrong model.

Shape suffixes: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pointsman.moe.routing import RoutingSpec

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
BIAS = "e_score_correction_bias"


def _sigmoid(router: Any) -> RoutingSpec:
    return RoutingSpec(num_experts=router.num_experts, top_k=router.top_k, score="sigmoid")


def _softmax(router: Any) -> RoutingSpec:
    renormalize = bool(getattr(router, "norm_topk_prob", True))
    return RoutingSpec(num_experts=router.num_experts, top_k=router.top_k, score="softmax", renormalize=renormalize)


def _grouped(router: Any) -> RoutingSpec:
    return RoutingSpec(
        num_experts=router.num_experts,
        top_k=router.top_k,
        score="sigmoid",
        renormalize=router.norm_topk_prob,
        scale=router.routed_scaling_factor,
        num_groups=router.num_group,
        top_groups=router.topk_group,
    )


ROUTERS: dict[str, Callable[[Any], RoutingSpec]] = {
    "MiniMaxM2TopKRouter": _sigmoid,
    "MixtralTopKRouter": _softmax,
    "OlmoeTopKRouter": _softmax,
    "Qwen2MoeTopKRouter": _softmax,
    "Qwen3MoeTopKRouter": _softmax,
    "DeepseekV3TopkRouter": _grouped,
    "Glm4MoeTopkRouter": _grouped,
}


@dataclass(frozen=True)
class Router:
    """The router of one layer of a model."""

    module: nn.Module
    path: str
    layer: int
    spec: RoutingSpec

    def read(self, output: object) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, K] and ids [T, K] of what the module returned. Raises ValueError where it is something else."""
        parts = output if isinstance(output, tuple) else (output,)
        shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        num_tokens = shapes[0][0] if isinstance(shapes[0], list) and shapes[0] else 0
        chosen = [num_tokens, self.spec.top_k]
        if shapes != [[num_tokens, self.spec.num_experts], chosen, chosen]:
            raise ValueError(
                f"{self.path} ({type(self.module).__name__}) returned {shapes}; it must be logits [tokens, {self.spec.num_experts}],"
                f" weights and ids [tokens, {self.spec.top_k}]; another version of transformers may do so"
            )
        return parts  # type: ignore[return-value]

    def bias(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """What the module adds to the scores for the choice alone: MiniMax-M2 is given it, others have it."""
        own = getattr(self.module, BIAS, None)
        given: Tensor | None = kwargs.get(BIAS, args[1] if len(args) > 1 else None)
        return own if isinstance(own, Tensor) else given


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model by layer.

    Raises:
        ValueError: it has none, or some that are not known here; the message names them.
    """
    routers: list[Router] = []
    strange: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in ROUTERS:
            routers.append(Router(module, path, _layer(path), ROUTERS[kind](module)))
        elif kind.endswith("Router") or path.rpartition(".")[2] in ("gate", "router"):
            strange.setdefault(kind, path)
    if strange:
        named = ", ".join(f"{path} ({kind})" for kind, path in strange.items())
        raise ValueError(f"{type(model).__name__} has routers that are not known here: {named}; there are {', '.join(ROUTERS)}")
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router; known ones are {', '.join(ROUTERS)}")
    routers.sort(key=lambda router: router.layer)
    layers = [router.layer for router in routers]
    if len(set(layers)) < len(layers) or len({(router.spec.num_experts, router.spec.top_k) for router in routers}) > 1:
        raise ValueError(f"{type(model).__name__} has two routers in a layer, or layers of different experts; a record has neither")
    return routers


def _layer(path: str) -> int:
    found = _LAYER.findall(path)
    if len(found) != 1:
        raise ValueError(f"the router {path!r} is in no layer that can be told from its name; names have 'layers.N.' once")
    return int(found[0])
