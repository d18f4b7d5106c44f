"""Packed panels unpacked again, and what packing refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pointsman.kernels.cpu_pack import Matrix, aligned, gate_up_order, pack_linear
from pointsman.kernels.cpu_step import ModelShape
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
        (replace(layer.packed, experts=layer.packed.experts[:2]), "2 experts"),
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
