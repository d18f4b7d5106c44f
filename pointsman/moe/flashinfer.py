"""The experts by FlashInfer's kernels.

`flashinfer_trtllm` gives router logits and bias to the kernel, which chooses the experts and says which they were; where the checkpoint
has a scale for each matrix and what it multiplies, to another one (`flashinfer_scalar`).
`flashinfer_trtllm_routed` gives it the engine's choice, an int32 for each token and choice. Both are for Blackwell. `flashinfer_cutlass`
is for Hopper, takes the engine's choice, and quantizes activations itself.

What a kernel cannot do is told before a weight is read (`flashinfer_limits`); `docs/backends.md` lists the limits, and what was checked
without the hardware. FlashInfer is imported when a runner is made.

The trtllm kernels round more than the reference does: a token's weights to bfloat16, gate and up to e4m3 with a scale for each 128, and
a choice's output to bfloat16.

Shape suffixes: T tokens, D hidden, K experts per token, E experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pointsman.kernels import reference
from pointsman.kernels.flashinfer import Function, autotune, member
from pointsman.moe.flashinfer_limits import method_of
from pointsman.moe.router import RouterInput
from pointsman.moe.routing import Routing, RoutingSpec
from pointsman.moe.spec import Share
from pointsman.moe.trtllm_layout import TrtllmWeights, block_weights, pack, transposed_scales, turned
from pointsman.moe.weights import ExpertWeights

CHAINED_TOKENS = 4096  # larger launches that begin while the kernel before runs were seen to hang


TRTLLM_NEEDS = (
    "routing_bias",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm2_weights",
    "gemm2_weights_scale",
    "num_experts",
    "top_k",
    "n_group",
    "topk_group",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routed_scaling_factor",
    "routing_method_type",
    "use_shuffled_weight",
    "weight_layout",
    "tune_max_num_tokens",
    "fp8_quantization_type",
)


class _Trtllm:
    """What both runners of Blackwell share.

    Args:
        layout: of weights, see `trtllm_layout`.
        up_first: weights come with up before gate; otherwise `prepare` makes a copy of them that has.
    """

    def __init__(self, function: str, needs: tuple[str, ...], layout: str, up_first: bool) -> None:
        self.up_first = up_first
        self._function = Function(function, (*TRTLLM_NEEDS, *needs))
        self._layout = layout
        self._quantization = member("Fp8QuantizationType", "DeepSeekFp8")
        self._weight_layout = member("WeightLayout", layout)

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> TrtllmWeights:
        return block_weights(weights if self.up_first else turned(weights), self._layout)

    def _run(self, x_TD: Tensor, weights: TrtllmWeights, also: dict[str, Any], **arguments: Any) -> Tensor:
        """One call over the rows; `arguments` say who routes, and how."""
        num_tokens = len(x_TD)
        q_TD, scale_TG = quantize(x_TD)
        out_TD = torch.empty(num_tokens, x_TD.shape[1], dtype=torch.bfloat16, device=x_TD.device)
        also = {"output": out_TD, "enable_pdl": None if num_tokens <= CHAINED_TOKENS else False, "do_finalize": True} | also
        result = self._function(
            also,
            hidden_states=q_TD,
            hidden_states_scale=transposed_scales(scale_TG),
            gemm1_weights=weights.up_gate,
            gemm1_weights_scale=weights.up_gate_scale,
            gemm2_weights=weights.down,
            gemm2_weights_scale=weights.down_scale,
            intermediate_size=weights.width,
            local_num_experts=weights.num_experts,
            use_shuffled_weight=weights.layout != "MajorK",
            weight_layout=int(self._weight_layout),
            tune_max_num_tokens=next_power_of_two(num_tokens),
            fp8_quantization_type=self._quantization,
            **arguments,
        )
        return result.to(x_TD.dtype)


class Chooser:
    """What a kernel is told that chooses experts itself, and the record of what it chose.

    Args:
        share: where some of the experts are here; others' choices add nothing, and are recorded.
    """

    NEEDS: ClassVar = (
        "routing_logits",
        "routing_bias",
        "num_experts",
        "top_k",
        "n_group",
        "topk_group",
        "local_expert_offset",
        "routed_scaling_factor",
        "routing_method_type",
        "routing_replay_out",
    )

    def __init__(self, share: Share | None) -> None:
        self._first_expert = 0 if share is None else share.first

    def arguments(self, rows: RouterInput, spec: RoutingSpec) -> tuple[dict[str, Any], Tensor]:
        """Arguments by their names, and the int16 [T, K] that the experts will be in."""
        assert rows.given_TK is None, "the engine refuses replay with this runner"
        x_TD, method = rows.x_TD, method_of(spec)[0]
        if spec.score == "softmax" and rows.bias_E is not None:
            raise ValueError(
                "flashinfer_trtllm adds no bias to the scores of a softmax, and this model has one: use flashinfer_trtllm_routed"
            )
        groups = (spec.num_groups, spec.top_groups) if spec.top_groups < spec.num_groups else (1, 1)
        bias_E = rows.bias_E
        if bias_E is None and spec.score == "sigmoid":  # those methods read one
            bias_E = torch.zeros(spec.num_experts, device=x_TD.device)
        chosen_TK = torch.empty(len(x_TD), spec.top_k, dtype=torch.int16, device=x_TD.device)
        return {
            "routing_logits": reference.router_logits(x_TD, rows.gate_ED),
            "routing_bias": bias_E,
            "num_experts": spec.num_experts,
            "top_k": spec.top_k,
            "n_group": groups[0] if method == "DeepSeekV3" else None,
            "topk_group": groups[1] if method == "DeepSeekV3" else None,
            "local_expert_offset": self._first_expert,
            "routed_scaling_factor": spec.scale,
            "routing_method_type": int(member("RoutingMethodType", method)),
            "routing_replay_out": chosen_TK,
        }, chosen_TK

    def record(self, rows: RouterInput, chosen_TK: Tensor) -> None:
        """Keep them, where rows say so."""
        if rows.routes is not None:
            rows.routes.record(rows.layer, rows.slots_T, chosen_TK)


class TrtllmRunner(_Trtllm):
    """Choice and experts in the kernel, from float32 logits and bias.

    Args:
        share: see `Chooser`.
    """

    name: ClassVar[str] = "flashinfer_trtllm"
    routes_itself: ClassVar[Literal[True]] = True
    replays: ClassVar[bool] = False

    def __init__(self, *, layout: str = "MajorK", share: Share | None = None, up_first: bool = False) -> None:
        super().__init__("trtllm_fp8_block_scale_moe", Chooser.NEEDS, layout, up_first)
        self._chooser = Chooser(share)

    def __call__(self, rows: RouterInput, spec: RoutingSpec, weights: TrtllmWeights) -> Tensor:
        if len(rows.x_TD) == 0:
            return torch.empty_like(rows.x_TD)
        arguments, chosen_TK = self._chooser.arguments(rows, spec)
        out_TD = self._run(rows.x_TD, weights, {}, **arguments)
        self._chooser.record(rows, chosen_TK)
        return out_TD


class RoutedTrtllmRunner(_Trtllm):
    """The engine's choice, packed, and the experts in the kernel. What scales the weights is in them already.

    Args:
        share: where other ranks have other experts. Ids below zero are many then, and must cost nothing: they become an expert that is not
            here. Otherwise such a choice is expert 0 with weight 0.
    """

    name: ClassVar[str] = "flashinfer_trtllm_routed"
    routes_itself: ClassVar[Literal[False]] = False

    def __init__(self, *, layout: str = "MajorK", share: Share | None = None, up_first: bool = False) -> None:
        super().__init__("trtllm_fp8_block_scale_routed_moe", ("topk_ids", "output"), layout, up_first)
        self._share = share

    def __call__(self, x_TD: Tensor, routing: Routing, weights: TrtllmWeights) -> Tensor:
        ids_TK, weights_TK = routing
        if len(x_TD) == 0:
            return torch.empty_like(x_TD)
        share = self._share or Share(0, weights.num_experts)
        elsewhere = (share.first + weights.num_experts) % share.total  # expert 0 where all are here
        return self._run(
            x_TD,
            weights,
            {},
            topk_ids=pack(ids_TK, weights_TK, first=share.first, nobody=elsewhere),
            routing_bias=None,
            num_experts=share.total,
            top_k=ids_TK.shape[1],
            n_group=None,
            topk_group=None,
            local_expert_offset=share.first,
            routed_scaling_factor=None,
            # it routes nothing here; of the methods this is the one whose limits are widest
            routing_method_type=int(member("RoutingMethodType", "Renormalize")),
        )


class CutlassRunner:
    """The engine's choice, and bfloat16 rows that the library quantizes; sums in an order that does not change.

    Ids count from the first expert that is here, and the library passes over those below zero: of other ranks it need not know.

    Args:
        up_first: as for the others.
    """

    name: ClassVar[str] = "flashinfer_cutlass"
    routes_itself: ClassVar[Literal[False]] = False

    def __init__(self, *, up_first: bool = False) -> None:
        self.up_first = up_first
        needs = ("input", "token_selected_experts", "token_final_scales", "fc1_expert_weights", "fc2_expert_weights", "output_dtype")
        self._function = Function("cutlass_fused_moe", (*needs, "quant_scales", "output", "use_deepseek_fp8_block_scale"))

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        return weights if self.up_first else turned(weights)

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        if len(x_TD) == 0:
            return torch.empty_like(x_TD)
        out_TD = torch.empty_like(x_TD)
        return self._function(
            # an epilogue that adds up as it goes, which later versions have, adds in the order that blocks happen to end in
            {"use_fused_finalize": False, "tune_max_num_tokens": next_power_of_two(len(x_TD))},
            input=x_TD,
            token_selected_experts=routing.ids_TK.int(),
            token_final_scales=routing.weights_TK,
            fc1_expert_weights=weights.gate_up.data,
            fc2_expert_weights=weights.down.data,
            output_dtype=torch.bfloat16,
            quant_scales=[weights.gate_up.scale, weights.down.scale],
            output=out_TD,
            use_deepseek_fp8_block_scale=True,
        )


def tune(work: Callable[[], object], file: Path) -> None:
    """Run `work` while the library times its kernels for every call in it, for as many tokens and for each power of two below.

    What the file knows is not timed again; what was is added to it, and in force in this process.

    Raises:
        ValueError: the file is of another environment and cannot be added to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with autotune(True, file):
        work()
    if not file.is_file():
        raise ValueError(f"FlashInfer did not write what it has tuned to {file}; --disable-flashinfer-autotune goes on without")


def adopt(work: Callable[[], object], file: Path) -> None:
    """Put in force what another process has tuned: nothing is timed."""
    with autotune(False, file):
        work()


def quantize(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [T, D] and float32 scales [T, G]: the reference, or its kernel for bfloat16 on a GPU."""
    if x_TD.device.type == "cpu" or x_TD.dtype != torch.bfloat16:
        return reference.quantize_activation(x_TD)
    run: Callable[[Tensor], tuple[Tensor, Tensor]] = importlib.import_module("pointsman.kernels.norm_quant").quantize
    return run(x_TD)


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
