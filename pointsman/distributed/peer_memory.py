"""Memory of a GPU that the GPUs of other processes on the same host write to directly.

torch's symmetric memory makes it: every rank allocates alike and sees the others' part at addresses of its own. Never with multicast,
through which one program can put a host's GPUs out of service for others.

A rank that cannot take part must not leave the others waiting, so ranks tell each other through their store what is against it, before
they begin and when they have ended: either all have the memory, or none has.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from pointsman.distributed.rendezvous import first_line

MOST_RANKS = 8
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Exchange(dist.Store):  # type: ignore[name-defined,misc]
    """A store through which one exchange of symmetric memory goes, whatever its members have exchanged before. To be kept while it is used.

    torch numbers a process's exchanges since it began, in the keys (`CUDASymmetricMemory/7/0`: number, rank), and waits for those of the
    others under its own number. A process that had another engine before is ahead of a rank that has just begun, and they would wait
    for each other for ever. So numbers are replaced by the order in which they come here, which is the same on every rank.
    """

    def __init__(self, store: Any) -> None:
        super().__init__()
        self._store = store
        self._order: dict[str, int] = {}

    def _key(self, key: str) -> str:
        head, *rest = key.rsplit("/", 2)
        if len(rest) < 2 or not all(map(str.isdecimal, rest)):
            return key
        return f"{head}/{self._order.setdefault(rest[0], len(self._order))}/{rest[1]}"

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        found: bytes = self._store.get(self._key(key))
        return found

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        own = [self._key(key) for key in keys]
        self._store.wait(own) if timeout is None else self._store.wait(own, timeout)


class PeerMemory(NamedTuple):
    """This rank's part, uint8, and the addresses at which this device sees the parts of all ranks, its own among them.

    `mapping` keeps those addresses valid.
    """

    part: Tensor
    addresses: list[int]
    mapping: Any


def allocate(num_bytes: int, *, device: torch.device, store: Any, rank: int, num_ranks: int, name: str) -> PeerMemory | str:
    """Memory of so many bytes on each rank, or why they cannot have it: the same on all. All ranks call it, with a name used once.

    Args:
        store: of torch, shared by the ranks.
    """
    against = _reason_against(device, num_ranks)
    told = _tell(store, f"{name}/before", rank, num_ranks, f"no {against}" if against else f"yes {_host()} {_uuid(device)}")
    if reasons := [line.removeprefix("no ") for line in told if line.startswith("no ")]:
        return reasons[0]
    if len({line.split()[1] for line in told}) > 1:
        return "the ranks are on different hosts"
    if len(set(told)) < num_ranks:
        return "several ranks use the same GPU"
    got = _share(num_bytes, device=device, store=store, rank=rank, num_ranks=num_ranks, name=name)
    told = _tell(store, f"{name}/after", rank, num_ranks, got if isinstance(got, str) else "yes")
    return next((line for line in told if line != "yes"), got)


def _reason_against(device: torch.device, num_ranks: int) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if num_ranks > MOST_RANKS:
        return f"there are {num_ranks} ranks, and at most {MOST_RANKS} write to each other"
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    if len(others) + 1 >= num_ranks and not all(torch.cuda.can_device_access_peer(device, other) for other in others[: num_ranks - 1]):
        return "the GPUs cannot reach each other's memory"
    return None


def _share(num_bytes: int, *, device: torch.device, store: Any, rank: int, num_ranks: int, name: str) -> PeerMemory | str:
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    exchange = Exchange(dist.PrefixStore(name, store))  # type: ignore[attr-defined]
    own_name = uuid.uuid4().hex  # of this process's entry in torch's table of groups, through which it finds the store
    try:
        group = dist.ProcessGroup(exchange, rank, num_ranks)  # type: ignore[attr-defined]
        group._set_group_name(own_name)  # type: ignore[arg-type]
        c10d._register_process_group(own_name, group)  # type: ignore[arg-type]
        part = c10d._SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device, own_name)
        shared = c10d._SymmetricMemory.rendezvous(part, own_name)
    except RuntimeError as error:
        return first_line(error)
    addresses = [int(address) for address in shared.buffer_ptrs]
    offset = part.data_ptr() - addresses[rank]
    return PeerMemory(part, [address + offset for address in addresses], (shared, exchange))


def _tell(store: Any, key: str, rank: int, num_ranks: int, line: str) -> list[str]:
    """What every rank says."""
    store.set(f"{key}/{rank}", line)
    return [store.get(f"{key}/{other}").decode() for other in range(num_ranks)]


def _host() -> str:
    return BOOT.read_text().strip() if BOOT.is_file() else socket.gethostname()


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
