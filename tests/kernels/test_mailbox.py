"""Sums over ranks inside of kernels: against the sum by rank, and against the kernels that leave it out.

Ranks are processes with mailboxes in memory that they share, so numbers are awaited as they are on GPUs. On a machine of several GPUs
`benchmarks/all_reduce.py` does the same there.
"""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pointsman.kernels import mailbox, norm_quant, reference
from pointsman.kernels.mailbox import LETTERS, Mailbox
from pointsman.kernels.weight import Quantized
from tests.kernels import mailbox_rank as work
from tests.kernels.interpreter import correct
from tests.kernels.mailbox_rank import normal

correct()
ROOT = Path(__file__).parents[2]
NUM_RANKS = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank got, as bits."""
    folder = tmp_path_factory.mktemp("mailboxes")
    for name, rows, width, dtype in (
        ("rows", work.ROWS, work.WIDTH, torch.bfloat16),
        ("squares", 2 * len(work.SLOTS), 1, torch.float32),
    ):
        for rank in range(NUM_RANKS):
            box = torch.zeros(mailbox.letters(NUM_RANKS, rows, width), dtype=LETTERS[dtype])
            mailbox.empty(box)
            box.numpy().tofile(folder / f"{name}-{rank}")
    command = [sys.executable, "-m", "tests.kernels.mailbox_rank", str(folder)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    members = [
        subprocess.Popen([*command, str(rank), str(NUM_RANKS)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(NUM_RANKS)
    ]
    try:
        faults = [member.communicate()[1] for member in members]
    finally:
        for member in members:
            member.kill()
    assert [member.returncode for member in members] == [0] * NUM_RANKS, faults
    return [dict(np.load(folder / f"rank-{rank}.npz")) for rank in range(NUM_RANKS)]


def bfloat16(bits: Any) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16)


def by_rank(turn: int) -> Tensor:
    """The parts of a round, summed in float32 in the order of the ranks, rounded once."""
    return functools.reduce(operator.add, (work.part(turn, rank).float() for rank in range(NUM_RANKS))).bfloat16()


@pytest.mark.parametrize("turn", range(len(work.ROUNDS)))
def test_all_ranks_get_the_bits_of_the_sum_by_rank(ranks: list[dict[str, Any]], turn: int) -> None:
    for got in ranks:
        torch.testing.assert_close(bfloat16(got[f"sum {turn}"]), by_rank(turn), rtol=0, atol=0, equal_nan=True)
        assert (got[f"sum {turn}"] == ranks[0][f"sum {turn}"]).all()


@pytest.mark.parametrize("turn", range(len(work.ROUNDS)))
def test_a_norm_that_sums_over_ranks_is_the_norm_of_the_sum(ranks: list[dict[str, Any]], turn: int) -> None:
    sum_TD, weight_D = bfloat16(ranks[0][f"finite {turn}"]), normal(work.WIDTH, seed=1).bfloat16()
    residual_TD = normal(*sum_TD.shape, seed=turn).bfloat16()
    added_TD, normed_TD = norm_quant.norm(residual_TD, sum_TD, weight_D, 1e-6)
    _, quantized = norm_quant.norm(residual_TD, sum_TD, weight_D, 1e-6, quantize=True)
    assert isinstance(normed_TD, Tensor) and isinstance(quantized, Quantized)
    for got in ranks:
        for name, want in (("added", added_TD), ("normed", normed_TD)):
            assert np.array_equal(got[f"{name} {turn}"], want.view(torch.int16).numpy()), name
        assert np.array_equal(got[f"data {turn}"], quantized.data.view(torch.uint8).numpy())
        assert np.array_equal(got[f"scale {turn}"], quantized.scale.view(torch.int32).numpy())


@pytest.mark.parametrize("again", range(3))
def test_q_and_k_are_normed_over_the_heads_of_all_ranks(ranks: list[dict[str, Any]], again: int) -> None:
    every = work.heads(NUM_RANKS)
    k, v = (torch.full((work.PAGES, NUM_RANKS, work.PAGE, work.CHANNELS), 3.0).bfloat16() for _ in range(2))
    qkv_TN = torch.cat([every.q_TQC.flatten(1), every.k_THC.flatten(1), every.v_THC.flatten(1)], dim=1)
    weights = every.q_weight_QC.flatten(), every.k_weight_HC.flatten()
    q_TQC = reference.qkv_post(qkv_TN, *weights, 1e-6, *work.angles(), k, v, work.SLOTS)
    # squares summed in another order may move a number to the neighbouring bfloat16 before the rotation, which adds two of them
    near = {"rtol": 2**-7, "atol": 2**-6}
    for name, want, axis in (("q", q_TQC, 1), ("k", k, 1), ("v", v, 1)):
        got = torch.cat([bfloat16(rank[f"{name} {again}"]) for rank in ranks], dim=axis)
        torch.testing.assert_close(got, want, **near)
        assert all(np.array_equal(rank[f"{name} {again}"], rank[f"{name} 0"]) for rank in ranks)


def test_what_a_mailbox_takes() -> None:
    box = Mailbox(
        rank=0,
        num_ranks=2,
        width=8,
        dtype=torch.bfloat16,
        boxes_R=torch.zeros(2, dtype=torch.int64),
        turns_P=torch.zeros(4, dtype=torch.int32),
    )
    good = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert box.takes(good) and box.takes(good[:0])
    assert not any(map(box.takes, (torch.zeros(5, 8).bfloat16(), good.float(), good[:, :4], good[0])))
    assert mailbox.all_reduce(good[:0], box).shape == (0, 8)
