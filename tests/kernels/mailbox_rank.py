"""One rank of the test of mailboxes: `python -m tests.kernels.mailbox_rank FOLDER RANK RANKS`, the interpreter running its kernels.

The mailboxes are files of the folder that all ranks map, so numbers are awaited as they are on GPUs. What the rank got goes to rank-N.npz.

Shape suffixes: as in `pointsman.kernels.qkv_post`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pointsman.kernels import mailbox, norm_quant, reference
from pointsman.kernels.mailbox import LETTERS, Mailbox
from pointsman.kernels.qkv_post import qkv_post
from pointsman.kernels.weight import Quantized
from tests.kernels.interpreter import correct

ROWS, WIDTH = 6, 200
ROUNDS = (3, 6, 1, 2, 5, 5, 1)  # rows of one all-reduce after another
PAGES, PAGE = 3, 4
CHANNELS, ROTARY = 16, 8
SLOTS = torch.tensor([7, -1, 0, 11, -3])


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def part(turn: int, rank: int) -> Tensor:
    """What a rank has to add in a round: of all magnitudes, some of it -0.0, infinite or no number."""
    x_TD = normal(ROUNDS[turn], WIDTH, seed=100 * turn + rank) * torch.logspace(-30, 30, WIDTH, base=2.0)
    x_TD[:, rank::7] = -0.0
    x_TD[0, 5 if rank else 6] = float("inf")
    x_TD[0, 9] = float("nan") if rank == 1 else 1.0
    return x_TD.bfloat16()


class Heads(NamedTuple):
    """Attention's numbers, of all ranks: each has 2 of the query heads and one of the key/value heads."""

    q_TQC: Tensor
    k_THC: Tensor
    v_THC: Tensor
    q_weight_QC: Tensor
    k_weight_HC: Tensor


def heads(num_ranks: int) -> Heads:
    rows = len(SLOTS)
    sizes = ((rows, 2 * num_ranks), (rows, num_ranks), (rows, num_ranks), (2 * num_ranks,), (num_ranks,))
    return Heads(*(normal(*size, CHANNELS, seed=seed).bfloat16() for seed, size in enumerate(sizes)))


def angles() -> tuple[Tensor, Tensor]:
    return reference.rotary_angles(torch.tensor([0, 1, 5, 1000, 200_000]), ROTARY, 5e6)


def open_boxes(
    folder: Path, name: str, rank: int, num_ranks: int, rows: int, width: int, dtype: torch.dtype
) -> tuple[Mailbox, list[Tensor]]:
    """This rank's view of the boxes, and what keeps their memory."""
    size = mailbox.letters(num_ranks, rows, width)
    found = [torch.from_file(str(folder / f"{name}-{other}"), shared=True, size=size, dtype=LETTERS[dtype]) for other in range(num_ranks)]
    addresses = torch.tensor([box.data_ptr() for box in found])
    turns = torch.zeros(rows, dtype=torch.int32)
    return Mailbox(rank=rank, num_ranks=num_ranks, width=width, dtype=dtype, boxes_R=addresses, turns_P=turns), found


def main(folder: Path, rank: int, num_ranks: int) -> None:
    correct()
    torch.set_num_threads(1)
    rows, kept = open_boxes(folder, "rows", rank, num_ranks, ROWS, WIDTH, torch.bfloat16)
    squares, kept_too = open_boxes(folder, "squares", rank, num_ranks, 2 * len(SLOTS), 1, torch.float32)
    got: dict[str, Tensor] = {}
    weight_D = normal(WIDTH, seed=1).bfloat16()
    for turn in range(len(ROUNDS)):
        x_TD = part(turn, rank)
        got[f"sum {turn}"] = mailbox.all_reduce(x_TD, rows)
        x_TD = x_TD.nan_to_num(nan=1.0, posinf=2.0)
        got[f"finite {turn}"] = mailbox.all_reduce(x_TD, rows)
        residual_TD = normal(*x_TD.shape, seed=turn).bfloat16()
        got[f"added {turn}"], normed = norm_quant.norm(residual_TD, x_TD, weight_D, 1e-6, mailbox=rows)
        assert isinstance(normed, Tensor)
        got[f"normed {turn}"] = normed
        _, quantized = norm_quant.norm(residual_TD, x_TD, weight_D, 1e-6, quantize=True, mailbox=rows)
        assert isinstance(quantized, Quantized)
        got[f"data {turn}"], got[f"scale {turn}"] = quantized.data.view(torch.uint8), quantized.scale
    every = heads(num_ranks)
    two, one = slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1)
    mine = (every.q_TQC[:, two], every.k_THC[:, one], every.v_THC[:, one])
    qkv_TN = torch.cat([rows_of.flatten(1) for rows_of in mine], dim=1)
    for again in range(3):
        k, v = (torch.full((PAGES, 1, PAGE, CHANNELS), 3.0).bfloat16() for _ in range(2))
        weights = every.q_weight_QC[two].flatten(), every.k_weight_HC[one].flatten()
        got[f"q {again}"] = qkv_post(qkv_TN, *weights, 1e-6, *angles(), k, v, SLOTS, squares)
        got[f"k {again}"], got[f"v {again}"] = k, v
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.uint8: torch.uint8}
    np.savez(folder / f"rank-{rank}.npz", **{name: tensor.view(bits[tensor.dtype]).numpy() for name, tensor in got.items()})
    del kept, kept_too


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
