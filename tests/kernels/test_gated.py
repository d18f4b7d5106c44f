"""The activation between two matrices against the reference's, quantization included."""

from __future__ import annotations

import pytest
import torch

from pointsman.kernels import gated, reference
from pointsman.kernels.weight import Quantized
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("width", [1, 100, 128, 640, 1408])
def test_it_is_silu_times_up(width: int) -> None:
    x_TF = (torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width)) * 4).bfloat16().to(DEVICE)
    x_TF[3] = 0
    h_TF = gated.activate(x_TF)
    assert isinstance(h_TF, torch.Tensor) and h_TF.dtype == torch.bfloat16
    # an exponential that ends otherwise may move a number to the neighbouring bfloat16
    torch.testing.assert_close(h_TF, reference.silu_and_mul(x_TF).bfloat16(), rtol=2**-7, atol=1e-30)
    got = gated.activate(x_TF, quantize=True)
    q_TF, scale_TB = reference.quantize_activation(h_TF)
    assert isinstance(got, Quantized) and torch.equal(got.scale, scale_TB)
    assert torch.equal(got.data.view(torch.uint8), q_TF.contiguous().view(torch.uint8))


def test_no_rows_are_no_work() -> None:
    assert gated.activate(torch.ones(0, 256, dtype=torch.bfloat16, device=DEVICE)).shape == (0, 128)
