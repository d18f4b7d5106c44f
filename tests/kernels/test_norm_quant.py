"""Norm, residual sum and quantization in one kernel against the reference's three steps; only a mean may be summed in another order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointsman.kernels import norm_quant, reference
from pointsman.kernels.unsummed import Unsummed
from pointsman.kernels.weight import FP8, Quantized
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# a mean summed in another order may move a number to the neighbouring bfloat16, and that one to the neighbouring e4m3
ONE_BF16 = {"rtol": 2**-7, "atol": 1e-6}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("width", [1, 100, 128, 256, 384, 3072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_exact_and_the_norm_is_the_references(width: int, dtype: torch.dtype) -> None:
    x_TD, delta_TD, weight_D = normal(3, width).to(dtype), normal(3, width, seed=1).to(dtype), normal(width, seed=2).to(dtype)
    sum_TD, normed_TD = norm_quant.norm(x_TD, delta_TD, weight_D, 1e-6)
    assert torch.equal(sum_TD, x_TD + delta_TD) and isinstance(normed_TD, Tensor) and normed_TD.dtype == dtype
    torch.testing.assert_close(normed_TD, reference.rms_norm(x_TD + delta_TD, weight_D, 1e-6), **ONE_BF16)
    same_TD, alone_TD = norm_quant.norm(x_TD, None, weight_D, 1e-6)
    assert same_TD is x_TD
    torch.testing.assert_close(alone_TD, reference.rms_norm(x_TD, weight_D, 1e-6), **ONE_BF16)


@pytest.mark.parametrize("width", [64, 128, 200, 640])
def test_quantization_has_the_references_bits(width: int) -> None:
    x_TD = (normal(5, width) * torch.logspace(-30, 30, 5, base=2.0).to(DEVICE)[:, None]).bfloat16()
    x_TD[2] = 0
    got = norm_quant.quantize(x_TD)
    q_TD, scale_TB = reference.quantize_activation(x_TD)
    assert got.data.dtype == FP8 and torch.equal(got.data.view(torch.uint8), q_TD.contiguous().view(torch.uint8))
    assert torch.equal(got.scale, scale_TB)


@pytest.mark.parametrize("width", [128, 200, 384])
def test_the_norm_is_rounded_before_it_is_quantized(width: int) -> None:
    x_TD, delta_TD, weight_D = normal(4, width).bfloat16(), normal(4, width, seed=1).bfloat16(), normal(width, seed=2).bfloat16()
    sum_TD, normed_TD = norm_quant.norm(x_TD, delta_TD, weight_D, 1e-6)
    again_TD, got = norm_quant.norm(x_TD, delta_TD, weight_D, 1e-6, quantize=True)
    assert torch.equal(sum_TD, x_TD + delta_TD) and torch.equal(again_TD, sum_TD)
    assert isinstance(normed_TD, Tensor) and isinstance(got, Quantized)
    q_TD, scale_TB = reference.quantize_activation(normed_TD)
    assert torch.equal(got.data.view(torch.uint8), q_TD.contiguous().view(torch.uint8)) and torch.equal(got.scale, scale_TB)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("width", [128, 200, 384])
def test_a_delta_yet_to_be_summed_is_summed_as_on_its_own(width: int, exact: bool) -> None:
    """Bit by bit; what stands where a row has no expert is anything."""
    x_TD, weight_D = normal(4, width).bfloat16(), normal(width, seed=2).bfloat16()
    y_RD = normal(4 * 3, width, seed=1).to(torch.float32 if exact else torch.bfloat16)
    ids_TK = torch.tensor([[4, 0, 2], [-1, 1, -1], [-1, -1, -1], [0, 1, 2]], dtype=torch.int32, device=DEVICE)
    y_RD[ids_TK.flatten() < 0] = float("nan")
    unsummed = Unsummed(y_RD, ids_TK, normal(4, 3, seed=3), torch.bfloat16)
    for quantize in (False, True):
        got_TD, got = norm_quant.norm(x_TD, unsummed, weight_D, 1e-6, quantize)
        want_TD, want = norm_quant.norm(x_TD, unsummed.total(), weight_D, 1e-6, quantize)
        assert torch.equal(got_TD, want_TD)
        if isinstance(got, Quantized):
            assert isinstance(want, Quantized) and torch.equal(got.scale, want.scale)
            assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
        else:
            assert torch.equal(got, want)
    weighted_TD = torch.where(ids_TK.unsqueeze(-1) < 0, 0, y_RD.view(4, 3, -1).float() * unsummed.weights_TK.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(unsummed.total().float(), weighted_TD, rtol=2**-8, atol=1e-6)


def test_rows_too_wide_for_a_program_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of 16640 columns; .* up to 16384"):
        norm_quant.quantize(torch.ones(1, 16640, dtype=torch.bfloat16, device=DEVICE))
    assert norm_quant.quantize(torch.ones(0, 256, dtype=torch.bfloat16, device=DEVICE)).scale.shape == (0, 2)
