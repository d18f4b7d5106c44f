"""Everything that is decided once, at start-up.

From a configuration to the parts of an engine: which checkpoint, which kernels, how much cache. Each choice is logged with its
reason, and a wish that cannot be granted ends here with what would work instead.

Where several ranks share a model, each builds what runs its part of a step (`build_rank`). The first one has in addition what decides
and what knows text (`build`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pointsman import tiny
from pointsman.cache.pages import PagePool
from pointsman.cache.radix import RadixCache
from pointsman.config import EngineConfig
from pointsman.distributed import Mesh
from pointsman.engine.batch import Lanes
from pointsman.engine.compiled import choose_step
from pointsman.engine.device import choose_device, device_memory
from pointsman.engine.device_lanes import DeviceLanes
from pointsman.engine.device_options import check_options
from pointsman.engine.device_sampler import DeviceSampler, choose_way
from pointsman.engine.device_step import DeviceMemory, make_device_step, make_planner
from pointsman.engine.grammars import Grammars
from pointsman.engine.memory import CacheSize, cache_for, context_length_of, kv_dtype_of, memory_bytes, num_ranks_here
from pointsman.engine.model_runner import ModelRunner, Step
from pointsman.engine.plan import Plan, make_plan
from pointsman.engine.step_sizes import bounds_of
from pointsman.engine.storage import CacheStorage
from pointsman.engine.tuning import tune_experts
from pointsman.engine.weights import Weights, load_decoder
from pointsman.kernels.apart import apart
from pointsman.kernels.capability import describe
from pointsman.kernels.dtypes import NUM_BYTES
from pointsman.kernels.flashinfer_room import num_bytes as planner_bytes
from pointsman.kernels.operations import ATTENTIONS
from pointsman.layers.paged_kv import KV_DTYPES, PagedKV
from pointsman.models import architecture_of
from pointsman.models.architecture import Architecture
from pointsman.models.decoder import Decoder
from pointsman.models.folder import locate, read_json
from pointsman.models.parameters import held
from pointsman.models.sharding import describe_split
from pointsman.moe.capture import RouteStore
from pointsman.moe.load import DeviceExpertLoad, ExpertLoad
from pointsman.moe.runner import AnyRunner
from pointsman.sampling.constraint import Constraint
from pointsman.scheduler import Scheduler
from pointsman.step import LaneStart
from pointsman.text import ChatTemplate, Tokenizer

logger = logging.getLogger(__name__)


ALONE = Mesh.single()


@dataclass(frozen=True, eq=False, kw_only=True)
class Rank:
    """What executes plans: the part of the model that one rank holds, and its cache."""

    folder: Path
    architecture: Architecture
    context_length: int
    choices: dict[str, str]
    cache: CacheSize
    runner: ModelRunner
    weights: Weights
    moe_runner: AnyRunner


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts(Rank):
    """What an engine is made of. `grammars` is None where answers cannot be kept to any."""

    model_name: str
    tokenizer: Tokenizer | None
    generation_defaults: dict[str, Any]
    scheduler: Scheduler
    grammars: Grammars | None

    @property
    def chat_template(self) -> ChatTemplate | None:
        return None if self.tokenizer is None else self.tokenizer.chat_template


def build(config: EngineConfig, *, mesh: Mesh = ALONE, progress: bool | None = None) -> Parts:
    """Load the model, or the first rank's part of it, and lay out its cache.

    Raises:
        ValueError: the checkpoint or an option cannot be served; the message says what would work.
    """
    assert mesh.rank == 0
    folder, decoder = _load(config, mesh, progress)
    architecture = decoder.architecture
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    if tokenizer is not None and tokenizer.vocab_size > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model {architecture.vocab_size}: they do not belong together"
        )
    eos_ids = () if tokenizer is None else tokenizer.eos_ids
    grammars = None
    if tokenizer is not None and eos_ids:
        grammars = Grammars(tokenizer, architecture.vocab_size, config.scheduler.max_running_requests)
    constrain = _unconstrained if grammars is None else grammars.constrain
    logger.info("%s", _plan(config, architecture, decoder.device).short())
    rank = _rank(config, mesh, folder, decoder, eos_ids, constrain, progress)
    return Parts(
        **{field.name: getattr(rank, field.name) for field in dataclasses.fields(Rank)},
        model_name=config.model.served_model_name or config.model.model_path or tiny.NAME,
        tokenizer=tokenizer,
        generation_defaults=_generation_defaults(folder),
        scheduler=_scheduler(config, rank.cache, rank.context_length, eos_ids),
        grammars=grammars,
    )


def build_rank(config: EngineConfig, mesh: Mesh, *, progress: bool | None = None) -> Rank:
    """The same for a rank past the first, while the first builds its own: they exchange what they must agree on.

    Raises:
        ValueError: as `build`.
    """
    assert mesh.rank > 0
    folder, decoder = _load(config, mesh, progress)
    return _rank(config, mesh, folder, decoder, (), _constrained_elsewhere, progress)


def _plan(config: EngineConfig, architecture: Architecture, device: torch.device) -> Plan:
    """What was to be expected, as `pointsman explain` tells it."""
    name, total = device.type, memory_bytes()
    if device.type == "cuda":
        name, (total, _) = torch.cuda.get_device_name(device), device_memory(device)
    return make_plan(config, architecture, describe(device), name=name, memory_bytes=total)


def _load(config: EngineConfig, mesh: Mesh, progress: bool | None) -> tuple[Path, Decoder]:
    device = choose_device(config.kernel.device) if mesh.size == 1 else mesh.device
    check_options(config, device.type)
    assert (mesh.tp, mesh.ep) == (config.parallel.tensor_parallel_size, config.parallel.expert_parallel_size)
    model_path = config.model.model_path or str(tiny.path())
    folder = locate(model_path, revision=config.model.revision, weights=config.model.load_format != "dummy")
    plan = _plan(config, architecture_of(read_json(folder, "config.json")), device)
    if plan.contradictions:  # told before weights are read; what fits is known when they are there
        raise ValueError(plan.contradictions[0])
    return folder, load_decoder(config, folder, device, mesh=mesh, load_format=config.model.load_format, progress=progress)


def _rank(
    config: EngineConfig,
    mesh: Mesh,
    folder: Path,
    decoder: Decoder,
    eos_ids: tuple[int, ...],
    constrain: Callable[[LaneStart], Constraint | None],
    progress: bool | None,
) -> Rank:
    context_length = context_length_of(config, decoder.architecture)
    if launches_steps(decoder.device):
        decoder.prepare()  # what the kernels keep beside the weights is part of what the cache has to leave
        tune_experts(config, mesh, decoder)
    cache = _size(config, mesh, decoder)
    lanes = Lanes(
        max_lanes=config.scheduler.max_running_requests,
        max_pages=math.ceil(context_length / cache.page_size),
        page_size=cache.page_size,
        vocab_size=decoder.architecture.vocab_size,
        eos_token_ids=eos_ids,
        constrain=constrain,
    )
    runner, storage, make_step = _runner(config, mesh, decoder, cache, lanes, progress)
    return Rank(
        folder=folder,
        architecture=decoder.architecture,
        context_length=context_length,
        choices=_choices(config, decoder),
        cache=cache,
        runner=runner,
        weights=Weights(config, decoder, folder, storage, make_step, aside=not launches_steps(decoder.device)),
        moe_runner=decoder.backends.moe,
    )


def _size(config: EngineConfig, mesh: Mesh, decoder: Decoder) -> CacheSize:
    """What fits; of several ranks all have as much as the one with the least room."""
    device, free = decoder.device, None
    total = memory_bytes() // num_ranks_here(config, device.type)
    if device.type == "cuda":
        total, free = device_memory(device)
    forms = _plan(config, decoder.architecture, device).forms
    weights = sum(size.num_bytes for size in held(decoder.parameters).values()) + sum(forms.values())
    plans = 0
    if decoder.backends.attention.planner is not None:
        plans = planner_bytes(decoder.attention_shape, bounds_of(config, decoder.architecture))
    size = cache_for(
        config, decoder.shard, device_type=device.type, weight_bytes=weights, total_bytes=total, free_bytes=free, planner_bytes=plans
    )
    num_pages = int(mesh.all_gather(torch.tensor([size.num_pages], device=mesh.device)).min())
    size = dataclasses.replace(size, num_pages=num_pages)
    logger.info("cache: %d tokens of %d bytes in pages of %d", size.num_tokens, size.bytes_per_token, size.page_size)
    if decoder.architecture.qk_norm is None and NUM_BYTES[kv_dtype_of(config)] == 1:
        logger.warning("kv_cache_dtype is fp8_e4m3, and %s does not norm its keys: what exceeds 448 is cut", decoder.architecture.name)
    return size


def _choices(config: EngineConfig, decoder: Decoder) -> dict[str, str]:
    """What became of the wishes, by the names of their flags."""
    shard = decoder.shard
    split = {} if shard.whole else {"tensor_parallel_size": "; ".join(describe_split(shard.architecture, shard.tp, shard.ep))}
    return split | {
        "device": decoder.device.type,
        "moe_runner_backend": decoder.backends.moe.name,
        "attention_backend": next(name for name, has in ATTENTIONS.items() if has is decoder.backends.attention),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "kv_cache_dtype": kv_dtype_of(config),
    }


def _scheduler(config: EngineConfig, cache: CacheSize, context_length: int, eos_ids: tuple[int, ...]) -> Scheduler:
    pool = PagePool(cache.num_pages)
    return Scheduler(
        max_running=config.scheduler.max_running_requests,
        token_budget=config.scheduler.chunked_prefill_size,
        max_context=context_length,
        page_size=cache.page_size,
        pool=pool,
        radix=None if config.cache.disable_radix_cache else RadixCache(pool, cache.page_size),
        eos_token_ids=eos_ids,
    )


def _runner(
    config: EngineConfig, mesh: Mesh, decoder: Decoder, cache: CacheSize, lanes: Lanes, progress: bool | None
) -> tuple[ModelRunner, CacheStorage, Callable[[Decoder], Step]]:
    """What runs steps, the memory of the cache, and what makes a step for other weights."""
    architecture = decoder.architecture
    launches = launches_steps(decoder.device)
    num_pages = cache.num_pages + (1 if launches else 0)  # the last is that of rows which pad a step
    with apart(decoder.device):
        kv = PagedKV.allocate(
            num_layers=architecture.num_layers,
            num_pages=num_pages,
            num_kv_heads=decoder.attention_shape.num_kv_heads,
            page_size=cache.page_size,
            head_dim=architecture.head_dim,
            dtype=KV_DTYPES[kv_dtype_of(config)],
            device=decoder.device,
        )
        routes = RouteStore(kv.num_slots, len(architecture.expert_layers), architecture.top_k, architecture.num_experts, decoder.device)
    storage = CacheStorage(kv, routes)
    if launches:
        tables = DeviceLanes(lanes.max_lanes, lanes.max_pages, decoder.device)
        counted, planner = DeviceExpertLoad(routes, architecture.num_experts), make_planner(config, decoder)
        memory = DeviceMemory(kv=kv, routes=routes, lanes=tables, load=counted, planner=planner)

        def make_step_on_device(decoder: Decoder) -> Step:
            return make_device_step(config, decoder, memory, progress=progress)

        sampler = DeviceSampler(tables, decoder.device, choose_way(decoder.device, architecture.vocab_size, decoder.dtype), mesh)
        return ModelRunner(make_step_on_device(decoder), lanes, routes, memory.load, mesh, sampler), storage, make_step_on_device
    load = ExpertLoad(routes, architecture.num_experts)

    def make_step(decoder: Decoder) -> Step:
        return choose_step(config, decoder, kv, routes, lanes)

    return ModelRunner(make_step(decoder), lanes, routes, load, mesh), storage, make_step


def launches_steps(device: torch.device) -> bool:
    """Whether steps are launched on the device and the host goes on meanwhile."""
    return device.type == "cuda"


def _unconstrained(start: LaneStart) -> None:
    """Without a tokenizer there are no grammars, and no request has one."""
    assert start.sampling.grammar is None


def _constrained_elsewhere(start: LaneStart) -> None:
    """The first rank keeps to grammars; the others are told its tokens."""


def _generation_defaults(folder: Path) -> dict[str, Any]:
    """The sampling values a checkpoint advises; `do_sample: false` is temperature 0."""
    advice = read_json(folder, "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {name: advice[name] for name in known if advice.get(name) is not None}
    if advice.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
