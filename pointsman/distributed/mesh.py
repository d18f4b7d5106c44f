"""The ranks of one model and what they exchange.

A rank is a process with a device. All ranks call the same collectives in the same order, since all execute the same plans, and each gets
the same bits: a sum is made in the order of ranks (gloo) or made once and handed on (NCCL), so what follows from it, such as the choice
of experts, is the same everywhere without another exchange.

A mesh of one rank exchanges nothing. What a rank holds of the model is arithmetic over `tp`, `ep` and `rank`, and not of this module.

On a GPU a collective is launched on the current stream like a kernel: nothing waits, and a CUDA graph captures it. On a CPU it is through
when the call returns.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from pointsman.distributed.peer_memory import PeerMemory, allocate
from pointsman.distributed.rendezvous import first_line, meet, reason_against

NAME = "mesh"
CPU = torch.device("cpu")


class Exchange(Protocol):
    """What a backend does with contiguous tensors of its device that are not empty; all ranks' have one shape and dtype."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each; the tensor's own memory may be the answer's."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Those of all ranks, in their order: [size, *tensor.shape]."""

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite it with that of rank 0."""

    @property
    def store(self) -> Any:
        """Where ranks leave each other messages, before there is anything to exchange."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Mesh:
    """One rank's place among the others.

    Attributes:
        tp: ranks that share every layer; all there are.
        ep: groups of ranks that hold whole experts; a divisor of tp. Within a group, experts are split in their width.
        rank: from 0; rank 0 alone schedules, draws tokens and answers.
        device: where the tensors of collectives are.
        exchange: what carries them; None where there is one rank.
    """

    tp: int = 1
    ep: int = 1
    rank: int = 0
    device: torch.device = CPU
    exchange: Exchange | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.tp

    @staticmethod
    def single(device: torch.device = CPU) -> Mesh:
        """A rank on its own."""
        return Mesh(device=device)

    @staticmethod
    def connect(
        *,
        tp: int,
        ep: int,
        rank: int,
        address: str,
        port: int,
        device: torch.device,
        token: str = NAME,
        timeout: float = 60.0,
        listener: socket.socket | None = None,
    ) -> Mesh:
        """Meet the other ranks, all of which call this with the same sizes; it returns when all of them can exchange.

        Args:
            address, port: where rank 0 listens, and nobody else.
            token: names the meeting; one that nobody can guess keeps strangers out.
            device: of this rank; gloo connects CPUs, NCCL GPUs.
            timeout: seconds that meeting, and each collective, may take.
            listener: rank 0's socket that listens there already, so that the port is known before others are started.

        Raises:
            ValueError: the sizes are no mesh, or this installation cannot connect such devices.
            ConnectionError: not all of them came in time.
        """
        if not 1 <= ep <= tp or tp % ep or not 0 <= rank < tp:
            raise ValueError(f"rank {rank} of tp {tp} and ep {ep}: ranks are below tp, and ep divides it")
        if tp == 1:
            return Mesh.single(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if reason := reason_against(backend):
            raise ValueError(f"ranks on {device.type} are connected by {backend}, {reason}")
        limit = timedelta(seconds=timeout)
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            store, group = meet((address, port), rank=rank, size=tp, name=token, backend=backend, timeout=limit, listener=listener)
            exchange = (_Nccl if backend == "nccl" else _Gloo)(group, store, rank, tp, limit)
            mesh = Mesh(tp=tp, ep=ep, rank=rank, device=device, exchange=exchange)
            mesh._meet()
        except (RuntimeError, OSError) as error:
            raise ConnectionError(f"rank {rank} did not meet the {tp - 1} others at {address}:{port}: {first_line(error)}") from error
        return mesh

    def _meet(self) -> None:
        """A first exchange: it makes the backend's connections now, and finds ranks that were started with other sizes."""
        sizes = self.all_gather(torch.tensor([[self.tp, self.ep, self.rank]], device=self.device)).tolist()
        if sizes != [[self.tp, self.ep, rank] for rank in range(self.tp)]:
            raise RuntimeError(f"(tp, ep, rank) of the ranks are {sizes}")

    def share_memory(self, num_bytes: int, name: str) -> PeerMemory | str:
        """Memory of so many bytes on each rank's device that all of them write to, or why there is none, the same on all ranks.

        Args:
            name: used once; all ranks call this with it.
        """
        assert self.exchange is not None
        return allocate(num_bytes, device=self.device, store=self.exchange.store, rank=self.rank, num_ranks=self.tp, name=name)

    def carried_by(self, make: Callable[[Exchange], Exchange]) -> Mesh:
        """The same ranks with another exchange in the place of theirs, made of it."""
        assert self.exchange is not None
        return replace(self, exchange=make(self.exchange))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in the tensor's dtype, with the same bits on each. The tensor is used up: its memory may be the answer's.

        Raises:
            ConnectionError: a rank is gone, or did not come in time. On a GPU this may come later, from whoever waits for the device.
        """
        if self.exchange is None or tensor.numel() == 0:
            return tensor
        with _Naming(self, "all-reduce"):
            return self.exchange.all_reduce(tensor.contiguous())

    def all_gather(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """Those of all ranks side by side along an axis, in the order of ranks.

        Args:
            sizes: of that axis on each rank, where they are not all the same.
        """
        if self.exchange is None:
            return tensor
        sizes = [tensor.shape[dim]] * self.tp if sizes is None else list(sizes)
        assert sizes[self.rank] == tensor.shape[dim]
        shape = list(tensor.shape)
        shape[dim] = max(sizes)
        padded = tensor
        if tensor.shape[dim] < shape[dim]:
            padded = tensor.new_zeros(shape)
            padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        if padded.numel() == 0:
            shape[dim] = sum(sizes)
            return tensor.new_empty(shape)
        with _Naming(self, "all-gather"):
            parts = self.exchange.all_gather(padded.contiguous())
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a contiguous tensor with that of rank 0, and return it."""
        if self.exchange is not None and tensor.numel():
            assert tensor.is_contiguous()
            with _Naming(self, "broadcast"):
                self.exchange.broadcast(tensor)
        return tensor


class _Naming:
    """Says which rank's exchange has failed; torch's error says why, and at times whose connection was lost."""

    def __init__(self, mesh: Mesh, what: str) -> None:
        self._mesh, self._what = mesh, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError | OSError):
            rank, size = self._mesh.rank, self._mesh.size
            raise ConnectionError(f"rank {rank} of {size}: the {self._what} failed, another rank is gone: {first_line(error)}") from error


