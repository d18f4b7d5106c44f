"""The joined kernel against the reference's norm, rotation and write, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointsman.kernels import reference
from pointsman.kernels.qkv_post import qkv_post
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("norm", ["all", "each", None])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "rotary_dim"), [(6, 1, 128, 64), (4, 2, 64, 64), (5, 5, 16, 6), (3, 1, 24, 8), (1, 1, 16, 8)]
)
def test_it_is_norm_rotate_and_write(
    heads: int, kv_heads: int, channels: int, rotary_dim: int, cache_dtype: torch.dtype, norm: str | None
) -> None:
    rows, page_size, pages = 5, 4, 3
    qkv_TN = normal(rows, (heads + 2 * kv_heads) * channels).bfloat16()
    qkv_TN[:, -kv_heads * channels :] *= 300  # values that e4m3 must saturate
    q_width, k_width = (heads * channels, kv_heads * channels) if norm == "all" else (channels, channels)
    q_weight, k_weight = (None if norm is None else normal(width, seed=width).bfloat16() for width in (q_width, k_width))
    positions_T = torch.tensor([0, 1, 5, 1000, 200_000], device=DEVICE)
    cos_TR, sin_TR = reference.rotary_angles(positions_T, rotary_dim, 5e6)
    slots_T = torch.tensor([7, -1, 0, 11, -3], device=DEVICE)
    poison = torch.full((pages, kv_heads, page_size, channels), 3.0, device=DEVICE).to(cache_dtype)
    k, v = poison.clone(), poison.clone()
    got_TQC = qkv_post(qkv_TN, q_weight, k_weight, 1e-6, cos_TR, sin_TR, k, v, slots_T)

    want_k, want_v = poison.clone(), poison.clone()
    want_TQC = reference.qkv_post(qkv_TN, q_weight, k_weight, 1e-6, cos_TR, sin_TR, want_k, want_v, slots_T)
    # a norm summed in another order may move a number to the neighbouring bfloat16 before the rotation, which adds two of them
    torch.testing.assert_close(got_TQC, want_TQC, rtol=2**-7, atol=2**-6)
    assert torch.equal(v.float(), want_v.float())
    e4m3 = cache_dtype == torch.float8_e4m3fn
    torch.testing.assert_close(k.float(), want_k.float(), rtol=2**-3 if e4m3 else 2**-7, atol=2**-6)
    written = torch.zeros(pages * page_size, dtype=torch.bool, device=DEVICE)
    written[slots_T[slots_T >= 0]] = True
    untouched = k.float().transpose(1, 2).reshape(pages * page_size, -1)[~written]
    assert bool((untouched == 3).all())


def test_no_rows_are_no_work() -> None:
    k = torch.zeros(1, 1, 4, 16, device=DEVICE)
    empty = torch.zeros(0, 4, device=DEVICE)
    q = qkv_post(
        normal(0, 48).bfloat16(), normal(16), normal(16), 1e-6, empty, empty, k, k.clone(), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    )
    assert q.shape == (0, 1, 16)
