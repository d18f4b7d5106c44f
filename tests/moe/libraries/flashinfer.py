"""FlashInfer's FP8 experts as they are documented, in torch, behind the signatures and enumerations of a version.

What a kernel checks is checked, and raises as it does; what it reads in a layout is read so; what it rounds is rounded. Written from the
library's documentation and the checks of its launchers (versions 0.6.8 to 0.7.2), and sharing no code with the runners.

Shape suffixes: T tokens, D hidden, K experts per token, E experts, M rows (outputs), N columns (inputs).
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pointsman.kernels.library import numbers
from pointsman.kernels.weight import FP8
from tests.moe.libraries.products import BLOCK, check, product, quantize, rounded
from tests.moe.libraries.signatures import known, signature

VERSIONS = tuple(known()["flashinfer-python"])
# where each of 16 rows stands after the library's shuffle for tiles of 64, and each of 32 for tiles of 128
PLACES = {
    64: [8 * (row % 2) + row // 2 for row in range(16)],
    128: [8 * (row % 4) + row // 4 for row in range(32)],
}


class Emulation:
    """A version of the library.

    Attributes:
        calls: the arguments of each call, by function.
        exact: leave out what the kernels round beyond the reference, so that a layout's fault cannot hide in it.
        tunings: how `autotune` was used: its arguments.
    """

    def __init__(self, version: str, *, exact: bool = False) -> None:
        entry = known()["flashinfer-python"][version]
        self.version, self.exact = version, exact
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.tunings: list[dict[str, Any]] = []
        self.moe = types.ModuleType("flashinfer.fused_moe")
        for name, members in entry["enumerations"].items():
            setattr(self.moe, name, IntEnum(name, members))
        work = {
            "trtllm_fp8_block_scale_moe": self.fused,
            "trtllm_fp8_block_scale_routed_moe": self.routed,
            "trtllm_fp8_per_tensor_scale_moe": self.scalar,
            "cutlass_fused_moe": self.cutlass,
        }
        for name, function in work.items():
            setattr(self.moe, name, self._function(name, signature(entry["functions"][name]), function))
        self.library = types.ModuleType("flashinfer")
        self.library.fused_moe, self.library.__version__ = self.moe, version
        self.library.autotune = self._tuning(signature(entry["functions"]["autotune"]))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Emulation:
        monkeypatch.setitem(sys.modules, "flashinfer", self.library)
        monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", self.moe)
        return self

    def _function(self, name: str, parameters: Any, work: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            given = dict(parameters.bind(*args, **options).arguments)
            self.calls.append((name, given))
            return work(given)

        call.__name__, call.__signature__ = name, parameters  # type: ignore[attr-defined]
        return call

    def _tuning(self, parameters: Any) -> Callable[..., Any]:
        @contextlib.contextmanager
        def autotune(*args: Any, **options: Any) -> Iterator[None]:
            given = dict(parameters.bind(*args, **options).arguments)
            self.tunings.append(given | {"calls": (before := len(self.calls))})
            yield
            self.tunings[-1]["calls"] = len(self.calls) - before
            if given["tune_mode"]:
                Path(given["cache"]).write_text(json.dumps({"tactics": self.version}))

        autotune.__signature__ = parameters  # type: ignore[attr-defined]
        return autotune

    # what both trtllm functions check and compute

    def _common(self, given: dict[str, Any]) -> tuple[Tensor, Tensor, Callable[[int, Tensor], Tensor]]:
        q_TD, scale_GT = given["hidden_states"], given["hidden_states_scale"]
        num_tokens, hidden = q_TD.shape
        width, local = given["intermediate_size"], given["local_num_experts"]
        check(given["fp8_quantization_type"] == self.moe.Fp8QuantizationType["DeepSeekFp8"], "DeepSeekFp8")
        check(given.get("activation_type", 3) in (3, self.moe.ActivationType["Swiglu"]), "DeepSeekFp8 only supports Swiglu")
        check(q_TD.dtype == FP8 and q_TD.is_contiguous(), "hidden_states must be fp8")
        check(scale_GT.dtype == torch.float32 and scale_GT.shape == (hidden // BLOCK, num_tokens), "hidden_states_scale dim0 must match")
        check(scale_GT.is_contiguous() and bool((scale_GT >= 1e-10).all()), "scales are contiguous and positive")
        check(width % BLOCK == 0, "intermediate_size must be a multiple of 128")
        up_gate, down = (self._matrices(given, name, rows) for name, rows in (("gemm1", 2 * width), ("gemm2", hidden)))
        for name, shape in ("gemm1", (local, 2 * width // BLOCK, hidden // BLOCK)), ("gemm2", (local, hidden // BLOCK, width // BLOCK)):
            scale = given[f"{name}_weights_scale"]
            check(
                scale.dtype == torch.float32 and scale.shape == shape and scale.is_contiguous(), f"{name}_weights_scale has incorrect shape"
            )
            check(bool((scale >= 1e-10).all()), f"{name}_weights_scale is positive")
        check(up_gate.shape == (local, 2 * width, hidden) and down.shape == (local, hidden, width), "weights have incorrect shape")
        if (out := given.get("output")) is not None:
            check(out.dtype == torch.bfloat16 and out.shape == (num_tokens, hidden) and out.is_contiguous(), "output is bfloat16")
        soft = (lambda rows: rows) if self.exact else rounded

        def expert(number: int, tokens: Tensor) -> Tensor:
            both = soft(product(q_TD[tokens], scale_GT.T[tokens], up_gate[number], given["gemm1_weights_scale"][number]))
            up, gate = both.chunk(2, -1)
            hidden_rows = F.silu(gate) * up
            y = product(
                *quantize(hidden_rows.bfloat16() if self.exact else hidden_rows), down[number], given["gemm2_weights_scale"][number]
            )
            return y if self.exact else y.bfloat16().float()

        return q_TD, scale_GT, expert

    def _matrices(self, given: dict[str, Any], name: str, num_rows: int) -> Tensor:
        """[E, M, N] of what was given in a layout."""
        weights, layout = given[f"{name}_weights"], self.moe.WeightLayout(given["weight_layout"]).name
        check(weights.dtype == FP8 and weights.is_contiguous(), f"{name}_weights must be fp8")
        check((layout, given["use_shuffled_weight"]) in {("MajorK", False), ("BlockMajorK", True)}, f"no kernel for {layout} so")
        if layout == "MajorK":
            check(weights.dim() == 3, f"{name}_weights are [E, M, K]")
            return weights
        check(weights.dim() == 4 and weights.shape[2:] == (num_rows, BLOCK), f"{name}_weights are [E, K / 128, M, 128]")
        return unshuffled(weights.view(torch.uint8).transpose(1, 2).flatten(2), 64).view(FP8)

    def _check_routing(self, given: dict[str, Any]) -> str:
        method = self.moe.RoutingMethodType(given["routing_method_type"]).name
        experts, top_k = given["num_experts"], given["top_k"]
        groups, best = given["n_group"] or 0, given["topk_group"] or 0
        check(0 < top_k <= experts, "top_k must be between 1 and num_experts")
        check(given["local_expert_offset"] >= 0, "expert offset and count must be within valid range")
        check(given["local_expert_offset"] + given["local_num_experts"] <= experts, "expert offset and count must be within valid range")
        if method == "DeepSeekV3":
            check(groups != 0 and best != 0, "n_group should not be zero for DeepSeekV3 routing")
            check(experts % groups == 0 and best <= 4 and best <= groups, "only supports topk_group<=4")
            check(top_k <= (8 if experts <= 384 else 22), "only supports top_k<=8")
            check(top_k < best * experts // groups, "top_k must be less than total number of experts in selected groups")
        else:
            check(groups <= 1 and best <= 1, "only supports n_group <= 1")
            check(top_k <= 32, "only supports top_k<=32")
        check(experts % 4 == 0, "num_experts must be divisible by 4")
        check(experts > top_k, "num_experts must be greater than top_k")
        return method

    def _finish(self, given: dict[str, Any], ids_TK: Tensor, weights_TK: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
        num_tokens, hidden = given["hidden_states"].shape
        total_TD = torch.zeros(num_tokens, hidden)
        first = given["local_expert_offset"]
        for number in range(given["local_num_experts"]):
            token, choice = (ids_TK == first + number).nonzero(as_tuple=True)
            if len(token):
                total_TD.index_add_(0, token, expert(number, token) * weights_TK[token, choice, None].float())
        out_TD = given.get("output")
        out_TD = torch.empty(num_tokens, hidden, dtype=torch.bfloat16) if out_TD is None else out_TD
        out_TD.copy_(total_TD)
        return out_TD

    def fused(self, given: dict[str, Any]) -> Tensor:
        (ids_TK, weights_TK), (_, _, expert) = self._choose(given), self._common(given)
        return self._finish(given, ids_TK, weights_TK if self.exact else weights_TK.bfloat16(), expert)

    def _choose(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The kernel's own routing; says what it was where it is asked."""
        method = self._check_routing(given)
        logits_TE, bias_E = given["routing_logits"], given["routing_bias"]
        num_tokens, top_k = len(given["hidden_states"]), given["top_k"]
        check(logits_TE.shape == (num_tokens, given["num_experts"]), "routing_logits dim1 must match num_experts")
        check(logits_TE.dtype in (torch.float32, torch.bfloat16), "routing_logits must be float or bfloat16")
        if bias_E is not None:
            check(
                bias_E.shape == (given["num_experts"],) and bias_E.dtype in (torch.float32, torch.bfloat16),
                "routing_bias has incorrect shape",
            )
        ids_TK, weights_TK = choose(method, logits_TE.float(), bias_E, given)
        if (replay := given.get("routing_replay_out")) is not None:
            check(replay.dtype == torch.int16 and replay.dim() == 2 and replay.shape[1] == top_k, "routing_replay_out must be int16")
            check(len(replay) >= num_tokens and replay.is_contiguous(), "routing_replay_out dim0 must be >= num_tokens")
            replay[:num_tokens] = ids_TK.short()
        return ids_TK, weights_TK

    def scalar(self, given: dict[str, Any]) -> Tensor:
        """One scale a matrix, static: sums of whole rows, scaled by an expert's numbers, activated as they leave the product."""
        check(numbers(self.version) >= (0, 6, 9), "Mismatched number of arguments: expected 25 but got 24")
        q_TD, width, local = given["hidden_states"], given["intermediate_size"], given["local_num_experts"]
        hidden = q_TD.shape[1]
        check(q_TD.dtype == FP8 and q_TD.is_contiguous(), "hidden_states must be float8_e4m3fn")
        check(given["use_routing_scales_on_input"] is False, "the weights of choices scale the output")
        scales = [given[name] for name in ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")]
        for scale in scales:
            check(scale.dtype == torch.float32 and scale.shape == (local,) and scale.is_contiguous(), "scales are [local_num_experts]")
        stacks = [given["gemm1_weights"], given["gemm2_weights"]]
        for stack, shape in zip(stacks, ((local, 2 * width, hidden), (local, hidden, width)), strict=True):
            check(stack.dtype == FP8 and stack.shape == shape and stack.is_contiguous(), "weights must be float8_e4m3fn [E, M, K]")
        both, down = (unshuffled(stack.view(torch.uint8), 128).view(FP8) for stack in stacks)
        if (out := given.get("output")) is not None:
            check(out.dtype == torch.bfloat16 and out.shape == q_TD.shape and out.is_contiguous(), "output is bfloat16")
        ids_TK, weights_TK = self._choose(given)

        def expert(number: int, tokens: Tensor) -> Tensor:
            up_scale, gate_scale, down_scale = (scale[number] for scale in scales)
            sums = q_TD[tokens].float() @ both[number].float().T
            up, gate = sums[:, 0::2], sums[:, 1::2]
            hidden_rows = (up * up_scale * F.silu(gate * gate_scale)).clamp(-448.0, 448.0).to(FP8)
            y = hidden_rows.float() @ down[number].float().T * down_scale
            return y if self.exact else y.bfloat16().float()

        return self._finish(given, ids_TK, weights_TK if self.exact else weights_TK.bfloat16(), expert)

    def routed(self, given: dict[str, Any]) -> Tensor:
        self._check_routing(given)
        _, _, expert = self._common(given)
        words_TK = given["topk_ids"]
        check(words_TK.dtype == torch.int32 and words_TK.is_contiguous(), "expert_indices must be int32")
        check(words_TK.shape == (len(given["hidden_states"]), given["top_k"]), "expert_indices dim1 must match top_k")
        check(given["routing_bias"] is None, "the bias has been added")
        ids_TK = words_TK >> 16
        check(bool((ids_TK >= 0).all() and (ids_TK < given["num_experts"]).all()), "an expert that does not exist")
        weights_TK = (words_TK & 0xFFFF).to(torch.uint16).view(torch.bfloat16)
        return self._finish(given, ids_TK, weights_TK, expert)

    def cutlass(self, given: dict[str, Any]) -> Tensor:
        """Rows of bfloat16; what passes between its kernels is bfloat16."""
        x_TD, ids_TK, weights_TK = given["input"], given["token_selected_experts"], given["token_final_scales"]
        up_gate, down = given["fc1_expert_weights"], given["fc2_expert_weights"]
        check(bool(given["use_deepseek_fp8_block_scale"]) and given["output_dtype"] == torch.bfloat16, "block scales, bfloat16 out")
        check(x_TD.dtype == torch.bfloat16, "input must be bfloat16")
        check(ids_TK.dtype == torch.int32 and weights_TK.dtype == torch.float32, "ids are int32 and scales float32")
        check(
            ids_TK.shape == weights_TK.shape and len(ids_TK) == len(x_TD), "input and token_selected_experts must have the same num tokens"
        )
        check(up_gate.dtype == down.dtype == FP8 and up_gate.is_contiguous() and down.is_contiguous(), "weights are fp8")
        check(up_gate.shape[1] == 2 * down.shape[2], "fc1_expert_weights inter size must be 2 times fc2_expert_weights inter size")
        scales = given["quant_scales"]
        check(len(scales) == 2 and all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in scales), "two scales")
        if "use_fused_finalize" in given:
            check(given["use_fused_finalize"] is False, "a fused finalize adds in no fixed order")
        out_TD = given["output"]
        check(out_TD.shape == x_TD.shape and out_TD.dtype == torch.bfloat16, "output")
        total_TD = torch.zeros(x_TD.shape)
        for number in range(len(up_gate)):
            token, choice = (ids_TK == number).nonzero(as_tuple=True)
            if len(token):
                up, gate = product(*quantize(x_TD[token]), up_gate[number], scales[0][number]).bfloat16().float().chunk(2, -1)
                hidden = (F.silu(gate) * up).bfloat16()
                y = product(*quantize(hidden), down[number], scales[1][number]).bfloat16().float()
                total_TD.index_add_(0, token, y * weights_TK[token, choice, None])
        return out_TD.copy_(total_TD)


