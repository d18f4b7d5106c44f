"""What a rank past the first does: load its part, execute every plan, and make and change weights when rank 0 does.

It decides nothing. Plans are executed in the order they come; new weights are read beside them, as on rank 0.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from pointsman.distributed import Mesh
from pointsman.engine.build import Rank, build_rank
from pointsman.engine.channel import Channel
from pointsman.engine.orders import (
    Answer,
    Complete,
    Enter,
    Fault,
    Forget,
    Join,
    Joined,
    Leave,
    Release,
    Run,
    Stage,
    Work,
    decode_order,
    encode,
)
from pointsman.engine.staging import prepare, undo
from pointsman.engine.weights import Fresh

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s"


def work(channel: Channel) -> Fault | None:
    """Obey until told to leave. Returns what it cannot be, where the checkpoint or an option is why.

    Raises:
        EOFError: rank 0 is gone.
        ConnectionError: another rank is gone, or does not come.
    """
    join = decode_order(channel.receive())
    if not isinstance(join, Join):
        raise ValueError(f"the first order is {type(join).__name__}; it must be Join")
    logging.basicConfig(level=join.log_level, format=LOG_FORMAT.format(rank=join.rank))
    if (num_threads := join.engine.kernel.num_threads) is not None:
        torch.set_num_threads(num_threads)
    parallel = join.engine.parallel
    mesh = Mesh.connect(
        tp=parallel.tensor_parallel_size,
        ep=parallel.expert_parallel_size,
        rank=join.rank,
        address=join.address,
        port=join.port,
        token=join.token,
        device=torch.device(join.device),
        timeout=join.timeout,
    )
    try:
        rank = build_rank(join.engine, mesh, progress=False)
    except ValueError as error:
        return Fault(str(error), refused=True)
    channel.send(encode(Joined()))
    worker = Worker(rank, join.rank, channel)
    while not isinstance(order := decode_order(channel.receive()), Leave):
        worker.obey(order)
    return None


class Worker:
    """One rank that has joined the others."""

    def __init__(self, rank: Rank, number: int, channel: Channel) -> None:
        self._number = number
        self._runner, self._weights = rank.runner, rank.weights
        self._channel = channel
        self._staged: Work | None = None
        self._fresh: Fresh | None = None

    def obey(self, order: Run | Stage | Complete | Enter | Forget | Release | Join) -> None:
        """Do it, or begin to. Raises what a step raises: what this rank holds is then unknown."""
        match order:
            case Run():
                self._runner.launch(order.plan)
            case Stage():
                threading.Thread(target=self._stage, args=(order,), name="weights", daemon=True).start()
            case Complete():
                self._answer(order.number, self._complete)
            case Enter():
                self._enter(order.version)
            case Forget():
                self._forget()
            case Release():
                self._answer(order.number, lambda: self._release(order))
            case Join():
                raise ValueError("Join is the first order only")

    def _answer(self, number: int, work: Callable[[], None]) -> None:
        """Do what is answered; nothing has changed where it fails."""
        try:
            work()
        except ValueError as error:
            answer = Answer(number, str(error), refused=True)
        except Exception as error:
            log.error("an order failed", exc_info=error)
            answer = Answer(number, f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            answer = Answer(number)
        self._channel.send(encode(answer))

    def _stage(self, order: Stage) -> None:
        def stage() -> None:
            self._staged, self._fresh = None, None
            self._fresh = prepare(self._weights, order.work, self._number)
            self._staged = order.work

        self._answer(order.number, stage)

    def _complete(self) -> None:
        assert self._fresh is not None
        self._fresh = self._weights.complete(self._fresh)

    def _enter(self, version: str) -> None:
        fresh, self._fresh, self._staged = self._fresh, None, None
        assert fresh is not None
        self._weights.enter(fresh, version)
        self._runner.enter(fresh.step, None if fresh.same else version)

    def _forget(self) -> None:
        staged, self._fresh, self._staged = self._staged, None, None
        if staged is not None:
            undo(self._weights, staged)

    def _release(self, order: Release) -> None:
        self._runner.drop_step()
        self._weights.release(order.tags)
