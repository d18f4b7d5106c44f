"""What those who run an engine do to it besides asking: pause it, change its weights, have it free memory for a time.

Everything here happens between two steps, in the thread that drives the engine; only reading new weights may happen elsewhere
(`pointsman.engine.weights`). What that brings to an end or forward, the engine's next `step` hands out, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import get_args

from torch import Tensor

from pointsman.distributed import Group
from pointsman.engine.engine import Engine
from pointsman.engine.weights import Announced, Fresh
from pointsman.request import MemoryTag, PauseMode
from pointsman.update import WHOLE, Update


class Busy(RuntimeError):
    """This cannot be done just now, for what else the engine is doing; the message says what would have to end."""


class Control:
    """The control of one engine; not thread-safe, for the thread that drives it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def pause(self, mode: PauseMode = "abort") -> None:
        """Let no further step run until `resume`. New requests are queued.

        Args:
            mode: "abort" ends every request that is there, with finish reason ABORT; "in_place" or "keep" keeps them as they are,
                with their lanes and cache; "retract" sends those that run back to the queue, from where they compute
                again what is then no longer cached.
        """
        if mode not in get_args(PauseMode):
            raise ValueError(f"mode is {mode!r:.80}; it must be one of {', '.join(map(repr, get_args(PauseMode)))}")
        engine = self._engine
        engine.settle()
        engine.paused = True
        if mode == "abort":
            engine.abort_all()
        elif mode == "retract":
            engine.retract()

    def resume(self) -> None:
        """Let steps run again; no error where they do."""
        self._engine.paused = False

    def release_memory(self, tags: Collection[MemoryTag] | None = None) -> None:
        """Free memory until `resume_memory`. Meanwhile no step runs, and requests are queued; those that wait already stay there.

        Args:
            tags: "weights" frees parameters and every form of them; "kv_cache" frees the storage of keys, values and routing rows, and
                forgets cached prefixes. None is both.

        Raises:
            ValueError: a tag is unknown or its memory released already, or a sequence runs or is kept in its lane by a pause.
        """
        wanted, released = _tags(tags), self._engine.weights.released
        if again := [tag for tag in wanted if tag in released]:
            raise ValueError(f"released already: {', '.join(again)}")
        self._engine.release(wanted)

    def check_resume(self, tags: Collection[MemoryTag] | None) -> list[MemoryTag]:
        """What `resume_memory` has to do. Raises ValueError where that cannot be."""
        wanted, released = _tags(tags), self._engine.weights.released
        if there := [tag for tag in wanted if tag not in released]:
            raise ValueError(f"not released: {', '.join(there)}; tags may name what is: {', '.join(released) or 'nothing'}")
        return wanted

    def resume_memory(self, tags: Collection[MemoryTag] | None = None) -> None:
        """Have released memory again; when all of it is there, steps run again, unless the engine is paused.

        Args:
            tags: "weights" reads the folder again that was read last, and `weight_version` is again what it was then; a full update
                brings other weights instead, and needs no `resume_memory` of them. "kv_cache" has as much storage as before. None is both.

        Raises:
            ValueError: a tag is unknown or its memory not released, or the folder is not what it was; nothing has changed.
        """
        self.install(self._engine.weights.restore(self.check_resume(tags)))

    def update_weights_from_disk(self, model_path: str, update: Update = WHOLE) -> str:
        """Replace all weights by a checkpoint's, or change nothing. Returns the version in force.

        Args:
            model_path: folder or Hugging Face id of a checkpoint of the same architecture.

        Raises:
            ValueError: the checkpoint cannot be used; the weights before go on serving.
        """
        return self.install(self._engine.weights.from_disk(model_path, update))

    def update_weights_from_tensor(self, tensors: Mapping[str, Tensor], update: Update = WHOLE) -> str:
        """Replace some weights, or all, by tensors under a checkpoint's names. Returns the version in force.

        Raises:
            ValueError: the tensors cannot be used; nothing has changed, and an update that was under way in parts is given up.
        """
        return self.install(self._engine.weights.from_tensors(tensors, update))

    def join_group(
        self, *, master_address: str, master_port: int, rank: int, world_size: int, name: str, backend: str, timeout: float
    ) -> None:
        """Meet the trainer, who is rank 0 and may be late by `timeout` seconds. Raises ValueError where that fails."""
        where = {"master_address": master_address, "master_port": master_port, "rank": rank, "world_size": world_size}
        weights = self._engine.weights
        weights.join_group(Group(**where, name=name, backend=backend, timeout=timeout, device=weights.device))  # type: ignore[arg-type]

    def leave_group(self, name: str) -> None:
        """Raises ValueError where the engine is in no such group."""
        self._engine.weights.leave_group(name)

    def update_weights_from_group(self, announced: Sequence[Announced], group_name: str, update: Update = WHOLE) -> str:
        """Replace weights by what rank 0 of the group broadcasts, in this order; see `Weights.from_group`.

        Raises:
            ValueError: as for tensors, or they do not come in time; then the group is left, too.
        """
        return self.install(self._engine.weights.from_group(announced, group_name, update))

    def install(self, fresh: Fresh | None) -> str:
        """Put in force what `weights` has made, if that is whole. Returns the version in force.

        Raises what making its step raises; nothing has changed then.
        """
        if fresh is None:
            return self._engine.weight_version
        self._engine.settle()
        fresh = self._engine.weights.complete(fresh)
        if fresh.update.abort_all_requests:
            self._engine.abort_all()
        self._engine.install(fresh)
        return self._engine.weight_version


def _tags(given: Collection[MemoryTag] | None) -> list[MemoryTag]:
    known = get_args(MemoryTag)
    if given is None:
        return list(known)
    if isinstance(given, str) or not given or (wrong := [tag for tag in given if tag not in known]):
        shown = given if isinstance(given, str) or not given else wrong[0]
        raise ValueError(f"tags has {shown!r:.80}; it must be a list of {' or '.join(map(repr, known))}")
    return [tag for tag in known if tag in given]