def unshuffled(bytes_EMN: Tensor, tile: int) -> Tensor:
    """Rows as they stood before the library's shuffle."""
    places = PLACES[tile]
    back = torch.tensor([first + place for first in range(0, bytes_EMN.shape[1], len(places)) for place in places])
    return bytes_EMN[:, back]


def choose(method: str, logits_TE: Tensor, bias_E: Tensor | None, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The kernel's routing by the name of its method; among equals the lower expert."""
    top_k = given["top_k"]

    def best(values_TE: Tensor) -> Tensor:
        return values_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]

    if method in ("MiniMax2", "DeepSeekV3"):
        check(bias_E is not None, "reads a bias")
        score_TE = logits_TE.sigmoid()
        biased_TE = score_TE + bias_E.float()
        if method == "DeepSeekV3" and given["n_group"] > 1:
            grouped = biased_TE.view(len(biased_TE), given["n_group"], -1)
            rank_TG = grouped.sort(dim=-1, descending=True).values[..., :2].sum(-1)
            kept = rank_TG.sort(dim=-1, descending=True, stable=True).indices[:, : given["topk_group"]]
            outside = torch.ones_like(rank_TG, dtype=torch.bool).scatter(1, kept, False)
            biased_TE = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
        ids_TK = best(biased_TE)
        weights_TK = score_TE.gather(1, ids_TK)
        scale = 1.0 if method == "MiniMax2" else given["routed_scaling_factor"]
        return ids_TK, weights_TK * scale / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    check(bias_E is None, "this method adds no bias")
    check(method in ("RenormalizeNaive", "Default"), f"{method} is not emulated")
    probability_TE = logits_TE.softmax(-1)
    ids_TK = best(probability_TE)
    weights_TK = probability_TE.gather(1, ids_TK)
    return ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True) if method == "RenormalizeNaive" else weights_TK
