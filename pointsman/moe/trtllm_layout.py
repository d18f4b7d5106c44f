"""How the trtllm-gen kernels of FlashInfer want weights, activations and routings: pure rearrangement, no library.

A gated pair of matrices stands as [up; gate], the other way round than a checkpoint joins them here, scales likewise. A stack of matrices
is *MajorK*, [E, M, K] as it is, or *BlockMajorK*, [E, K / 128, M, 128] with rows shuffled within tiles of 64: the kernel's stores then
need no exchange between lanes. Scales of blocks are not shuffled, for a tile lies within a block.

FP8 with one scale a matrix is *interleaved*: rows of up and gate alternate, and tiles of 128 are shuffled. Its kernel activates in the
product's own epilogue, for which a lane must hold both halves.

Scales are at least 1e-10: the kernels divide by them.

Shape suffixes: T tokens, K experts per token, G groups of 128 columns, E experts, M rows (outputs), N columns (inputs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pointsman.kernels.weight import Weight
from pointsman.moe.weights import ExpertWeights

LEAST_SCALE = 1e-10
BLOCK = 128
LAYOUTS = ("MajorK", "BlockMajorK")
TILE = {"BlockMajorK": 64, "interleaved": 128}


def turned(weights: ExpertWeights) -> ExpertWeights:
    """[gate; up] as [up; gate], numbers and scales."""
    gate_up = weights.gate_up
    gate, up = gate_up.parts
    assert gate == up and gate % gate_up.block[0] == 0
    data = torch.cat(list(reversed(gate_up.data.view(torch.uint8).chunk(2, dim=-2))), dim=-2)
    scale = None if gate_up.scale is None else torch.cat(list(reversed(gate_up.scale.chunk(2, dim=-2))), dim=-2)
    inputs = None if gate_up.input_scale is None else gate_up.input_scale.flip(-1)
    return ExpertWeights(Weight(data.view(gate_up.data.dtype), scale, gate_up.block, (up, gate), inputs), weights.down)


class TrtllmWeights(NamedTuple):
    """Experts as the kernels take them: e4m3 [E, 2F, D] and [E, D, F], or these as [E, N / 128, M, 128]; float32 scales of their blocks."""

    layout: str
    width: int
    up_gate: Tensor
    up_gate_scale: Tensor
    down: Tensor
    down_scale: Tensor

    @property
    def num_experts(self) -> int:
        return len(self.down_scale)


def block_weights(weights: ExpertWeights, layout: str) -> TrtllmWeights:
    """Weights of 128x128 blocks, up before gate, for the kernel in this layout; as MajorK the numbers are not copied."""
    assert layout in LAYOUTS
    both, down = weights
    assert both.scale is not None and down.scale is not None
    scales = both.scale.clamp(min=LEAST_SCALE), down.scale.clamp(min=LEAST_SCALE)
    data = both.data, down.data
    if layout == "BlockMajorK":
        data = block_major(shuffled(data[0], TILE[layout])), block_major(shuffled(data[1], TILE[layout]))
    return TrtllmWeights(layout, both.parts[0], data[0], scales[0], data[1], scales[1])


def block_major(data_EMN: Tensor) -> Tensor:
    """[E, M, N] as [E, N / 128, M, 128]."""
    experts, rows, columns = data_EMN.shape
    return data_EMN.view(torch.uint8).view(experts, rows, columns // BLOCK, BLOCK).transpose(1, 2).contiguous().view(data_EMN.dtype)


def shuffle_order(num_rows: int, tile: int) -> Tensor:
    """Which row comes to each place: of each 16 rows the even ones, then the odd; of 32, for tiles of 128, by the residue modulo 4."""
    run = 32 if tile % 128 == 0 else 16
    ways = run // 8
    rows = torch.arange(num_rows)
    within = rows % run
    place = rows - within + within % ways * 8 + within // ways
    return torch.empty_like(rows).scatter_(0, place, rows)


def shuffled(data_EMN: Tensor, tile: int) -> Tensor:
    """Each matrix of the stack with its rows shuffled."""
    order = shuffle_order(data_EMN.shape[-2], tile).to(data_EMN.device)
    return data_EMN.view(torch.uint8)[..., order, :].view(data_EMN.dtype)


def interleave_order(num_rows: int) -> Tensor:
    """First row of the upper half, first of the lower, second of the upper..."""
    return torch.arange(num_rows).view(2, -1).T.flatten()


def interleaved(up_gate_EMN: Tensor) -> Tensor:
    """[up; gate] with one scale a matrix, for the kernel that activates in its epilogue: rows in turn, then shuffled."""
    num_rows = up_gate_EMN.shape[-2]
    order = interleave_order(num_rows)[shuffle_order(num_rows, TILE["interleaved"])].to(up_gate_EMN.device)
    return up_gate_EMN.view(torch.uint8)[..., order, :].view(up_gate_EMN.dtype)


def transposed_scales(scale_TG: Tensor) -> Tensor:
    """Scales of activations as [G, T], contiguous."""
    return scale_TG.clamp(min=LEAST_SCALE).T.contiguous()


def pack(ids_TK: Tensor, weights_TK: Tensor, *, first: int = 0, nobody: int = 0) -> Tensor:
    """Experts and weights in one int32 each: the id in the upper half, the weight as bfloat16 in the lower.

    Args:
        weights_TK: float32 and not below zero, so that the lower half never reaches into the upper.
        first: what id 0 becomes.
        nobody: what an id below zero becomes, with weight 0.
    """
    none_TK = ids_TK < 0
    bits_TK = weights_TK.bfloat16().view(torch.int16).int() & 0xFFFF
    words_TK = ((ids_TK.int() + first) << 16) | bits_TK
    return words_TK.masked_fill(none_TK, nobody << 16)
