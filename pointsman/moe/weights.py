"""The experts of one layer, stacked.

Gate (w1) and up (w3) are joined along their rows, so that one product makes both halves of silu(gate) * up; their FP8 scales
are joined part by part, which keeps expert widths right that are no multiple of the block.

Shape suffixes: E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pointsman.kernels.weight import Weight


class ExpertWeights(NamedTuple):
    """`gate_up` is [E, 2F, D] with parts (F, F); `down` is [E, D, F]."""

    gate_up: Weight
    down: Weight

    @property
    def num_experts(self) -> int:
        return len(self.gate_up.data)

    @property
    def quantized(self) -> bool:
        return self.gate_up.quantized

    def dequantize(self, dtype: torch.dtype) -> ExpertWeights:
        """Plain copies of both stacks."""
        return ExpertWeights(
            Weight(self.gate_up.dequantize(dtype), parts=self.gate_up.parts),
            Weight(self.down.dequantize(dtype), parts=self.down.parts),
        )


def stack_experts(experts: list[tuple[Weight, Weight, Weight]]) -> ExpertWeights:
    """Stack the (w1 gate, w3 up, w2 down) of each expert."""
    gates, ups, downs = zip(*experts, strict=True)
    gate_ups = [join_rows([gate, up]) for gate, up in zip(gates, ups, strict=True)]
    return ExpertWeights(_stack(gate_ups), _stack(list(downs)))


def join_rows(weights: list[Weight]) -> Weight:
    """Join matrices along their rows; each keeps its own blocks."""
    parts = tuple(part for weight in weights for part in weight.parts)
    data = torch.cat([_bytes(weight.data) for weight in weights]).view(weights[0].data.dtype)
    scales = [weight.scale for weight in weights if weight.scale is not None]
    inputs = [weight.input_scale for weight in weights if weight.input_scale is not None]
    return Weight(data, torch.cat(scales) if scales else None, weights[0].block, parts, torch.cat(inputs) if inputs else None)


def _stack(weights: list[Weight]) -> Weight:
    data = torch.stack([_bytes(weight.data) for weight in weights]).view(weights[0].data.dtype)
    scales = [weight.scale for weight in weights if weight.scale is not None]
    inputs = [weight.input_scale for weight in weights if weight.input_scale is not None]
    block, parts = weights[0].block, weights[0].parts
    return Weight(data, torch.stack(scales) if scales else None, block, parts, torch.stack(inputs) if inputs else None)


def _bytes(data: torch.Tensor) -> torch.Tensor:
    """e4m3 as bytes: torch cannot join it on every device."""
    return data.view(torch.uint8) if data.element_size() == 1 else data
