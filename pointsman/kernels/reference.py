"""Every operation of the model in plain torch: specification, oracle and portable path in one.

What a kernel must compute is what stands here, numerics included; the comments of a kernel need not repeat it. Two rules hold
throughout. Sums are float32 whatever the activations are, and a result is rounded once, to the activations' dtype. FP8 is W8A8:
weights e4m3 with a scale per block, activations quantized on the fly per row and block of columns, products exact in float32,
each block of K scaled as it joins the sum.

Shape suffixes: T rows (tokens), K columns in, N columns out, B blocks along K, D hidden, H key/value heads, Q query heads,
G query heads per key/value head, C channels of a head, R half the rotary channels, P pages, S slots of a page,
L lanes, E experts, X context positions, M rows of a key/value head's product (query heads times tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pointsman.kernels.weight import FP8, FP8_MAX, Weight, num_blocks


class Span(NamedTuple):
    """Rows [start, start + length) of a step: consecutive tokens of the sequence in `lane`."""

    lane: int
    start: int
    length: int


def quantize_activation(x_TK: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Quantize each row's blocks of columns: (e4m3 [T, K], float32 scales [T, B]) with scale = amax / 448."""
    num_rows, num_columns = x_TK.shape
    blocks = num_blocks(num_columns, block)
    x_TBk = F.pad(x_TK.float(), (0, blocks * block - num_columns)).view(num_rows, blocks, block)
    amax_TB = x_TBk.abs().amax(-1)
    scale_TB = amax_TB / torch.full_like(amax_TB, FP8_MAX)  # by a number, torch would multiply with its inverse on a GPU
    divisor_TB = torch.where(scale_TB == 0, 1.0, scale_TB)
    q_TBk = (x_TBk / divisor_TB.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return q_TBk.view(num_rows, blocks * block)[:, :num_columns], scale_TB


def quantize_weight(w_NK: Tensor, block: tuple[int, int] = (128, 128)) -> Weight:
    """Quantize a matrix in blocks of `block`, ragged at the edges, with scale = amax / 448; blocks of zeros get scale 1."""
    num_rows, num_columns = w_NK.shape
    rows, columns = num_blocks(num_rows, block[0]), num_blocks(num_columns, block[1])
    padded = F.pad(w_NK.float(), (0, columns * block[1] - num_columns, 0, rows * block[0] - num_rows))
    w_RnBk = padded.view(rows, block[0], columns, block[1])
    amax_RB = w_RnBk.abs().amax((1, 3))
    scale_RB = amax_RB / torch.full_like(amax_RB, FP8_MAX)
    scale_RB = torch.where(scale_RB == 0, 1.0, scale_RB)
    q_RnBk = (w_RnBk / scale_RB[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    q_NK = q_RnBk.view(padded.shape)[:num_rows, :num_columns].contiguous()
    return Weight(q_NK, scale_RB, block)


def linear_fp32(x_TK: Tensor, weight: Weight) -> Tensor:
    """x @ weight.T as the float32 sums, not yet rounded; W8A8 when the weight is quantized."""
    if weight.scale is None:
        return F.linear(x_TK.float(), weight.data.float())
    step = weight.block[1]
    q_TK, scale_TB = quantize_activation(x_TK, step)
    scale_NB = weight.scale[weight.scale_row_N()]
    y_TN = torch.zeros(len(x_TK), len(weight.data), device=x_TK.device)
    for block in range(scale_TB.shape[1]):
        columns = slice(block * step, (block + 1) * step)
        product_TN = q_TK[:, columns].float() @ weight.data[:, columns].float().T
        y_TN += product_TN * scale_TB[:, block, None] * scale_NB[:, block]
    return y_TN


def linear(x_TK: Tensor, weight: Weight) -> Tensor:
    """x @ weight.T, rounded to x's dtype; W8A8 when the weight is quantized."""
    return linear_fp32(x_TK, weight).to(x_TK.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over all of the last axis: a full-width q/k norm gets all heads in one row."""
    x = x_TD.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight_D.float()).to(x_TD.dtype)


def rotary_angles(positions_T: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, R] of the angles position * theta^(-2r / rotary_dim)."""
    exponents_R = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device) / rotary_dim
    angles_TR = positions_T.float().unsqueeze(-1) * (1.0 / theta**exponents_R)
    return angles_TR.cos(), angles_TR.sin()


def rotate(x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """NeoX rotary on the first 2R channels of each head: channel r is paired with r + R; the others pass."""
    half = cos_TR.shape[-1]
    cos, sin = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    low, high = x_THC[..., :half].float(), x_THC[..., half : 2 * half].float()
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_THC.dtype)
    return torch.cat((turned, x_THC[..., 2 * half :]), dim=-1)


def silu_and_mul(gate_up_TF: Tensor) -> Tensor:
    """silu(first half) * second half, in float32."""
    gate, up = gate_up_TF.float().chunk(2, dim=-1)
    return F.silu(gate) * up


def expert(x_TD: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """One expert's float32 output; between its two matrices the activations are bfloat16 when the weights are FP8, else x's dtype."""
    hidden_TF = silu_and_mul(linear_fp32(x_TD, gate_up))
    return linear_fp32(hidden_TF.to(torch.bfloat16 if gate_up.quantized else x_TD.dtype), down)


def router_logits(x_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """Router logits [T, E] in float32, whatever the activations are."""
    return F.linear(x_TD.float(), gate_ED.float())


def write_kv(k_PHSC: Tensor, v_PHSC: Tensor, k_THC: Tensor, v_THC: Tensor, slots_T: Tensor) -> None:
    """Store keys and values of one layer at slots (page * page_size + offset), in the cache's dtype; e4m3 saturates, scale 1."""
    page_T, offset_T = slots_T // k_PHSC.shape[2], slots_T % k_PHSC.shape[2]
    for pages, rows in ((k_PHSC, k_THC), (v_PHSC, v_THC)):
        if pages.dtype == FP8:
            # torch cannot index-assign e4m3 on every device: its bytes it can
            rows = rows.float().clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
            pages = pages.view(torch.uint8)
        pages[page_T, :, offset_T] = rows.to(pages.dtype)


def norm_heads(x_TN: Tensor, weight: Tensor | None, epsilon: float, channels: int) -> Tensor:
    """Heads [T, H, C] of rows, normed over all heads at once if the weight is as wide as they are, over each if it is one head wide."""
    x_THC = x_TN.reshape(len(x_TN), -1, channels)
    if weight is None:
        return x_THC
    if len(weight) == channels:
        return rms_norm(x_THC, weight, epsilon)
    return rms_norm(x_TN, weight, epsilon).view(x_THC.shape)


def qkv_post(
    qkv_TN: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_PHSC: Tensor,
    v_PHSC: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """What stands between the joined projection and attention: the queries [T, Q, C], normed and rotated.

    The norm is over all heads at once where its weight is that wide, over each head where it is [C], and none where it is None.
    Keys, treated the same, and values go to their slots of one layer's pages; a row with a negative slot is padding and writes nothing.
    """
    num_rows, heads, channels = len(qkv_TN), k_PHSC.shape[1], k_PHSC.shape[3]
    width = heads * channels
    q, k, v = torch.split(qkv_TN, [qkv_TN.shape[1] - 2 * width, width, width], dim=-1)
    q_TQC = rotate(norm_heads(q, q_weight, epsilon, channels), cos_TR, sin_TR)
    k_THC = rotate(norm_heads(k, k_weight, epsilon, channels), cos_TR, sin_TR)
    real_T = slots_T >= 0
    write_kv(k_PHSC, v_PHSC, k_THC[real_T], v.reshape(num_rows, -1, channels)[real_T], slots_T[real_T])
    return q_TQC


def read_kv(pages_PHSC: Tensor, page_table_P: Tensor, num_positions: int) -> Tensor:
    """The first positions of a sequence, in order, as float32 [H, X, C]; slots past them are not looked at."""
    page_size = pages_PHSC.shape[2]
    used = page_table_P[: num_blocks(num_positions, page_size)]
    rows_PHSC = pages_PHSC.view(torch.uint8)[used].view(FP8) if pages_PHSC.dtype == FP8 else pages_PHSC[used]
    return rows_PHSC.transpose(0, 1).flatten(1, 2)[:, :num_positions].float()


def attention(
    q_TQC: Tensor,
    k_PHSC: Tensor,
    v_PHSC: Tensor,
    spans: Sequence[Span],
    positions_T: Tensor,
    page_table_LP: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of each row over its sequence's cache, its own position included: [T, Q, C] in q's dtype.

    Query head i reads key/value head i // G. Keys and values of the rows themselves must be in the cache already.
    """
    num_heads = k_PHSC.shape[1]
    out_TQC = torch.empty_like(q_TQC)
    for lane, start, length in spans:
        rows = slice(start, start + length)
        num_positions = int(positions_T[start + length - 1]) + 1
        k_HXC = read_kv(k_PHSC, page_table_LP[lane], num_positions)
        v_HXC = read_kv(v_PHSC, page_table_LP[lane], num_positions)
        # the query heads of one key/value head are as many more rows of one product
        q_HMC = q_TQC[rows].float().view(length, num_heads, -1, q_TQC.shape[2]).permute(1, 2, 0, 3).flatten(1, 2)
        scores_HMX = torch.bmm(q_HMC, k_HXC.transpose(1, 2)) * scale
        if length > 1:
            ahead_tX = torch.arange(num_positions, device=q_TQC.device) > positions_T[rows].unsqueeze(-1)
            scores_HMX.view(num_heads, -1, length, num_positions).masked_fill_(ahead_tX, float("-inf"))
        mixed_HMC = torch.bmm(scores_HMX.softmax(-1), v_HXC)
        mixed_tHGC = mixed_HMC.view(num_heads, -1, length, q_TQC.shape[2]).permute(2, 0, 1, 3)
        out_TQC[rows] = mixed_tHGC.flatten(1, 2).to(q_TQC.dtype)
    return out_TQC
