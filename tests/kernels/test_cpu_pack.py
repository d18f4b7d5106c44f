"""Packed panels unpacked again, and what packing refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pointsman.kernels.cpu_pack import Matrix, aligned, gate_up_order, pack_linear
from pointsman.kernels.cpu_step import ModelShape, pieces
from tests.kernels.cpu_model import Model

SHAPE = ModelShape(vocab=30, hidden=40, layers=2, heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=3, top_k=2, width=24, epsilon=1e-6)


@pytest.mark.parametrize("block", [(128, 128), (32, 48), (5, 7), (1, 1), (200, 3)])
@pytest.mark.parametrize("parts", [(100,), (33, 7, 7), (64,), (1,)])
def test_panels_hold_the_matrix(parts: tuple[int, ...], block: tuple[int, int]) -> None:
    model = Model(SHAPE, block=block)
    matrix, values = model.matrix(parts, 50, "e4m3")
    packed = pack_linear(matrix)
    assert packed.values_PK.ctypes.data % 64 == 0 and packed.scales_PB.ctypes.data % 64 == 0
    rows = packed.values_PK[0].transpose(0, 2, 1).reshape(-1, 50)
    scales = packed.scales_PB[0].transpose(0, 2, 1).reshape(len(rows), -1)
    assert (rows[: sum(parts)] == matrix.values).all() and not rows[sum(parts) :].any()
    codes = Model.decode(rows[: sum(parts)])
    wide = np.repeat(scales[: sum(parts)].astype(np.float64), block[1], axis=1)[:, :50] / 2.0**60
    assert (codes * wide == values).all()


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 100])
def test_gate_and_up_share_panels(width: int) -> None:
    order = gate_up_order(width).reshape(-1, 2, 32)
    assert (order[:, 0].reshape(-1)[:width] == np.arange(width)).all()
    assert (order[:, 1].reshape(-1)[:width] == np.arange(width) + width).all()
    assert (order.transpose(1, 0, 2).reshape(2, -1)[:, width:] == -1).all()


def test_aligned_is_zero_and_on_a_line() -> None:
    for shape in ((1,), (3, 5), (100, 7)):
        array = aligned(shape, np.dtype(np.uint16))
        assert array.shape == shape and array.ctypes.data % 64 == 0 and not array.any() and array.flags.c_contiguous


def test_matrices_that_make_no_sense_are_refused() -> None:
    bytes_, scales = np.zeros((10, 20), np.uint8), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="e4m3 needs them"):
        Matrix(bytes_)
    with pytest.raises(ValueError, match="e4m3 needs them"):
        Matrix(np.zeros((10, 20), np.float32), scales)
    with pytest.raises(ValueError, match=r"it must be \(2, 3\)"):
        Matrix(bytes_, scales, (5, 7))
    with pytest.raises(ValueError, match="do not fit"):
        Matrix(bytes_, scales, (128, 128), (4, 5))
    with pytest.raises(ValueError, match="has no stored form"):
        Matrix(np.zeros((10, 20), np.float64))
    with pytest.raises(ValueError, match="NaN"):
        pack_linear(Matrix(np.full((10, 20), 0xFF, np.uint8), scales))


def test_layers_that_do_not_agree_are_refused() -> None:
    model = Model(SHAPE)
    layer = model.layers[1]
    for wrong, message in (
        (replace(layer.packed, bias=layer.packed.bias[:2]), "bias"),
        (replace(layer.packed, experts=layer.packed.experts[:2]), "2 pairs of matrices"),
        (replace(layer.packed, o=Matrix(np.zeros((40, 16), np.float32))), "same form"),
        (replace(layer.packed, o=layer.packed.qkv), "o has the shape"),
        (replace(layer.packed, qkv=replace(layer.packed.qkv, scales=np.ones((3, 2), np.float32), block=(128, 32))), "blocks"),
    ):
        model.layers[1].packed = wrong
        with pytest.raises(ValueError, match=message):
            model.weights()
    model.layers.pop()
    with pytest.raises(ValueError, match="1 layers were given"):
        model.weights()


@pytest.mark.parametrize(
    "sizes", [{"kv_heads": 3}, {"rotary_dim": 3}, {"rotary_dim": 10}, {"top_k": 4}, {"hidden": 0}, {"experts": 1 << 17}]
)
def test_shapes_that_make_no_sense_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        replace(SHAPE, **sizes)


def test_pieces_sum_to_the_pair_and_are_not_cut_within_blocks() -> None:
    """Their values against slices of the whole; widths that no block ends at are refused, but for a pair of one piece."""
    generator = np.random.default_rng(0)

    def pair(width: int) -> tuple[Matrix, Matrix]:
        up = generator.integers(0, 120, (2 * width, 20)).astype(np.uint8), generator.random((2 * -(-width // 4), 3), dtype=np.float32)
        down = generator.integers(0, 120, (20, width)).astype(np.uint8), generator.random((5, -(-width // 8)), dtype=np.float32)
        return Matrix(*up, (4, 8), (width, width)), Matrix(*down, (4, 8))

    def whole(matrix: Matrix) -> np.ndarray:
        spread = np.repeat(matrix.scale_NB(), matrix.block[1], axis=1)[:, : matrix.values.shape[1]]
        return matrix.values.astype(np.float32) * spread

    gate_up, down = pair(19)
    found = pieces(gate_up, down, 8)
    gates, ups = np.split(whole(gate_up), 2)
    for number, (first, second) in enumerate(found):
        columns = range(8 * number, min(8 * number + 8, 19))
        for piece, want in zip(np.split(whole(first), 2), (gates, ups), strict=True):
            assert np.array_equal(piece[: len(columns)], want[columns]) and not piece[len(columns) :].any()
        assert np.array_equal(whole(second)[:, : len(columns)], whole(down)[:, columns]) and not whole(second)[:, len(columns) :].any()
    assert len(found) == 3
    with pytest.raises(ValueError, match=r"cannot be cut at multiples of 12 in blocks of \(4, 8\)"):
        pieces(gate_up, down, 12)
    assert len(pieces(*pair(11), 12)) == 1
