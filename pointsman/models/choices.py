"""Which implementations a model gets on a device: each choice with its reasons, made from descriptions alone.

No weight is touched and no device is asked, so that the choices of an engine can be had where neither is (`pointsman explain`), by the
same calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.kernels.candidates import AttentionShape, attention_choice, glue_choice, linear_choice
from pointsman.kernels.choice import Choice
from pointsman.kernels.device import Device
from pointsman.kernels.dtypes import resolve_dtype
from pointsman.models.architecture import Architecture
from pointsman.models.sharding import Shard
from pointsman.moe.candidates import STATIC_RUNNERS, WAITING_RUNNERS, router_choice, runner_choice
from pointsman.moe.spec import ExpertForm


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What computes a model.

    Attributes:
        dtype: what it computes in.
        invariant: a row gets the same bits whatever rows are beside it, by choice of implementations.
    """

    dtype: str
    invariant: bool
    linear: Choice
    attention: Choice
    glue: Choice
    router: Choice
    moe: Choice

    def all(self) -> tuple[Choice, ...]:
        """In the order in which they are taken."""
        return self.linear, self.attention, self.glue, self.router, self.moe


def choices_of(
    shard: Shard,
    device: Device,
    *,
    dtype: str = "auto",
    linear_backend: str = "auto",
    attention_backend: str = "auto",
    moe_backend: str = "auto",
    kv_dtype: str = "bfloat16",
    deterministic: bool = False,
) -> Choices:
    """The choices that a model's loading takes; parameters are named as the flags they come from.

    Args:
        dtype: what the model computes in; auto is float32 on a CPU, bfloat16 elsewhere.
        kv_dtype: what keys and values are stored as.
        deterministic: a row gets the same bits whatever rows are beside it.

    Raises:
        ValueError: there is no such dtype.
    """
    architecture = shard.architecture
    compute = resolve_dtype(dtype, device.type)
    spec, invariant = architecture.routing, deterministic and device.type != "cpu"
    heads = attention_shape(shard)
    return Choices(
        dtype=compute,
        invariant=invariant,
        linear=linear_choice(linear_backend, device=device, dtype=compute, block=architecture.quantization_block, invariant=invariant),
        attention=attention_choice(attention_backend, device=device, dtype=compute, shape=heads, kv_dtype=kv_dtype, invariant=invariant),
        glue=glue_choice(device=device, dtype=compute),
        router=router_choice(spec, device=device, dtype=compute, invariant=invariant),
        moe=runner_choice(moe_backend, spec, expert_form(shard), device=device, dtype=compute, deterministic=invariant),
    )


def attention_shape(shard: Shard) -> AttentionShape:
    """Of the heads that are here."""
    return AttentionShape(len(shard.heads), len(shard.kv_heads), shard.architecture.head_dim)


def expert_form(shard: Shard) -> ExpertForm:
    """What the model's experts are like, as far as they are here."""
    architecture = shard.architecture
    block, inputs = architecture.quantization_block, architecture.input_scales
    return ExpertForm(architecture.hidden_size, shard.sizes["width"], block, some=shard.ep > 1, input_scales=inputs)


def describe_scales(architecture: Architecture, runner: str | None) -> list[str]:
    """What becomes of the scales of a checkpoint that has one a matrix, in sentences; nothing of another."""
    if not architecture.scalar_scales:
        return []
    lines = ["A matrix has one FP8 scale in the checkpoint, which is exactly that of each of its 128x128 blocks here."]
    if architecture.input_scales and runner in STATIC_RUNNERS:
        lines.append(f"Its scales of activations are the experts' in {runner}; linears make one for each token and 128 channels.")
    elif architecture.input_scales:
        lines.append("Its scales of activations are not used: what is quantized gets one of its own for each token and 128 channels.")
    return lines


def reason_against_capture(device_type: str, runner: str, *, reads_host: bool) -> str | None:
    """Why a step of these implementations cannot be a CUDA graph, or None; `reads_host`: attention has its plan there."""
    if device_type != "cuda":
        return f"the device is {device_type}"
    if reads_host:
        return "this attention backend reads its plan from the host"
    if runner in WAITING_RUNNERS:
        return f"the MoE runner {runner!r} asks the device which experts are used"
    return None
