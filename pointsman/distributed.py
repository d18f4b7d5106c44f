"""A process group at an explicit address, over which a trainer broadcasts weights: rank 0 sends, all others receive.

It is made of torch's parts without torch's global state: a store at rank 0's address, and the backend over it. Nothing but the bytes of
tensors crosses, as uint8 and never as objects, which torch would pickle. Whatever waits has a time limit: a peer that has died ends the
operation with an error, and after one the group is of no more use, because nobody can tell which broadcast comes next.

With NCCL the host waits, not a stream: steps share the stream of whoever receives, and would stand still with it. And what fails there
is an error here and not, as torch would have it, the end of the process.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKENDS = ("gloo", "nccl")
POLL_SECONDS = 0.001


class Group:
    """One member of a group; `join` meets the others.

    Args:
        rank: 0 is the trainer, who also holds the store.
        timeout: seconds that joining, and the broadcasts of one call, may take.
        device: with NCCL, where this member's tensors are; None is the CUDA device that is current now.

    Raises:
        ValueError: a value is out of range, or this installation does not have the backend.
    """

    def __init__(
        self,
        *,
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        name: str,
        backend: str = "gloo",
        timeout: float = 60.0,
        device: torch.device | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r:.80}; it must be one of {', '.join(map(repr, BACKENDS))}")
        if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
            raise ValueError("backend is 'nccl', which needs a CUDA device; 'gloo' does not")
        if not 2 <= world_size <= 1024 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}; the size goes from 2 to 1024, and ranks are below it")
        self.name = name
        self._address = (master_address, master_port)
        self._rank, self._world_size, self._backend = rank, world_size, backend
        self._timeout = timedelta(seconds=timeout)
        self._device = torch.device("cpu")
        if backend == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
        self._group: Any = None
        self._store: Any = None

    def join(self) -> None:
        """Meet the others. Raises ValueError where they do not all come in time."""
        host, port = self._address
        try:
            # the store waits for nobody: the backend does, with the same limit
            options: dict[str, Any] = {"is_master": self._rank == 0, "wait_for_workers": False, "timeout": self._timeout}
            if self._rank == 0:
                options["master_listen_fd"] = _listen(host, port)
            self._store = dist.TCPStore(host, port, **options)  # type: ignore[attr-defined]
            self._group = self._connect(dist.PrefixStore(self.name, self._store))  # type: ignore[attr-defined]
            if self._backend == "nccl":  # which connects with the first broadcast
                self._broadcast([torch.zeros(1, dtype=torch.uint8, device=self._device)])
        except (RuntimeError, OSError) as error:
            raise ValueError(f"the group {self.name!r} at {host}:{port} did not come together: {_reason(error)}") from error

    def _connect(self, store: Any) -> Any:
        if self._backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            with _errors_told():
                return dist.ProcessGroupNCCL(store, self._rank, self._world_size, options)
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()  # type: ignore[attr-defined]
        options._timeout = self._timeout
        options._devices = [gloo.create_device(hostname=own_address(*self._address))]
        return gloo(store, self._rank, self._world_size, options)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast their bytes, one after the other, as rank 0. Raises ValueError where that fails."""
        assert self._rank == 0
        if wrong := [tensor.device for tensor in tensors if self._backend == "nccl" and tensor.device != self._device]:
            raise ValueError(f"a tensor is on {wrong[0]}; this member of the group {self.name!r} broadcasts from {self._device}")
        self._broadcast([tensor.detach().contiguous() for tensor in tensors])

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Fill them with what rank 0 broadcasts; all members must know their sizes. Raises ValueError where that fails."""
        assert self._rank != 0 and all(tensor.is_contiguous() for tensor in tensors)
        self._broadcast(tensors)

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._timeout
        flat = [tensor.view(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]
        try:
            if self._backend == "nccl":
                self._wait([self._group.broadcast([bytes_B], options) for bytes_B in flat])
            else:
                for bytes_B in flat:
                    self._group.broadcast([bytes_B], options).wait(self._timeout)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"a broadcast in the group {self.name!r} failed, and the group is of no more use: {_reason(error)}") from error

    def _wait(self, works: Sequence[Any]) -> None:
        """Until these are through on the device, while its other streams go on. Raises RuntimeError where that takes too long."""
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(aside):
            for work in works:
                work.wait()
            through = aside.record_event()
        limit = time.monotonic() + self._timeout.total_seconds()
        while not through.query():
            if time.monotonic() > limit:
                self._group.abort()  # what waits on the device ends with it
                raise RuntimeError(f"nothing came for {self._timeout.total_seconds():g} s")
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _errors_told() -> Iterator[None]:
    """Have a group of NCCL that is made meanwhile leave its process alone where a peer fails. torch asks the environment alone."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _listen(host: str, port: int) -> int:
    """A listening socket at this address and no other; the store, which takes it, would otherwise listen on all of them."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family).detach()


def own_address(host: str, port: int) -> str:
    """The address of this machine that its way to a host begins at, so that nothing listens on any other. Raises OSError."""
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    with socket.socket(family, kind, protocol) as way:
        way.connect(address)  # of a datagram: nothing is sent
        found: str = way.getsockname()[0]
    return str(ipaddress.ip_address(found))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
