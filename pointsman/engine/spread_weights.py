"""The weights of several ranks: what `Weights` does for one, on all of them or on none.

Each rank reads and stages its own part beside its steps. Only when every one of them has done so does rank 0 say that they are in force,
between the same two plans on each; where one could not, all drop what they have staged, and the weights before go on serving. An
order to put in force cannot fail: that is a change of references.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from pointsman.distributed import Group
from pointsman.engine import orders
from pointsman.engine.orders import Order
from pointsman.engine.staging import undo
from pointsman.engine.weights import Announced, Fresh, Weights
from pointsman.engine.workers import Workers
from pointsman.models.architecture import Architecture
from pointsman.request import MemoryTag
from pointsman.update import WHOLE, Update


class SpreadWeights:
    """Those of rank 0 and of all others; methods are as in `Weights`.

    Args:
        here: rank 0's.
        workers: the other ranks.
    """

    def __init__(self, here: Weights, workers: Workers) -> None:
        self._here, self._workers = here, workers
        self._staged: orders.Work | None = None

    @property
    def architecture(self) -> Architecture:
        return self._here.architecture

    @property
    def device(self) -> torch.device:
        return self._here.device

    @property
    def released(self) -> tuple[MemoryTag, ...]:
        return self._here.released

    def from_disk(self, model_path: str, update: Update = WHOLE) -> Fresh:
        fresh = self._stage(orders.FromDisk(model_path), lambda: self._here.from_disk(model_path, update))
        assert fresh is not None
        return fresh

    def from_tensors(self, tensors: Mapping[str, Tensor], update: Update = WHOLE) -> Fresh | None:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        return self._stage(orders.FromFiles([save(whole)], update), lambda: self._here.from_tensors(tensors, update))

    def from_files(self, files: Sequence[bytes], update: Update = WHOLE) -> Fresh | None:
        return self._stage(orders.FromFiles(list(files), update), lambda: self._here.from_files(files, update))

    def join_group(self, group: Group) -> None:
        """Every rank joins: the others have the ranks that follow rank 0's there."""
        last = group.rank + self._workers.number
        if last >= group.world_size:
            raise ValueError(
                f"world_size is {group.world_size}; the {self._workers.number + 1} ranks of this engine take the ranks {group.rank} to "
                f"{last} of the group, so it must be at least {last + 1}"
            )
        work = orders.JoinGroup(*group.address, group.rank, group.world_size, group.name, group.backend, group.timeout.total_seconds())
        self._stage(work, lambda: self._here.join_group(group))

    def leave_group(self, name: str) -> None:
        self._stage(orders.LeaveGroup(name), lambda: self._here.leave_group(name))

    def from_group(self, announced: Sequence[Announced], group_name: str, update: Update = WHOLE) -> Fresh | None:
        work = orders.FromGroup(group_name, list(announced), update)
        return self._stage(work, lambda: self._here.from_group(announced, group_name, update))

    def restore(self, tags: Collection[MemoryTag]) -> Fresh:
        fresh = self._stage(orders.FromBefore(list(tags)), lambda: self._here.restore(tags))
        assert fresh is not None
        return fresh

    def complete(self, fresh: Fresh) -> Fresh:
        completed = self._together(orders.Complete, lambda: self._here.complete(fresh))
        assert completed is not None
        return completed

    def enter(self, fresh: Fresh, version: str) -> None:
        self._staged = None
        self._workers.send(orders.Enter(version))
        self._here.enter(fresh, version)

    def release(self, tags: Collection[MemoryTag]) -> None:
        """Free the memory of these on every rank. Plans that were handed over before are through there first."""
        asked = self._workers.ask(lambda number: orders.Release(number, list(tags)))
        self._here.release(tags)
        for rank, answer in asked.wait():
            raise RuntimeError(f"rank {rank} could not free its memory: {answer.error}")

    def _stage(self, work: orders.Work, here: Callable[[], Fresh | None]) -> Fresh | None:
        self._staged = None
        return self._together(lambda number: orders.Stage(number, work), here, work)

    def _together(self, make: Callable[[int], Order], here: Callable[[], Fresh | None], work: orders.Work | None = None) -> Fresh | None:
        """Do it on all ranks, or have none of it.

        Args:
            here: rank 0's share; nothing has changed where it fails.
            work: what is staged here when that is done.
        """
        asked = self._workers.ask(make)
        try:
            fresh = here()
        except BaseException:
            asked.wait()
            self._forget()
            raise
        self._staged = work or self._staged
        if failed := asked.wait():
            self._forget()
            rank, answer = failed[0]
            raise (ValueError if answer.refused else RuntimeError)(f"rank {rank}: {answer.error}")
        return fresh

    def give_up(self) -> None:
        """Drop what is staged, or has come of an update in parts, on every rank."""
        self._forget()

    def _forget(self) -> None:
        self._workers.send(orders.Forget())
        if self._staged is not None:
            undo(self._here, self._staged)
            self._staged = None
