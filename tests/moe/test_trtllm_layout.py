"""The layouts of FlashInfer's trtllm-gen kernels: undone by the documented places, and those of the library where it is installed."""

from __future__ import annotations

import importlib

import pytest
import torch

from pointsman.kernels.library import FLASHINFER, installed
from pointsman.moe import trtllm_layout
from tests.moe.libraries.flashinfer import PLACES, unshuffled
from tests.moe.libraries.models import normal


def test_the_library_shuffles_as_we_do() -> None:
    if installed(FLASHINFER) is None:
        pytest.skip("flashinfer-python is not installed")
    utils, moe = importlib.import_module("flashinfer"), importlib.import_module("flashinfer.fused_moe.core")
    matrix = normal(256, 256).to(torch.float8_e4m3fn)
    for tile in 64, 128:
        theirs = utils.shuffle_matrix_a(matrix.view(torch.uint8), tile)
        assert torch.equal(theirs, trtllm_layout.shuffled(matrix.unsqueeze(0), tile)[0].view(torch.uint8))
    theirs = moe.convert_to_block_layout(matrix.view(torch.uint8), 128)
    assert torch.equal(theirs, trtllm_layout.block_major(matrix.unsqueeze(0))[0].view(torch.uint8))
    theirs = utils.shuffle_matrix_a(moe.reorder_rows_for_gated_act_gemm(matrix.view(torch.uint8)), 128)
    assert torch.equal(theirs, trtllm_layout.interleaved(matrix.unsqueeze(0))[0].view(torch.uint8))


@pytest.mark.parametrize("tile", PLACES)
def test_shuffling_is_undone_by_the_documented_places(tile: int) -> None:
    stack = torch.randint(0, 255, (2, 256, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shuffled = trtllm_layout.shuffled(stack, tile)
    assert not torch.equal(shuffled, stack) and torch.equal(unshuffled(shuffled, tile), stack)


def test_interleaving_alternates_up_and_gate() -> None:
    """For one scale a matrix: rows in turn, then shuffled; undone by the documented places."""
    up, gate = torch.arange(64).repeat(2, 1), torch.arange(64).repeat(2, 1) + 64
    stack = torch.cat([up, gate], 1).to(torch.uint8).unsqueeze(-1)
    rows_EM = unshuffled(trtllm_layout.interleaved(stack), 128).squeeze(-1)
    assert torch.equal(rows_EM[:, 0::2], up.to(torch.uint8)) and torch.equal(rows_EM[:, 1::2], gate.to(torch.uint8))


def test_packing_keeps_ids_and_weights_apart() -> None:
    ids_TK = torch.tensor([[0, 255, 32767], [-1, 3, -1]])
    weights_TK = torch.tensor([[0.0, 1.0, 3.3], [0.5, 1e-30, 2.0]])
    words_TK = trtllm_layout.pack(ids_TK, weights_TK)
    assert words_TK.dtype == torch.int32 and (words_TK >> 16).tolist() == [[0, 255, 32767], [0, 3, 0]]
    bits_TK = (words_TK & 0xFFFF).short().view(torch.bfloat16)
    assert torch.equal(bits_TK, torch.where(ids_TK < 0, 0, weights_TK).bfloat16())
    assert (trtllm_layout.pack(ids_TK[:, :2], weights_TK[:, :2], first=64, nobody=256) >> 16).tolist() == [[64, 319], [256, 67]]
