"""What an engine would be on a device, decided from descriptions: no weight is read, and the device need not be there.

Every decision is asked of the code that decides it when an engine is built; `build` makes what this tells. What only a device can tell is
taken from its description: how much of it is free (a context of CUDA is deducted) and how fast it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pointsman.config import EngineConfig
from pointsman.engine import floor
from pointsman.engine.candidates import cpu_step_choice, executor_choice, graph_choice, ranks_choice, sampler_choice, sums_choice
from pointsman.engine.device_models import DeviceModel
from pointsman.engine.device_options import check_options, reason_against_untuned
from pointsman.engine.floor import Rates, Share
from pointsman.engine.memory import CacheSize, cache_for, context_length_of, kv_dtype_of, num_ranks_here, token_bytes, workspace
from pointsman.engine.step_sizes import bounds_of
from pointsman.kernels.candidates import MAILBOX_ROWS, UNCAPTURED_ATTENTIONS
from pointsman.kernels.choice import Choice
from pointsman.kernels.device import Device
from pointsman.kernels.dtypes import NUM_BYTES
from pointsman.kernels.flashinfer_room import num_bytes as planner_bytes
from pointsman.models.architecture import Architecture
from pointsman.models.choices import Choices, attention_shape, choices_of, describe_scales, reason_against_capture
from pointsman.models.sharding import Shard
from pointsman.models.sizes import PLAIN_KINDS, Size, described, forms
from pointsman.moe.candidates import ROUTED_ALIKE

RANKS_OF_A_HOST = 8
CONTEXT_BYTES = 600 << 20  # what a CUDA context and its libraries are assumed to take; not measured


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An engine's first rank, which no other exceeds.

    Attributes:
        ranks, sums: what runs the others, and what adds up over all; None for one rank alone.
        weights: what it holds, by kind.
        forms: bytes of weights that stand once more in another form.
        token: what its cache holds of a token.
        beside: memory for neither weights nor cache.
        cache: None where it does not fit.
        refusals: why there can be no such engine; nothing where there can.
    """

    config: EngineConfig
    shard: Shard
    device_name: str
    choices: Choices
    step: Choice
    sampler: Choice
    executor: Choice
    ranks: Choice
    sums: Choice | None
    context_length: int
    weights: dict[str, Size]
    forms: dict[str, int]
    token: dict[str, int]
    beside: dict[str, int]
    cache: CacheSize | None
    refusals: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(size.num_bytes for size in self.weights.values())

    @property
    def all_choices(self) -> dict[str, Choice]:
        """Every choice by the operation that it is of."""
        named = {"attention": self.choices.attention, "linears": self.choices.linear, "experts": self.choices.moe}
        named |= {"router": self.choices.router, "glue": self.choices.glue}
        named |= {"sampler": self.sampler, "step": self.step, "executor": self.executor, "ranks": self.ranks}
        return named if self.sums is None else named | {"sums over ranks": self.sums}

    @property
    def notes(self) -> list[str]:
        """What a table of choices does not tell, in sentences."""
        runner = self.choices.moe.chosen
        found = [f"Every token's experts are recorded, in {self.token['routing rows']:,} bytes a token."]
        if runner in ROUTED_ALIKE:
            found.append(f"The runner {runner} cannot be given experts to replay; {ROUTED_ALIKE[runner]} can.")
        elif runner is not None:
            found.append("Experts can be given to replay.")
        found += describe_scales(self.shard.architecture, runner)
        if self.sums is not None and self.sums.chosen == "mailboxes":
            rows = MAILBOX_ROWS // (self.shard.tp - 1)
            found.append(
                f"Mailboxes carry sums of up to {rows:,} rows; NCCL carries more, and all where the GPUs do not reach each other's memory, "
                "which is seen when the ranks meet."
            )
        if self.sums is not None and self.shard.tp > RANKS_OF_A_HOST and self.sums.chosen == "nccl":
            found.append(f"More than {RANKS_OF_A_HOST} ranks may be on several hosts; floors count the link within one.")
        if self.step.chosen == "graphs":
            sizes = self.config.kernel.cuda_graph_max_bs or self.config.scheduler.chunked_prefill_size
            found.append(f"Steps of up to {sizes:,} tokens are CUDA graphs.")
        return found

    @property
    def contradictions(self) -> tuple[str, ...]:
        """The refusals that are not of memory; that one is the last."""
        return self.refusals if self.cache is not None else self.refusals[:-1]

    def short(self) -> str:
        """The decisions in a line."""
        chosen = ", ".join(f"{name} {choice.chosen or 'refused'}" for name, choice in self.all_choices.items())
        return f"{self.words}: {chosen}; {self.weight_bytes / 2**30:.2f} GiB of weights"

    @property
    def words(self) -> str:
        """The model and the ranks."""
        ranks = f"{self.shard.tp} x {self.device_name}" if self.shard.tp > 1 else self.device_name
        replicas = self.config.parallel.data_parallel_size
        return f"{self.shard.architecture.name} on {ranks}{f', each of {replicas} replicas,' if replicas > 1 else ''}"


