"""Collectives against what they mean, and ranks that are wrong, gone, or never come."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
import torch

from pointsman.distributed import Mesh
from tests.distributed.ranks import run_ranks

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def part(rank: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """What a rank has: numbers whose sum depends on its order and on its precision."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 10 ** (rank % 4)).mul(100).to(dtype)


def collectives(mesh: Mesh) -> None:
    for dtype in DTYPES:
        for shape in ((3, 5), (1,), (), (0, 4), (7, 2, 3)):
            parts = [part(rank, dtype, *shape) for rank in range(mesh.size)]
            total = parts[0].float() if dtype.is_floating_point and dtype != torch.float64 else parts[0].clone()
            for other in parts[1:]:
                total = total + other
            assert torch.equal(mesh.all_reduce(parts[mesh.rank].clone()), total.to(dtype))
            assert torch.equal(mesh.broadcast(parts[mesh.rank].clone()), parts[0])
        parts = [part(rank, dtype, 4, 6) for rank in range(mesh.size)]
        assert torch.equal(mesh.all_reduce(parts[mesh.rank].T), mesh.all_reduce(parts[mesh.rank]).T)
        sizes = [(2 * rank + 1) % 4 for rank in range(mesh.size)]
        for dim in range(3):
            shapes = [[3, 5, 2] for _ in sizes]
            for rank, size in enumerate(sizes):
                shapes[rank][dim] = size
            parts = [part(rank, dtype, *shape) for rank, shape in enumerate(shapes)]
            assert torch.equal(mesh.all_gather(parts[mesh.rank], dim, sizes), torch.cat(parts, dim))
            empty = part(0, dtype, *([3] * dim), 0, 2)
            assert mesh.all_gather(empty, dim).shape == empty.shape
    assert mesh.all_gather(torch.tensor([mesh.rank])).tolist() == list(range(mesh.size))


def test_collectives() -> None:
    run_ranks(3, 1, collectives)


def one_leaves(mesh: Mesh) -> None:
    mesh.all_reduce(torch.ones(2))
    if mesh.rank == 1:
        os.kill(os.getpid(), 9)
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=f"rank {mesh.rank} of 3: the (broadcast|all-reduce) failed, another rank is gone"):
        while True:  # who sends may have sent before it learns that nobody receives
            mesh.broadcast(torch.ones(2))
            mesh.all_reduce(torch.ones(2))
    assert time.monotonic() - begin < 60


def test_a_rank_that_dies() -> None:
    """It is noticed by those who wait, long before the time limit."""
    with pytest.raises(AssertionError) as told:
        run_ranks(3, 1, one_leaves, timeout=100)
    assert str(told.value) == "rank 1 ended without a word"


def connect(rank: int, port: int, *, tp: int = 2, ep: int = 1, **options: object) -> Mesh:
    return Mesh.connect(tp=tp, ep=ep, rank=rank, address="127.0.0.1", port=port, device=CPU, **options)


def test_a_rank_that_never_comes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ConnectionError, match="rank 0 did not meet the 1 others at"):
        connect(0, listener.getsockname()[1], listener=listener, timeout=0.3)


def test_ranks_of_different_sizes() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    faults: list[str] = []

    def other() -> None:
        with pytest.raises(ConnectionError) as told:
            connect(1, port, ep=1, timeout=20)
        faults.append(str(told.value))

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(ConnectionError, match=r"\(tp, ep, rank\) of the ranks are \[\[2, 2, 0\], \[2, 1, 1\]\]"):
        connect(0, port, ep=2, listener=listener, timeout=20)
    thread.join()
    assert "[[2, 2, 0], [2, 1, 1]]" in faults[0]


@pytest.mark.parametrize(("tp", "ep", "rank"), [(2, 3, 0), (4, 3, 0), (2, 1, 2), (2, 0, 0), (2, 1, -1)])
def test_what_is_no_mesh(tp: int, ep: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of tp {tp} and ep {ep}"):
        connect(rank, 1, tp=tp, ep=ep)


def test_gpus_need_nccl() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="connected by nccl, which needs a CUDA device"):
            Mesh.connect(tp=2, ep=1, rank=0, address="127.0.0.1", port=1, device=torch.device("cuda", 0))


def test_a_rank_on_its_own() -> None:
    mesh, x = connect(0, 1, tp=1), torch.ones(2, 3)
    assert (mesh.tp, mesh.ep, mesh.rank, mesh.size) == (1, 1, 0, 1)
    assert mesh.all_reduce(x) is x and mesh.all_gather(x, 1) is x and mesh.broadcast(x) is x
