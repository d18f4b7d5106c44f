"""What computes a model: the implementations that were chosen, by the names under which `choices` has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pointsman.kernels.operations import GLUES, Attention, Glue, Linear, attentions, linears
from pointsman.models.choices import Choices
from pointsman.models.sharding import Shard
from pointsman.moe.router import Router, routers
from pointsman.moe.runner import AnyRunner, make_runner
from pointsman.moe.spec import Share

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Backends:
    """The implementations that a decoder was given, chosen once."""

    linear: Linear
    attention: Attention
    glue: Glue
    router: Router
    moe: AnyRunner


def take(choices: Choices, shard: Shard) -> Backends:
    """The implementations for this part of a model. Raises ValueError where one is refused."""
    linear, attention, glue, router, moe = [choice.take() for choice in choices.all()]
    share = Share(shard.experts.start, shard.architecture.num_experts) if shard.ep > 1 else None
    return Backends(
        linears(invariant=choices.invariant)[linear],
        attentions(invariant=choices.invariant)[attention],
        GLUES[glue],
        routers(invariant=choices.invariant)[router],
        make_runner(moe, deterministic=choices.invariant, share=share, input_scales=shard.architecture.input_scales),
    )
