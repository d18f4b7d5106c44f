"""Which implementations a model gets on a device: each choice with its reasons, made from descriptions alone.

No weight is touched and no device is asked, so that the choices of an engine can be had where neither is (`pointsman explain`), by the
same calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pointsman.kernels import GLUES, AttentionShape, attention_choice, attentions, glue_choice, linear_choice, linears
from pointsman.kernels.choice import Choice
from pointsman.kernels.device import Device
from pointsman.models.decoder import Backends, expert_form
from pointsman.models.sharding import Shard
from pointsman.moe.router import router_choice, routers
from pointsman.moe.runner import make_runner, runner_choice

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What computes a model.

    Attributes:
        dtype: what it computes in.
        invariant: a row gets the same bits whatever rows are beside it, by choice of implementations.
    """

    dtype: torch.dtype
    invariant: bool
    linear: Choice
    attention: Choice
    glue: Choice
    router: Choice
    moe: Choice

    def all(self) -> tuple[Choice, ...]:
        """In the order in which they are taken."""
        return self.linear, self.attention, self.glue, self.router, self.moe

    def take(self) -> Backends:
        """The implementations. Raises ValueError where one is refused."""
        linear, attention, glue, router, moe = [choice.take() for choice in self.all()]
        return Backends(
            linears(invariant=self.invariant)[linear],
            attentions(invariant=self.invariant)[attention],
            GLUES[glue],
            routers(invariant=self.invariant)[router],
            make_runner(moe, deterministic=self.invariant),
        )


def choices_of(
    shard: Shard,
    device: Device,
    *,
    dtype: str = "auto",
    linear_backend: str = "auto",
    attention_backend: str = "auto",
    moe_backend: str = "auto",
    deterministic: bool = False,
) -> Choices:
    """The choices that a model's loading takes; parameters are named as the flags they come from.

    Args:
        dtype: what the model computes in; auto is float32 on a CPU, bfloat16 elsewhere.
        deterministic: a row gets the same bits whatever rows are beside it.

    Raises:
        ValueError: there is no such dtype.
    """
    architecture = shard.architecture
    compute = resolve_dtype(dtype, device.type)
    spec, invariant = architecture.routing, deterministic and device.type != "cpu"
    heads = AttentionShape(len(shard.heads), len(shard.kv_heads), architecture.head_dim)
    return Choices(
        dtype=compute,
        invariant=invariant,
        linear=linear_choice(linear_backend, device=device, dtype=compute, block=architecture.quantization_block, invariant=invariant),
        attention=attention_choice(attention_backend, device=device, dtype=compute, shape=heads, invariant=invariant),
        glue=glue_choice(device=device, dtype=compute),
        router=router_choice(spec, device=device, dtype=compute, invariant=invariant),
        moe=runner_choice(moe_backend, spec, expert_form(shard), device=device, dtype=compute, deterministic=invariant),
    )


def resolve_dtype(dtype: str, device_type: str) -> torch.dtype:
    """What `--dtype` means on a device."""
    if dtype == "auto":
        return torch.float32 if device_type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
