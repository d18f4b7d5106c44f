"""From a configuration to an engine's parts, on one rank or on several.

With several, the others are started before rank 0 loads, so that all load at once: as processes of this machine (`processes`), or as
actors of a Ray cluster (`ray`). What cannot work is refused before any is started.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pointsman import tiny
from pointsman.config import EngineConfig
from pointsman.distributed import Mesh
from pointsman.distributed.rendezvous import listen
from pointsman.engine.build import Parts, build
from pointsman.engine.candidates import ranks_choice
from pointsman.engine.device import choose_device
from pointsman.engine.ending import end_without
from pointsman.engine.executor import Executor, Leading, choose_executor
from pointsman.engine.orders import Join
from pointsman.engine.places import LOOPBACK, Places
from pointsman.engine.processes import start_processes
from pointsman.engine.spread_weights import SpreadWeights
from pointsman.engine.weights import Weights
from pointsman.engine.workers import RankLost, Workers
from pointsman.models import architecture_of
from pointsman.models.folder import locate, read_json
from pointsman.models.sharding import reason_against

logger = logging.getLogger(__name__)

EXCHANGE_SECONDS = 60.0

OnLost = Callable[[Exception], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Assembled:
    """An engine's parts, rank 0's share of them, and what runs steps and changes weights on all ranks."""

    parts: Parts
    executor: Executor
    weights: Weights | SpreadWeights


def assemble(config: EngineConfig, *, progress: bool | None = None, on_lost: OnLost | None = None) -> Assembled:
    """Load the model on every rank.

    Args:
        on_lost: called in another thread when a rank is lost, at whatever time, with the error that names it.

    Raises:
        ValueError: the checkpoint or an option cannot be served; the message says what would work.
        RankLost: a rank has ended while it was starting.
    """
    _check(config)
    overlap = not config.scheduler.disable_overlap_schedule
    if config.parallel.tensor_parallel_size == 1:
        parts = build(config, progress=progress)
        return Assembled(parts=parts, executor=choose_executor(parts.runner, overlap=overlap), weights=parts.weights)
    config = _for_ranks(config)
    places = _start(config)
    workers = Workers(places.links, on_lost, release=places.release)
    try:
        parts = build(config, mesh=_meet(config, places, workers), progress=progress)
        workers.wait_joined()
    except BaseException as error:
        cause = workers.cause(error) if isinstance(error, Exception) and not isinstance(error, ValueError | RankLost) else error
        workers.close()
        if workers.lost.done() and choose_device(config.kernel.device).type == "cuda":
            end_without(torch.cuda.synchronize, "the device")
        if cause is not error:
            raise cause from error
        raise
    executor = Leading(choose_executor(parts.runner, overlap=overlap), workers)
    return Assembled(parts=parts, executor=executor, weights=SpreadWeights(parts.weights, workers))


def _check(config: EngineConfig) -> None:
    """Refuse a layout in which the model cannot be, before anything is started."""
    if (replicas := config.parallel.data_parallel_size) != 1:
        raise ValueError(f"data_parallel_size is {replicas}; this is one engine. `pointsman serve` runs replicas, behind one address")
    tp, ep = config.parallel.tensor_parallel_size, config.parallel.expert_parallel_size
    if reason := ranks_choice(config.parallel.distributed_executor_backend, tp).refusal:
        raise ValueError(reason)
    if (tp, ep) == (1, 1):
        return
    folder = locate(config.model.model_path or str(tiny.path()), revision=config.model.revision, weights=False)
    if reason := reason_against(architecture_of(read_json(folder, "config.json")), tp, ep):
        raise ValueError(reason)


def _for_ranks(config: EngineConfig) -> EngineConfig:
    """What each rank is given: on a CPU the threads are divided among those of a machine."""
    if choose_device(config.kernel.device).type != "cpu":
        return config
    num_threads = config.kernel.num_threads or len(os.sched_getaffinity(0))
    kernel = dataclasses.replace(config.kernel, num_threads=max(num_threads // config.parallel.tensor_parallel_size, 1))
    return dataclasses.replace(config, kernel=kernel)


def _start(config: EngineConfig) -> Places:
    """Start the other ranks as the configuration says. Raises ValueError where it says what cannot be, and RankLost."""
    size = config.parallel.tensor_parallel_size
    on_gpus = choose_device(config.kernel.device).type == "cuda"
    if ranks_choice(config.parallel.distributed_executor_backend, size).take() == "ray":
        places: Places = importlib.import_module("pointsman.engine.ray").start_actors(size, on_gpus=on_gpus)
        return places
    if on_gpus and (found := torch.cuda.device_count()) < size:
        raise ValueError(f"tensor_parallel_size is {size}, and this machine has {found} CUDA devices; 'ray' spreads ranks over machines")
    devices = [f"cuda:{rank}" if on_gpus else "cpu" for rank in range(size)]
    try:
        return Places(links=start_processes(range(1, size)), devices=devices, address=LOOPBACK)
    except OSError as error:
        raise RankLost(f"the processes of {size - 1} ranks could not be started: {error}") from error


def _meet(config: EngineConfig, places: Places, workers: Workers) -> Mesh:
    """Bring all ranks together."""
    parallel, token = config.parallel, secrets.token_hex(16)
    level = logging.getLogger().getEffectiveLevel()
    if (num_threads := config.kernel.num_threads) is not None:
        torch.set_num_threads(num_threads)
    with listen(places.address, 0) as listener:
        port: int = listener.getsockname()[1]
        workers.meet(
            [
                Join(
                    engine=config,
                    rank=link.rank,
                    address=places.address,
                    port=port,
                    token=token,
                    device=places.devices[link.rank],
                    timeout=EXCHANGE_SECONDS,
                    log_level=logging.getLevelName(max(level, logging.WARNING) if level > logging.DEBUG else level),
                )
                for link in places.links
            ]
        )
        return Mesh.connect(
            tp=parallel.tensor_parallel_size,
            ep=parallel.expert_parallel_size,
            rank=0,
            address=places.address,
            port=port,
            token=token,
            device=torch.device(places.devices[0]),
            timeout=EXCHANGE_SECONDS,
            listener=listener,
        )