def make_plan(config: EngineConfig, architecture: Architecture, device: Device, *, name: str, memory_bytes: int) -> Plan:
    """Decide everything.

    Args:
        name: what the device is called.
        memory_bytes: all that it has; ranks that are on one CPU share it.

    Raises:
        ValueError: an option has no meaning on the device, or the model cannot be split as asked.
    """
    kernel = config.kernel
    check_options(config, device.type)
    if config.model.quantization == "fp8" and architecture.quantization_block is None:
        raise ValueError(f"quantization is 'fp8', but the checkpoint is a {architecture.dtype} one; leave it out, or quantize it first")
    shard = Shard(architecture, config.parallel.tensor_parallel_size, config.parallel.expert_parallel_size)
    choices = choices_of(
        shard,
        device,
        dtype=config.model.dtype,
        linear_backend=kernel.fp8_gemm_backend,
        attention_backend=kernel.attention_backend,
        moe_backend=kernel.moe_runner_backend,
        kv_dtype=kv_dtype_of(config),
        deterministic=kernel.enable_deterministic_inference,
    )
    step = _step(config, shard, choices, device.type)
    parallel, scheduler = config.parallel, config.scheduler
    ranks = ranks_choice(parallel.distributed_executor_backend, shard.tp, num_replicas=parallel.data_parallel_size)
    filling = _filling(config, shard, choices, step, device.type, memory_bytes)
    able = None not in (choices.moe.chosen, choices.linear.chosen, choices.attention.chosen)
    untuned = reason_against_untuned(kernel, choices.moe.chosen)
    refusals = [*(choice.refusal for choice in choices.all()), step.refusal if able else None, ranks.refusal, untuned, filling.refusal]
    return Plan(
        config=config,
        shard=shard,
        device_name=name,
        choices=choices,
        step=step,
        sampler=sampler_choice(device.type),
        executor=executor_choice(overlap=not scheduler.disable_overlap_schedule, on_device=device.type == "cuda"),
        ranks=ranks,
        sums=sums_choice(device.type, shard.tp, glue=choices.glue.chosen or "none") if shard.tp > 1 else None,
        context_length=context_length_of(config, architecture),
        weights=filling.weights,
        forms=filling.forms,
        token=token_bytes(shard, kv_dtype_of(config)),
        beside=filling.beside,
        cache=filling.cache,
        refusals=tuple(reason for reason in refusals if reason is not None),
    )


class _Filling(NamedTuple):
    """What fills a rank's memory, as `Plan` has it; `refusal`: why it does not fit."""

    weights: dict[str, Size]
    forms: dict[str, int]
    beside: dict[str, int]
    cache: CacheSize | None
    refusal: str | None


