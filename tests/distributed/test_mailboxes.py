"""Layers whose kernels sum over ranks against those that exchange first: norms to the bit, q and k but for the order of a sum.

Two ranks run the kernels in Triton's interpreter, with mailboxes in a file that both map in the place of memory that GPUs share.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.distributed.peer_memory import PeerMemory
from pointsman.kernels import reference
from pointsman.kernels.operations import GLUES
from pointsman.kernels.weight import Quantized
from pointsman.layers import mailboxes
from pointsman.layers.attention import Attention, NormedTogether, Rotation
from pointsman.layers.mailboxes import mailboxes_of, with_mailboxes
from pointsman.layers.norm import RMSNorm
from tests.distributed.ranks import run_ranks
from tests.kernels.interpreter import correct

RANKS, HIDDEN, ROWS, CHANNELS = 2, 256, 6, 16
GLUE = GLUES["triton"]


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def boxed(mesh: Mesh, folder: Path) -> Mesh:
    """The mesh with mailboxes of few rows."""
    correct()

    def share(self: Mesh, num_bytes: int, name: str) -> PeerMemory:
        parts = [
            torch.from_file(str(folder / f"{name}-{rank}"), shared=True, size=num_bytes, dtype=torch.uint8) for rank in range(self.size)
        ]
        return PeerMemory(parts[self.rank], [part.data_ptr() for part in parts], parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mesh, "share_memory", share)
        patch.setattr(mailboxes, "MAILBOX_ROWS", ROWS)
        found = with_mailboxes(mesh, HIDDEN)
    assert mailboxes_of(found) is not None and mailboxes_of(mesh) is None
    assert with_mailboxes(found, HIDDEN) is found
    return found


def norms(mesh: Mesh, folder: str) -> None:
    weight_D, both = normal(HIDDEN, seed=0), (mesh, boxed(mesh, Path(folder)))
    plain, joined = (RMSNorm(weight_D, 1e-6, GLUE, one) for one in both)
    for turn, rows in enumerate((3, ROWS, 1, ROWS + 2, 2, 0)):  # one of them has more rows than a mailbox
        x_TD, delta_TD = normal(rows, HIDDEN, seed=turn), normal(rows, HIDDEN, seed=100 + 10 * turn + mesh.rank)
        for one, other in zip(plain(x_TD, delta_TD.clone()), joined(x_TD, delta_TD.clone()), strict=True):
            assert torch.equal(one, other)
        _, one = plain(x_TD, delta_TD.clone(), quantize=True)
        _, other = joined(x_TD, delta_TD.clone(), quantize=True)
        assert isinstance(one, Quantized) and isinstance(other, Quantized)
        assert torch.equal(one.data.view(torch.uint8), other.data.view(torch.uint8)) and torch.equal(one.scale, other.scale)
        assert all(torch.equal(one, other) for one, other in zip(plain(x_TD, None), joined(x_TD, None), strict=True))
        assert torch.equal(both[0].all_reduce(delta_TD.clone()), both[1].all_reduce(delta_TD.clone()))
        whole = torch.arange(4) + mesh.rank
        assert torch.equal(both[1].all_reduce(whole), torch.tensor([1, 3, 5, 7]))
        assert torch.equal(both[1].all_gather(whole), both[0].all_gather(whole))


def heads(mesh: Mesh, folder: str) -> None:
    """2 query heads a rank; one key head a rank, or one for both."""
    joined = boxed(mesh, Path(folder))
    for kv_heads in (2, 1):
        owns = kv_heads == 2 or mesh.rank == 0
        for rows in (2, ROWS, ROWS + 1):
            q_TN, kv_TN = (
                normal(rows, 2 * CHANNELS, seed=mesh.rank),
                normal(rows, 2 * CHANNELS, seed=9 + (mesh.rank if kv_heads == 2 else 0)),
            )
            found: list[tuple[Tensor, ...]] = []
            for one in (mesh, joined):
                k, v = (torch.zeros(3, 1, 4, CHANNELS, dtype=torch.bfloat16) for _ in range(2))
                together = NormedTogether(4 * CHANNELS, kv_heads * CHANNELS, owns, True, one)
                found.append((attend(together, torch.cat((q_TN, kv_TN), dim=1), k, v), k, v))
            for plain, fused in zip(*found, strict=True):
                # a sum in another order may move a number to the neighbouring bfloat16 before the rotation, which adds two of them
                torch.testing.assert_close(plain, fused, rtol=2**-7, atol=2**-6)


def attend(together: NormedTogether, qkv_TN: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries of a layer of attention that answers them."""
    linear: Any = type("Same", (), {"takes_quantized": False, "__call__": lambda self, x: x})()
    implementation: Any = SimpleNamespace(run=lambda q_TQC, *_: q_TQC, run_quantize=None)
    weights = normal(2 * CHANNELS, seed=1), normal(CHANNELS, seed=2)
    layer = Attention(0, linear, linear, *weights, 1e-6, CHANNELS, implementation, GLUE, together)
    positions_T = torch.arange(len(qkv_TN))
    context: Any = SimpleNamespace(
        kv=SimpleNamespace(k=[k], v=[v]), slots_T=positions_T, attention_plan=None, positions_T=positions_T, page_table_LP=None
    )
    return layer(qkv_TN, Rotation(*reference.rotary_angles(positions_T, 8, 5e6)), context)


def files(folder: Path) -> str:
    for rank in range(RANKS):
        for name, size in (("rows", 2 * ROWS * HIDDEN * 2), ("squares", 2 * 2 * ROWS * 4)):
            (folder / f"mailbox-{name}-{rank}").write_bytes(bytes(size))
    return str(folder)


def test_norms_that_sum_have_the_bits_of_those_that_are_given_the_sum(tmp_path: Path) -> None:
    run_ranks(RANKS, 1, norms, files(tmp_path))


def test_q_and_k_are_normed_over_all_heads(tmp_path: Path) -> None:
    run_ranks(RANKS, 1, heads, files(tmp_path))


def without(mesh: Mesh) -> None:
    assert with_mailboxes(mesh, HIDDEN) is mesh
    mesh.all_gather(torch.zeros(1))  # rank 0, which has the store, ends last


def test_ranks_on_cpus_go_on_without() -> None:
    run_ranks(RANKS, 1, without)
