"""Ranks agree whether they have memory that all write to: one that cannot is enough, and everyone is told its reason."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pointsman.distributed import Mesh, peer_memory
from pointsman.distributed.peer_memory import PeerMemory
from tests.distributed.ranks import run_ranks


def on_a_cpu(mesh: Mesh) -> None:
    assert mesh.share_memory(64, "box") == "the device is cpu"
    mesh.all_gather(torch.zeros(1))


def disagreeing(mesh: Mesh) -> None:
    """Each rank says something else of itself, with names that were not used before."""
    rank = mesh.rank
    mine = PeerMemory(torch.zeros(8, dtype=torch.uint8), [1, 2, 3], None)
    fine = {"_reason_against": lambda *_: None, "_host": lambda: "here", "_uuid": lambda _: f"gpu {rank}", "_share": lambda *_, **__: mine}
    cases = {
        "they can": ({}, mine),
        "one has a reason": ({"_reason_against": lambda *_: "its GPU is old" if rank == 1 else None}, "its GPU is old"),
        "another host": ({"_host": lambda: "there" if rank == 2 else "here"}, "the ranks are on different hosts"),
        "one GPU for two": ({"_uuid": lambda _: f"gpu {min(rank, 1)}"}, "several ranks use the same GPU"),
        "one fails": ({"_share": lambda *_, **__: "out of memory" if rank == 2 else mine}, "out of memory"),
    }
    for name, (changes, want) in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            for function, replaced in (fine | changes).items():
                patch.setattr(peer_memory, function, replaced)
            got = mesh.share_memory(8, name)
            assert got is want or got == want, (name, got)
    mesh.all_gather(torch.zeros(1))  # rank 0, which has the store, ends last


def test_an_exchange_is_met_by_who_has_exchanged_less_before() -> None:
    """As torch's own code goes through it: keys with a number of the process's own and a rank, set by one and awaited by the other."""
    common = dist.HashStore()
    exchanges = [peer_memory.Exchange(dist.PrefixStore("box", common)) for _ in range(2)]
    sides = [dist.PrefixStore("outer", exchange) for exchange in exchanges]
    for number in range(3):
        for rank, before in enumerate((0, 7)):
            sides[rank].set(f"CUDASymmetricMemory/{before + number}/{rank}", f"{rank} says {number}")
        for rank, before in enumerate((0, 7)):
            for other in range(2):
                key = f"CUDASymmetricMemory/{before + number}/{other}"
                sides[rank].wait([key])
                sides[rank].wait([key], timedelta(seconds=5))
                assert sides[rank].get(key) == f"{other} says {number}".encode()
    sides[0].set("plain", "same")
    assert sides[1].get("plain") == b"same"


def test_a_cpu_has_none() -> None:
    run_ranks(2, 1, on_a_cpu)


def test_all_ranks_are_told_the_same() -> None:
    run_ranks(3, 1, disagreeing)


def test_more_ranks_than_write_to_each_other() -> None:
    reason = peer_memory._reason_against(torch.device("cuda", 0), peer_memory.MOST_RANKS + 1)
    assert reason == "there are 9 ranks, and at most 8 write to each other"