def _filling(config: EngineConfig, shard: Shard, choices: Choices, step: Choice, device_type: str, memory_bytes: int) -> _Filling:
    architecture, scheduler = shard.architecture, config.scheduler
    weights = described(shard)
    again = forms(shard, step=step.chosen, linear=choices.linear.chosen, runner=choices.moe.chosen, dtype=choices.dtype)
    num_bytes = sum(size.num_bytes for size in weights.values()) + sum(again.values())
    memory_bytes //= num_ranks_here(config, device_type)
    beside: dict[str, int] = {}
    free, plans = None, 0
    if device_type == "cuda":
        beside = {"context of CUDA": CONTEXT_BYTES} | workspace(
            architecture, scheduler.chunked_prefill_size, scheduler.max_running_requests
        )
        if choices.attention.chosen == "flashinfer":
            plans = planner_bytes(attention_shape(shard), bounds_of(config, architecture))
        beside |= {"plans of attention": plans} if plans else {}
        free = memory_bytes - CONTEXT_BYTES - num_bytes
    try:
        cache = cache_for(
            config,
            shard,
            device_type=device_type,
            weight_bytes=num_bytes,
            total_bytes=memory_bytes,
            free_bytes=free,
            planner_bytes=plans,
        )
    except ValueError as error:
        return _Filling(weights, again, beside, None, str(error))
    return _Filling(weights, again, beside, cache, None)


def plan_on(config: EngineConfig, architecture: Architecture, model: DeviceModel) -> Plan:
    """The same for a device out of the table."""
    return make_plan(config, architecture, model.device, name=model.name, memory_bytes=int(model.memory.value))


def _step(config: EngineConfig, shard: Shard, choices: Choices, device_type: str) -> Choice:
    runner = choices.moe.chosen or choices.moe.wanted
    if device_type == "cuda":
        reads_host = choices.attention.chosen in UNCAPTURED_ATTENTIONS
        reason = None if choices.attention.chosen else "there is no attention"
        return graph_choice(config.kernel, reason or reason_against_capture(device_type, runner, reads_host=reads_host))
    linear = choices.linear.chosen or choices.linear.wanted
    return cpu_step_choice(config.kernel.cpu_step, shard, runner=runner, linear=linear, dtype=choices.dtype)


def share_of(plan: Plan) -> Share:
    """What a step of this plan reads and multiplies on its first rank."""
    architecture, tp = plan.shard.architecture, plan.shard.tp
    quantized = architecture.quantization_block is not None
    plain = NUM_BYTES[plan.choices.dtype]
    number = 1 + 4 / architecture.quantization_block[1] if architecture.quantization_block is not None else plain
    return Share(
        weights=plan.weights,
        plain_kinds=PLAIN_KINDS if quantized else frozenset(plan.weights),
        num_experts=architecture.num_experts,
        top_k=architecture.top_k,
        num_layers=architecture.num_layers,
        expert_layers=len(architecture.expert_layers),
        expert_row=2 * architecture.expert_width * number,
        token_row=architecture.hidden_size * (number + plain),
        hidden_bytes=architecture.hidden_size * plain,
        cache_token=plan.token["keys and values"],
        query_channels=architecture.num_layers * architecture.num_heads * architecture.head_dim,
        reductions=(2, int(architecture.qk_norm == "all")) if tp > 1 else (0, 0),
    )


def rates_of(plan: Plan, model: DeviceModel) -> Rates:
    """What bounds a step of this plan. Products are FP8 where weights are and the device has them; ranks on one CPU share what it does."""
    fp8 = model.fp8 if plan.shard.architecture.quantization_block is not None else None
    shared_by = num_ranks_here(plan.config, model.device.type)
    read = model.read
    if model.cache is not None and model.cached_read is not None and plan.weight_bytes * shared_by <= model.cache.value:
        read = model.cached_read  # a floor: keys and values may come from further away
    return Rates(
        read=read.value / shared_by,
        matrices=(fp8 or model.plain).value / shared_by,
        plain=model.plain.value / shared_by,
        num_ranks=plan.shard.tp,
        link=float("inf") if model.link is None else model.link.value,
        reduce_seconds=0.0 if model.reduce_seconds is None else model.reduce_seconds.value,
    )


def decode_floors(plan: Plan, model: DeviceModel, batches: tuple[int, ...], context: int) -> list[floor.Floor]:
    """The least time of a step in which so many sequences of so many tokens decode."""
    share, rates = share_of(plan), rates_of(plan, model)
    return [floor.decode_floor(share, rates, batch=batch, context=context) for batch in batches]


def prefill_floor(plan: Plan, model: DeviceModel, context: int) -> float:
    """The least seconds to the first token of a prompt alone."""
    steps = floor.prefill_floors(share_of(plan), rates_of(plan, model), length=context, chunk=plan.config.scheduler.chunked_prefill_size)
    return sum(step.total_seconds for step in steps)