class _Gloo:
    """CPUs over TCP. Sums are made by each rank of all ranks' numbers, in the order of ranks, so no bit depends on the size of a step."""

    def __init__(self, group: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        self._group, self.store, self._size, self._timeout = group, store, size, timeout

    def all_reduce(self, tensor: Tensor) -> Tensor:
        parts = self.all_gather(tensor)
        precise = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        total = parts[0].to(precise, copy=True)
        for part in parts[1:]:
            total += part
        return total.to(tensor.dtype)

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = tensor.new_empty((self._size, *tensor.shape))
        received = [part.view(-1).view(torch.uint8) for part in parts]
        self._group.allgather([received], [tensor.view(-1).view(torch.uint8)]).wait(self._timeout)
        return parts

    def broadcast(self, tensor: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait(self._timeout)


class _Nccl:
    """GPUs by NCCL, on the current stream."""

    def __init__(self, group: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        self._group, self.store, self._size = group, store, size
        self._reduce, self._gather, self._broadcast = dist.AllreduceOptions(), AllgatherOptions(), dist.BroadcastOptions()
        self._broadcast.rootRank = 0
        for options in (self._reduce, self._gather, self._broadcast):
            options.timeout, options.asyncOp = timeout, False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._order(self._group.allreduce([tensor], self._reduce))
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = tensor.new_empty((self._size, *tensor.shape))
        self._order(self._group._allgather_base(parts, tensor, self._gather))
        return parts

    def broadcast(self, tensor: Tensor) -> None:
        self._order(self._group.broadcast([tensor], self._broadcast))

    @staticmethod
    def _order(work: Any) -> None:
        """What follows on the current stream comes after it, also where the backend has launched it on a stream of its own."""
        if work is not None:
            work.wait()
