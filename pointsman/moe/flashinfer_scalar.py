"""`flashinfer_trtllm` for experts with one FP8 scale a matrix and one for what it multiplies: static scales, as a calibration found them.

Rows are quantized once for all experts here, by the largest of their scales for the input, so that nothing that calibration saw
saturates; what passes between an expert's two matrices, by its own. The kernel multiplies a whole row and scales last: the gate's sum by
one number, activated; up's by another, which also brings the hidden numbers to the scale of down's input; down's by a third. So gate and
up keep a scale each.

Without scales for activations the kernel cannot do it, and the one for blocks serves (`flashinfer`), as it does for the engine's choice:
it takes one scale a matrix as that of every block, and scales activations as they come.

Weights lie as the kernel wants them (`trtllm_layout`), which is a second copy of them: an update is written into the checkpoint's form.

Shape suffixes: T tokens, D hidden, E experts here, F expert width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pointsman.kernels.flashinfer import Function
from pointsman.kernels.weight import FP8, FP8_MAX
from pointsman.moe.flashinfer import CHAINED_TOKENS, Chooser, next_power_of_two
from pointsman.moe.router import RouterInput
from pointsman.moe.routing import RoutingSpec
from pointsman.moe.spec import Share
from pointsman.moe.trtllm_layout import TILE, interleaved, shuffled, turned
from pointsman.moe.weights import ExpertWeights

NEEDS = (
    "hidden_states",
    "gemm1_weights",
    "output1_scales_scalar",
    "output1_scales_gate_scalar",
    "gemm2_weights",
    "output2_scales_scalar",
    "intermediate_size",
    "local_num_experts",
    "use_routing_scales_on_input",
    "tune_max_num_tokens",
)


class ScalarWeights(NamedTuple):
    """e4m3 [E, 2F, D], rows interleaved and shuffled, and [E, D, F], rows shuffled; float32 scales.

    Attributes:
        input_scale: [] of the rows.
        up_scale_E: what a sum of up's products is multiplied with, for a hidden number in e4m3.
        gate_scale_E: for the gate.
        down_scale_E: for the output.
    """

    up_gate: Tensor
    down: Tensor
    input_scale: Tensor
    up_scale_E: Tensor
    gate_scale_E: Tensor
    down_scale_E: Tensor


class ScalarTrtllmRunner:
    """Choice and experts in the kernel, from float32 logits and bias.

    Args:
        share, up_first: as for `flashinfer.TrtllmRunner`.

    Raises:
        ValueError: the installed version cannot be called so.
    """

    name: ClassVar[str] = "flashinfer_trtllm"
    routes_itself: ClassVar[Literal[True]] = True
    replays: ClassVar[bool] = False

    def __init__(self, *, share: Share | None = None, up_first: bool = False) -> None:
        self.up_first = up_first
        self._chooser = Chooser(share)
        self._function = Function("trtllm_fp8_per_tensor_scale_moe", (*Chooser.NEEDS, *NEEDS))

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> ScalarWeights:
        both, down = weights if self.up_first else turned(weights)
        assert both.input_scale is not None and down.input_scale is not None
        assert both.scale is not None and down.scale is not None
        up_E, gate_E = (one_scale(half) for half in both.scale.chunk(2, dim=-2))
        input_scale, hidden_E = both.input_scale.amax(), down.input_scale.squeeze(-1)
        return ScalarWeights(
            up_gate=interleaved(both.data),
            down=shuffled(down.data, TILE["interleaved"]),
            input_scale=input_scale,
            up_scale_E=up_E * input_scale / hidden_E,
            gate_scale_E=gate_E * input_scale,
            down_scale_E=one_scale(down.scale) * hidden_E,
        )

    def __call__(self, rows: RouterInput, spec: RoutingSpec, weights: ScalarWeights) -> Tensor:
        x_TD = rows.x_TD
        num_tokens, hidden = x_TD.shape
        if num_tokens == 0:
            return torch.empty_like(x_TD)
        arguments, chosen_TK = self._chooser.arguments(rows, spec)
        out_TD = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=x_TD.device)
        result_TD = self._function(
            {"output": out_TD, "enable_pdl": None if num_tokens <= CHAINED_TOKENS else False, "do_finalize": True},
            hidden_states=quantize_static(x_TD, weights.input_scale),
            gemm1_weights=weights.up_gate,
            output1_scales_scalar=weights.up_scale_E,
            output1_scales_gate_scalar=weights.gate_scale_E,
            gemm2_weights=weights.down,
            output2_scales_scalar=weights.down_scale_E,
            intermediate_size=weights.down.shape[-1],
            local_num_experts=len(weights.down),
            use_routing_scales_on_input=False,
            tune_max_num_tokens=next_power_of_two(num_tokens),
            **arguments,
        )
        self._chooser.record(rows, chosen_TK)
        return result_TD.to(x_TD.dtype)


def one_scale(scale_ERB: Tensor) -> Tensor:
    """Of each expert's matrix [E]; all its blocks have it."""
    scale_E = scale_ERB[:, 0, 0].contiguous()
    assert bool((scale_ERB == scale_E[:, None, None]).all())
    return scale_E


def quantize_static(x_TD: Tensor, scale: Tensor) -> Tensor:
    """e4m3 rows by a given scale; what is beyond saturates."""
    return (x_TD.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
