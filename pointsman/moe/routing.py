"""From router logits to experts and weights: the one function in which the routers of today's models differ by values alone.

Choice and weights are separate steps. The bias only steers the choice, and a replay gives the choice while the weights stay
live: they are recomputed from the router's own scores of the given experts. Equal scores go to the lower expert id; `torch.topk`
promises no order among equals, so the choice is a stable sort.

Shape suffixes: T tokens, E experts, K experts per token, G groups of experts, e experts of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pointsman.moe.spec import RoutingSpec

__all__ = ["Routing", "RoutingSpec", "choose_experts", "route"]


class Routing(NamedTuple):
    """The experts of each token, best first, int64 [T, K], and their float32 weights. An id of -1 is none, or one of another rank."""

    ids_TK: Tensor
    weights_TK: Tensor


def route(logits_TE: Tensor, spec: RoutingSpec, *, bias_E: Tensor | None = None, ids_TK: Tensor | None = None) -> Routing:
    """Choose experts, or weigh the experts given."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(-1) if spec.score == "softmax" else logits_TE.sigmoid()
    if ids_TK is None:
        ids_TK = choose_experts(scores_TE, spec, bias_E)
    weights_TK = scores_TE.gather(-1, ids_TK)
    if spec.renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Routing(ids_TK, weights_TK * spec.scale if spec.scale != 1.0 else weights_TK)


def choose_experts(scores_TE: Tensor, spec: RoutingSpec, bias_E: Tensor | None) -> Tensor:
    """The best experts of each token by score and bias, best first, ties to the lower id."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
    if spec.top_groups < spec.num_groups:
        choice_TE = _within_groups(choice_TE, spec)
    return _best(choice_TE, spec.top_k)


def _best(values_TE: Tensor, count: int) -> Tensor:
    return values_TE.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _within_groups(choice_TE: Tensor, spec: RoutingSpec) -> Tensor:
    choice_TGe = choice_TE.view(len(choice_TE), spec.num_groups, -1)
    rank_TG = choice_TGe.topk(min(2, choice_TGe.shape[-1]), dim=-1).values.sum(-1)
    dropped_TG = torch.ones_like(rank_TG, dtype=torch.bool).scatter_(-1, _best(rank_TG, spec.top_groups), False)
    return choice_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(-2)
