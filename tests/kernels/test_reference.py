"""The definitions against independent ones: loops over blocks, float64, and torch's own attention.

Shape suffixes as in `kernels.reference`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pointsman.kernels import reference
from pointsman.kernels.reference import Span
from pointsman.kernels.weight import FP8, Weight, scale_shape
from pointsman.moe.weights import join_rows

SIZES = st.integers(1, 70)
BLOCKS = st.sampled_from([1, 3, 16, 32, 128])
# e4m3 has three bits of fraction: half a step is 2^-4 of the number; below 2^-6 its steps are 2^-9, and half of one is 2^-10
HALF_STEP = 2**-4
SMALLEST_HALF_STEP = 2**-10


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(rows=SIZES, columns=SIZES, block=BLOCKS, exponent=st.integers(-20, 20))
def test_an_activation_is_within_half_a_step_of_its_numbers(rows: int, columns: int, block: int, exponent: int) -> None:
    x_TK = normal(rows, columns) * 2.0**exponent
    q_TK, scale_TB = reference.quantize_activation(x_TK, block)
    assert q_TK.dtype == FP8 and q_TK.shape == x_TK.shape and scale_TB.shape == (rows, -(-columns // block))
    for number in range(scale_TB.shape[1]):
        x = x_TK[:, number * block : (number + 1) * block]
        assert torch.equal(scale_TB[:, number], x.abs().amax(1) / 448)
        back = q_TK[:, number * block : (number + 1) * block].float() * scale_TB[:, number, None]
        assert bool(((back - x).abs() <= x.abs() * HALF_STEP * 1.001 + scale_TB[:, number, None] * SMALLEST_HALF_STEP).all())
        assert torch.equal(q_TK[:, number * block : (number + 1) * block].float().abs().amax(1), torch.full((rows,), 448.0))


def test_zeros_and_numbers_too_small_to_scale_stay_finite() -> None:
    x_TK = torch.tensor([[0.0] * 4, [1e-45] * 4, [1e-38, -1e-40, 0.0, 3e38]])
    q_TK, scale_TB = reference.quantize_activation(x_TK, 2)
    assert not q_TK.float().isnan().any() and scale_TB.isfinite().all()
    assert torch.equal(q_TK[0].float(), torch.zeros(4)) and scale_TB[0].tolist() == [0.0, 0.0]


@settings(deadline=None, max_examples=60)
@given(rows=SIZES, columns=SIZES, block=st.tuples(BLOCKS, BLOCKS))
def test_a_weight_is_within_half_a_step_of_its_numbers(rows: int, columns: int, block: tuple[int, int]) -> None:
    w_NK = normal(rows, columns)
    weight = reference.quantize_weight(w_NK, block)
    assert weight.scale is not None and weight.scale.shape == scale_shape((rows,), columns, block)
    for row in range(rows):
        for column in range(0, columns, 7):
            scale = float(weight.scale[row // block[0], column // block[1]])
            error = abs(float(weight.data[row, column].float()) * scale - float(w_NK[row, column]))
            assert error <= abs(float(w_NK[row, column])) * HALF_STEP * 1.001 + scale * SMALLEST_HALF_STEP
    back = weight.dequantize(torch.float32)
    again = reference.quantize_weight(back, block)
    assert torch.equal(again.data.view(torch.uint8), weight.data.view(torch.uint8)), "quantizing what was dequantized is exact"


def test_a_block_of_zeros_has_scale_one() -> None:
    weight = reference.quantize_weight(torch.zeros(5, 6), (2, 3))
    assert weight.scale is not None and torch.equal(weight.scale, torch.ones(3, 2))
    assert not weight.dequantize(torch.float32).any()


@settings(deadline=None, max_examples=40)
@given(heights=st.lists(SIZES, min_size=1, max_size=3), columns=SIZES, block=st.tuples(BLOCKS, BLOCKS))
def test_joined_weights_keep_the_blocks_of_each(heights: list[int], columns: int, block: tuple[int, int]) -> None:
    parts = [reference.quantize_weight(normal(height, columns, seed=number), block) for number, height in enumerate(heights)]
    joined = join_rows(parts)
    assert joined.parts == tuple(heights)
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([part.dequantize(torch.float32) for part in parts]))
    x_TK = normal(4, columns, seed=9)
    torch.testing.assert_close(reference.linear(x_TK, joined), torch.cat([reference.linear(x_TK, part) for part in parts], 1))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=SIZES, outputs=SIZES, block=st.tuples(BLOCKS, BLOCKS))
def test_fp8_linear_is_the_exact_product_of_the_quantized(rows: int, columns: int, outputs: int, block: tuple[int, int]) -> None:
    x_TK, weight = normal(rows, columns, seed=1), reference.quantize_weight(normal(outputs, columns), block)
    q_TK, scale_TB = reference.quantize_activation(x_TK, block[1])
    back_TK = q_TK.double() * scale_TB.double().repeat_interleave(block[1], 1)[:, :columns]
    assert weight.scale is not None
    w_NK = weight.data.double() * weight.scale.double().repeat_interleave(block[0], 0)[:outputs].repeat_interleave(block[1], 1)[:, :columns]
    want = back_TK @ w_NK.T
    # float32 sums of at most 70 terms of size 1 to 10
    torch.testing.assert_close(reference.linear(x_TK, weight).double(), want, atol=1e-4, rtol=1e-5)
    rounded = reference.linear(x_TK.bfloat16(), weight)
    assert rounded.dtype == torch.bfloat16


def test_plain_linear_sums_in_float32_and_rounds_once() -> None:
    x_TK, w_NK = normal(5, 300).bfloat16(), normal(7, 300, seed=1).bfloat16()
    want = (x_TK.double() @ w_NK.double().T).float()
    got = reference.linear(x_TK, Weight(w_NK))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0, rtol=2**-8)


def test_the_norm_of_all_heads_is_one_norm() -> None:
    x_TD, weight_D = normal(6, 96) * 3, normal(96, seed=1)
    want = x_TD.double() / (x_TD.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight_D.double()
    torch.testing.assert_close(reference.rms_norm(x_TD, weight_D, 1e-6).double(), want, atol=1e-6, rtol=1e-6)
    per_head = reference.rms_norm(x_TD.view(6, 4, 24), weight_D.view(4, 24), 1e-6).flatten(1)
    assert not torch.allclose(per_head.double(), want, atol=1e-2)
    assert reference.rms_norm(x_TD.bfloat16(), weight_D, 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("rotary_dim", [2, 6, 12])
def test_rotary_turns_pairs_as_complex_numbers(rotary_dim: int) -> None:
    x_THC, positions_T, theta = normal(5, 3, 12).double(), torch.tensor([0, 1, 7, 500, 196_607]), 5e6
    half = rotary_dim // 2
    pairs = torch.complex(x_THC[..., :half], x_THC[..., half:rotary_dim])
    angle_TR = positions_T.double()[:, None] * theta ** (-torch.arange(half).double() * 2 / rotary_dim)
    turned = pairs * torch.polar(torch.ones_like(angle_TR), angle_TR)[:, None]
    want = torch.cat((turned.real, turned.imag, x_THC[..., rotary_dim:]), -1)
    cos_TR, sin_TR = reference.rotary_angles(positions_T, rotary_dim, theta)
    got = reference.rotate(x_THC.float(), cos_TR, sin_TR)
    # float32 angles of positions near 2^18 carry 2^-7 of rounding; nearer ones carry less
    torch.testing.assert_close(got[:4].double(), want[:4], atol=1e-4, rtol=0)
    torch.testing.assert_close(got.double(), want, atol=5e-2, rtol=0)
    assert torch.equal(got[..., rotary_dim:], x_THC[..., rotary_dim:].float())


def test_silu_and_mul() -> None:
    gate_up = normal(3, 10).double()
    want = gate_up[:, :5] / (1 + (-gate_up[:, :5]).exp()) * gate_up[:, 5:]
    torch.testing.assert_close(reference.silu_and_mul(gate_up.float()).double(), want, atol=1e-6, rtol=1e-6)


def test_between_its_matrices_an_fp8_expert_is_bfloat16() -> None:
    gate_up = join_rows([reference.quantize_weight(normal(32, 16, seed=seed), (16, 16)) for seed in (0, 1)])
    down, x_TD = reference.quantize_weight(normal(16, 32, seed=2), (16, 16)), normal(4, 16, seed=3)
    hidden = reference.silu_and_mul(reference.linear(x_TD, gate_up))
    assert torch.equal(reference.expert(x_TD, gate_up, down), reference.linear(hidden.bfloat16().float(), down))
    plain = [Weight(weight.dequantize(torch.float32), parts=weight.parts) for weight in (gate_up, down)]
    assert torch.equal(reference.expert(x_TD, *plain), reference.linear(reference.silu_and_mul(reference.linear(x_TD, plain[0])), plain[1]))


def test_router_logits_are_float32_of_float32() -> None:
    x_TD, gate_ED = normal(3, 64).bfloat16(), normal(9, 64, seed=1)
    got = reference.router_logits(x_TD, gate_ED)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), x_TD.double() @ gate_ED.double().T, atol=1e-5, rtol=1e-5)


def empty_pages(dtype: torch.dtype, *shape: int) -> Tensor:
    pages = torch.empty(shape, dtype=dtype)
    return pages.view(torch.uint8).fill_(0x7F).view(dtype) if dtype == FP8 else pages.fill_(math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_what_is_written_is_read_rounded_and_nothing_else(dtype: torch.dtype) -> None:
    k_PHSC, v_PHSC = empty_pages(dtype, 5, 2, 4, 8), empty_pages(dtype, 5, 2, 4, 8)
    table_P = torch.tensor([3, 0, 4])
    k_THC, v_THC = normal(10, 2, 8), normal(10, 2, 8, seed=1)
    slots_T = table_P[torch.arange(10) // 4] * 4 + torch.arange(10) % 4
    reference.write_kv(k_PHSC, v_PHSC, k_THC, v_THC, slots_T)
    for pages, rows in ((k_PHSC, k_THC), (v_PHSC, v_THC)):
        assert torch.equal(reference.read_kv(pages, table_P, 10), rows.to(dtype).float().transpose(0, 1))
        assert torch.equal(reference.read_kv(pages, table_P, 3), rows[:3].to(dtype).float().transpose(0, 1))
        assert bool(pages[4, :, 2:].float().isnan().all()) and bool(pages[1:3].float().isnan().all())


def test_e4m3_keys_saturate() -> None:
    k_PHSC, v_PHSC = empty_pages(FP8, 1, 1, 2, 2), empty_pages(FP8, 1, 1, 2, 2)
    rows = torch.tensor([[[1e9, -500.0]], [[448.0, -449.0]]])
    reference.write_kv(k_PHSC, v_PHSC, rows, rows, torch.tensor([0, 1]))
    assert reference.read_kv(k_PHSC, torch.tensor([0]), 2).flatten().tolist() == [448.0, -448.0, 448.0, -448.0]


@settings(deadline=None, max_examples=40)
@given(
    lanes=st.lists(st.tuples(st.integers(0, 13), st.integers(1, 6)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (3, 3)]),
    page_size=st.sampled_from([1, 2, 5, 16]),
    seed=st.integers(0, 99),
)
def test_paged_attention_is_causal_attention_over_each_sequence(
    lanes: list[tuple[int, int]], heads: tuple[int, int], page_size: int, seed: int
) -> None:
    (num_heads, num_kv_heads), channels, most = heads, 8, 19
    pages_each = -(-most // page_size)
    order = torch.randperm(len(lanes) * pages_each, generator=torch.Generator().manual_seed(seed))
    table_LP = order.view(len(lanes), pages_each)
    k_PHSC = empty_pages(torch.float32, len(order), num_kv_heads, page_size, channels)
    v_PHSC, spans, positions, queries, wanted, start = k_PHSC.clone(), [], [], [], [], 0
    for lane, (past, fresh) in enumerate(lanes):
        total = past + fresh
        q, k, v = (normal(total, n, channels, seed=seed + 7 * lane + n) for n in (num_heads, num_kv_heads, num_kv_heads))
        at = torch.arange(total)
        reference.write_kv(k_PHSC, v_PHSC, k, v, table_LP[lane][at // page_size] * page_size + at % page_size)
        whole = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True)
        spans.append(Span(lane, start, fresh))
        positions.append(at[past:])
        queries.append(q[past:])
        wanted.append(whole.transpose(0, 1)[past:])
        start += fresh
    got = reference.attention(torch.cat(queries), k_PHSC, v_PHSC, spans, torch.cat(positions), table_LP, 0.3)
    torch.testing.assert_close(got, torch.cat(wanted), atol=1e-5, rtol=1e-5)
