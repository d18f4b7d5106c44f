"""How processes meet: a store at rank 0's address and no other, and a backend over it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BACKENDS = ("gloo", "nccl")


def meet(
    address: tuple[str, int],
    *,
    rank: int,
    size: int,
    name: str,
    backend: str,
    timeout: timedelta,
    watched: timedelta | None = None,
    listener: socket.socket | None = None,
) -> tuple[Any, Any]:
    """The members' own part of the store, and the backend's process group; both must be kept. All call this with the same name.

    Args:
        timeout: of meeting, and of each operation after it.
        watched: with NCCL, after what time torch's watchdog ends an operation, where whoever waits for it keeps the limit; None: `timeout`.
        listener: rank 0's socket that listens at the address already; it is taken over.

    Raises:
        RuntimeError, OSError: they do not all come in time.
    """
    # the store waits for nobody: the backend does, with the same limit
    options: dict[str, Any] = {"is_master": rank == 0, "wait_for_workers": False, "timeout": timeout}
    if rank == 0:
        options["master_listen_fd"] = (listener or listen(*address)).detach()
    store = dist.TCPStore(*address, **options)  # type: ignore[attr-defined]
    named = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    if backend == "nccl":
        return named, _nccl(named, rank, size, watched or timeout)
    return named, _gloo(named, rank, size, timeout, address)


def _nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _left_alone():
        return dist.ProcessGroupNCCL(store, rank, size, options)


@contextlib.contextmanager
def _left_alone() -> Iterator[None]:
    """Have a group of NCCL that is made meanwhile leave its process alone where a peer fails, and not look for the store of a peer that
    has ended in order, which it would tell of with a stack. torch asks the environment alone.

    After a failure its watchdog would wait for reports that nobody writes: 15 s and four times as much, and whoever lets go of the
    group would wait with it.
    """
    wanted = {"ASYNC_ERROR_HANDLING": "0", "ENABLE_MONITORING": "0", "DUMP_ON_TIMEOUT": "0", "WAIT_TIMEOUT_DUMP_MILSEC": "1"}
    wanted = {f"TORCH_NCCL_{name}": value for name, value in wanted.items()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gloo(store: Any, rank: int, size: int, timeout: timedelta, address: tuple[str, int]) -> Any:
    gloo = dist.ProcessGroupGloo
    options = gloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=own_address(*address))]
    return gloo(store, rank, size, options)


def reason_against(backend: str) -> str | None:
    """Why this installation cannot use a backend, or None."""
    if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        return "which needs a CUDA device; 'gloo' does not"
    return None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at this address and no other; the store, which takes it, would otherwise listen on all of them.

    Port 0 is one that nobody has. Raises OSError where it is taken.
    """
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def own_address(host: str, port: int) -> str:
    """The address of this machine that its way to a host begins at, so that nothing listens on any other. Raises OSError."""
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    with socket.socket(family, kind, protocol) as way:
        way.connect(address)  # of a datagram: nothing is sent
        found: str = way.getsockname()[0]
    return str(ipaddress.ip_address(found))


def first_line(error: Exception) -> str:
    """What an error of torch says, without the stack that it tells."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
