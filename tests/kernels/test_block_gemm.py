"""The FP8 product against the reference, in every tiling; and what is promised bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointsman.kernels import block_gemm, norm_quant, reference
from pointsman.kernels.block_gemm import Tiling, tiling
from pointsman.kernels.capability import is_hopper
from pointsman.kernels.weight import Weight
from pointsman.moe.weights import join_rows
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SWAPPED, PLAIN = Tiling(16, 64, 1, True, 4, 3), Tiling(64, 64, 1, False, 4, 3)
CUTS = [
    SWAPPED,
    Tiling(16, 64, 3, True, 4, 3),
    Tiling(32, 64, 2, True, 4, 3),
    PLAIN,
    Tiling(64, 128, 2, False, 4, 3),
    Tiling(128, 128, 1, False, 8, 3),
]
# both round the same float32 sums, added in another order, to bfloat16
BOUND = {"rtol": 2**-7, "atol": 1e-3}
# the tensor cores of a GPU sum FP8 products with about 13 bits within a block of K; relative to the norm of the result
TENSOR_CORES = 0.004


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_near(got: Tensor, want: Tensor) -> None:
    """Within what either rounds."""
    if DEVICE.type == "cuda":
        assert float((got.double() - want.double()).norm() / want.double().norm()) < TENSOR_CORES
    else:
        torch.testing.assert_close(got, want, **BOUND)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(("rows", "parts", "columns"), [(1, (128,), 128), (17, (192, 64), 384), (70, (100, 30), 200)])
def test_every_tiling_is_the_reference(cut: Tiling, rows: int, parts: tuple[int, ...], columns: int) -> None:
    weight = join_rows([reference.quantize_weight(normal(part, columns, seed=part)) for part in parts])
    ready = block_gemm.prepare(weight)
    assert ready.aligned == (parts == (128,))
    x_TK = normal(rows, columns, seed=7).bfloat16()
    want = reference.linear(x_TK, weight)
    if cut.splits > 1 and rows > cut.rows * block_gemm.MOST_SPLIT_TILES:
        with pytest.raises(AssertionError, match="splits products of up to 4 tiles of rows; there are 70 rows"):
            block_gemm.linear(x_TK, ready, cut)
        return
    got = block_gemm.linear(x_TK, ready, cut)
    assert got.dtype == torch.bfloat16
    assert_near(got, want)
    assert torch.equal(block_gemm.linear(norm_quant.quantize(x_TK), ready, cut), got), "quantized before or inside"
    assert not ready.arrivals.any()


def test_splits_add_up_in_their_order_whatever_lay_there() -> None:
    weight = reference.quantize_weight(normal(64, 1024))
    x_TK = normal(3, 1024, seed=1).bfloat16()
    ready = block_gemm.prepare(weight)
    for splits in (2, 3, 7, 8):
        cut = Tiling(16, 64, splits, True, 4, 3)
        first = block_gemm.linear(x_TK, ready, cut)
        assert_near(first, reference.linear(x_TK, weight))
        assert torch.equal(first, block_gemm.linear(x_TK, ready, cut))


@pytest.mark.parametrize("quantized", [True, False])
def test_in_the_invariant_mode_a_row_has_the_same_bits_in_any_batch(quantized: bool) -> None:
    weight = reference.quantize_weight(normal(100, 300)) if quantized else Weight(normal(100, 300).bfloat16())
    ready = block_gemm.prepare(weight, invariant=True)
    x_TK = normal(90, 300, seed=1).bfloat16()
    whole = block_gemm.linear(x_TK, ready)
    assert_near(whole, reference.linear(x_TK, weight))
    for start, end in ((0, 1), (63, 66), (89, 90), (10, 90)):
        assert torch.equal(block_gemm.linear(x_TK[start:end].contiguous(), ready), whole[start:end])


def test_bfloat16_weights_are_torchs_where_bits_may_differ() -> None:
    weight = Weight(normal(40, 64).bfloat16())
    x_TK = normal(3, 64, seed=1).bfloat16()
    got = block_gemm.linear_or_torch(x_TK, block_gemm.prepare(weight))
    assert torch.equal(got, torch.nn.functional.linear(x_TK, weight.data))
    assert block_gemm.linear_or_torch(x_TK[:0], block_gemm.prepare(weight, invariant=True)).shape == (0, 40)


def test_blocks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks of 64 x 128; this linear takes blocks of 128 x 128"):
        block_gemm.prepare(reference.quantize_weight(normal(128, 128), (64, 128)))


@pytest.mark.parametrize("columns_out", [1, 64, 256, 2048, 3072, 4096, 8192, 200_064])
@pytest.mark.parametrize("columns_in", [128, 200, 1536, 3072, 6144])
def test_tilings_have_room_for_arrivals_and_work_for_every_split(columns_out: int, columns_in: int) -> None:
    room = -(-columns_out // 64) * block_gemm.MOST_SPLIT_TILES
    for rows in (1, 2, 8, 16, 17, 32, 33, 64, 65, 128, 256, 257, 1024, 8192):
        for wide in (False, True):
            cut = tiling(rows, columns_out, columns_in, invariant=False, wide=wide)
            tiles = -(-rows // cut.rows) * -(-columns_out // cut.columns)
            assert cut.splits == 1 or (tiles <= room and cut.splits <= columns_in // 128)
            assert rows <= cut.rows * block_gemm.MOST_SPLIT_TILES or cut.splits == 1
            assert not cut.wide or (wide and rows > 128)
            same = tiling(rows, columns_out, columns_in, invariant=True, wide=wide)
            assert same.wide or (same.rows, same.columns, same.splits, same.swap) == (64, 64, 1, False)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda" or not is_hopper(DEVICE), reason="wgmma and the copy engine are Hopper's")
@pytest.mark.parametrize(("rows", "columns_out", "columns_in"), [(1, 128, 128), (129, 384, 256), (300, 1280, 1152), (1000, 3072, 3072)])
def test_wide_products_have_the_bits_of_narrow_ones(rows: int, columns_out: int, columns_in: int) -> None:
    """Edges of rows and of columns, and an odd number of steps; past the end of each nothing is written."""
    ready = block_gemm.prepare(reference.quantize_weight(normal(columns_out, columns_in)))
    x_TK = normal(rows, columns_in, seed=1).bfloat16()
    want = block_gemm.linear(x_TK, ready, PLAIN)
    assert_near(want, reference.linear(x_TK, reference.quantize_weight(normal(columns_out, columns_in))))
    for columns in (128, 256):
        assert torch.equal(block_gemm.linear(x_TK, ready, Tiling(128, columns, wide=True)), want)
