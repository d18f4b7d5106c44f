"""What those who run a server ask of its engine, as it crosses between the processes.

Each message has a number, and the answer to it has the same one: an update takes its time, and others may be asked for meanwhile.
"""

from __future__ import annotations

import msgspec

from pointsman.request import MemoryTag, PauseMode
from pointsman.update import Update


class _Numbered(msgspec.Struct, tag=True, kw_only=True):
    number: int = 0


class Pause(_Numbered, kw_only=True):
    """Let no step run, and do this with the requests that are there."""

    mode: PauseMode


class Continue(_Numbered, kw_only=True):
    """Let steps run again."""


class Release(_Numbered, kw_only=True):
    """Free memory; None is all that can be."""

    tags: list[MemoryTag] | None


class Resume(_Numbered, kw_only=True):
    """Have it again."""

    tags: list[MemoryTag] | None


class _Update(_Numbered, kw_only=True):
    """New weights.

    Attributes:
        hold: only make them ready; Install or Drop follows.
    """

    update: Update
    hold: bool = False


class UpdateFromDisk(_Update, kw_only=True):
    """Read the weights of a checkpoint and put them in force."""

    model_path: str


class UpdateFromTensors(_Update, kw_only=True):
    """Tensors, as safetensors files."""

    files: list[bytes]


class UpdateFromGroup(_Update, kw_only=True):
    """Tensors that come by broadcasts: (name, type, shape) of each, in their order."""

    group_name: str
    announced: list[tuple[str, str, tuple[int, ...]]]


class Install(_Numbered, kw_only=True):
    """Put the weights that are held in force, under this name."""

    weight_version: str


class Drop(_Numbered, kw_only=True):
    """Give up the weights that are held, or the parts of an update that have come."""


class JoinGroup(_Numbered, kw_only=True):
    """Meet the others of a process group."""

    master_address: str
    master_port: int
    rank: int
    world_size: int
    name: str
    backend: str
    timeout: float


class LeaveGroup(_Numbered, kw_only=True):
    """Have no more to do with it."""

    name: str


class Controlled(_Numbered, kw_only=True):
    """The answer to any of these.

    Attributes:
        error: why it was not done; None where it was.
        status: of HTTP, for the error: 400 where what was asked cannot be, 409 where it cannot be now, 500 where the fault is ours.
        paused, released, weight_version: of the engine, after it.
    """

    error: str | None = None
    status: int = 200
    paused: bool
    released: tuple[MemoryTag, ...] = ()
    weight_version: str


Work = Resume | UpdateFromDisk | UpdateFromTensors | UpdateFromGroup | JoinGroup | LeaveGroup
"""What takes time, and is done beside the steps; one at a time."""
Control = Pause | Continue | Release | Install | Drop | Work
