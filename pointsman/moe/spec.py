"""How a model routes and what its experts are like, as data. No tensors, so that a config is read, and runners chosen, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """How a model turns router logits into experts.

    Attributes:
        num_experts: experts of a layer.
        top_k: experts of a token.
        score: what makes scores of logits.
        renormalize: divide a token's weights by their sum.
        scale: multiplies the weights last.
        num_groups, top_groups: experts come from the best groups alone, a group's rank being the sum of its two best scores.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"]
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"{self.top_k} experts per token is impossible with {self.num_experts} experts")
        if self.num_experts % self.num_groups or not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"{self.num_experts} experts cannot be limited to {self.top_groups} of {self.num_groups} groups")
        if self.top_k > self.num_experts // self.num_groups * self.top_groups:
            raise ValueError(f"{self.top_groups} of {self.num_groups} groups have fewer than {self.top_k} experts")


class ExpertForm(NamedTuple):
    """What a runner must know of the experts before it is chosen.

    Attributes:
        width: as much of it as is here.
        block: that of FP8 weights, None for plain ones.
        some: there are others on other ranks.
        input_scales: a matrix has one scale, and so has what it multiplies.
    """

    hidden: int
    width: int
    block: tuple[int, int] | None
    some: bool = False
    input_scales: bool = False


class Share(NamedTuple):
    """Which of a layer's experts a rank has.

    Attributes:
        first: of those here, as the model counts them.
        total: on all ranks.
    """

    first: int
    total: int


def experts_hit(num_experts: int, top_k: int, num_tokens: int) -> float:
    """How many experts of a layer so many tokens choose under uniform routing, in expectation."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)
