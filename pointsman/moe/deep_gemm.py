"""The experts by DeepGEMM's grouped FP8 products on Hopper: the one door to `deep_gemm`.

The library multiplies; sorting, quantizing, the activation and the sum are kernels of ours (`kernels.placed_rows`). Up to
`MASKED_TOKENS` tokens every expert has a block of rows and the library reads those in use (*masked*); more tokens stand expert after
expert in blocks of 128 (*contiguous*). Sizes depend on the number of tokens alone, so a step can be captured in a CUDA graph.

Weights and their scales are taken as the checkpoint has them: [gate; up] rows and float32 scales of 128x128 blocks.

What passes between the kernels is bfloat16 where `routed` keeps float32: gate and up, and a choice's output.

Shape suffixes: T tokens, K experts per token, D hidden, P rows of a layout.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pointsman.moe.routing import Routing
from pointsman.moe.weights import ExpertWeights

MASKED_TOKENS = 128
LEAST_MASKED_BLOCK = 64  # rows that a program of the library reads together
CONTIGUOUS_BLOCK = 128  # what the library wants each expert's rows padded to
# the library has called them so; the first that is there is used
CONTIGUOUS = ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous")
MASKED = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked", "m_grouped_gemm_fp8_fp8_bf16_nt_masked")


class DeepGemmRunner:
    """Place and quantize; gate and up; activate and quantize; down; sum: the two products are the library's."""

    name: ClassVar[str] = "deep_gemm"
    routes_itself: ClassVar[Literal[False]] = False

    def __init__(self) -> None:
        self._rows = importlib.import_module("pointsman.kernels.placed_rows")
        self._contiguous, self._masked = products()

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        return weights

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        ids_TK, weights_TK = routing
        num_tokens, top_k = ids_TK.shape
        if num_tokens == 0:
            return torch.empty_like(x_TD)
        masked = num_tokens <= MASKED_TOKENS
        block = (LEAST_MASKED_BLOCK if num_tokens <= LEAST_MASKED_BLOCK else MASKED_TOKENS) if masked else CONTIGUOUS_BLOCK
        placed, a, a_scale = self._rows.place(x_TD, ids_TK, weights.num_experts, block, masked=masked)
        expected = -(-num_tokens * top_k // weights.num_experts)
        both = self._product((a, a_scale), (weights.gate_up.data, weights.gate_up.scale), placed, expected)
        hidden = self._rows.activate_placed(both, placed)
        y = self._product(hidden, (weights.down.data, weights.down.scale), placed, expected)
        out_TD: Tensor = self._rows.combine_placed(y, placed, ids_TK, weights_TK, x_TD.dtype)
        return out_TD

    def _product(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor | None], placed: Any, expected: int) -> Tensor:
        """bfloat16 rows [..., N] of a layout: those of each expert times its matrix."""
        out = torch.empty(*a[0].shape[:-1], b[0].shape[1], dtype=torch.bfloat16, device=a[0].device)
        if placed.masked:
            self._masked(a, b, out, placed.layout, expected)
        else:
            self._contiguous(a, b, out, placed.layout)
        return out


@functools.cache
def products() -> tuple[Any, Any]:
    """The library's product of rows in contiguous blocks, and of rows in a block for each expert.

    Raises:
        ValueError: this version has none that is called as those are that Pointsman knows.
    """
    library = importlib.import_module("deep_gemm")
    return _find(library, CONTIGUOUS, 4), _find(library, MASKED, 5)


def _find(library: Any, names: tuple[str, ...], num_arguments: int) -> Any:
    found = next((getattr(library, name) for name in names if hasattr(library, name)), None)
    if found is None:
        raise ValueError(f"this deep_gemm has none of {', '.join(names)}; install Pointsman's extra `deepgemm`, whose version does")
    try:
        inspect.signature(found).bind(*range(num_arguments))
    except TypeError as error:
        raise ValueError(
            f"{found.__name__} of this deep_gemm is called otherwise ({error}); install Pointsman's extra `deepgemm`"
        ) from error
    return found
