"""DeepGEMM's grouped products on Hopper as they are documented, in torch: layouts checked as the library does, then computed.

Rows that no pair is in hold whatever memory had; they are multiplied like any others, and nobody may look at the result.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.moe.libraries.products import BLOCK, check, product
from tests.moe.libraries.signatures import known, signature

VERSION = "0.1.4.post1"


def install(monkeypatch: pytest.MonkeyPatch, calls: list[str] | None = None) -> types.ModuleType:
    """Put the emulation in the library's place; `calls` gets the name of each function that is called."""
    entry = known()["sgl-deep-gemm"][VERSION]
    module = types.ModuleType("deep_gemm")
    work = {"m_grouped_fp8_fp4_gemm_nt_contiguous": contiguous, "m_grouped_fp8_fp4_gemm_nt_masked": masked}
    for name, function in work.items():
        setattr(module, name, _function(name, signature(entry["functions"][name]), function, calls))
    for alias, name in entry["aliases"].items():
        setattr(module, alias, getattr(module, name))
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    return module


def _function(name: str, known: Any, work: Callable[..., None], calls: list[str] | None) -> Callable[..., None]:
    def call(*args: Any, **options: Any) -> None:
        bound = known.bind(*args, **options)
        if calls is not None:
            calls.append(name)
        work(*bound.arguments.values())

    call.__name__, call.__signature__ = name, known  # type: ignore[attr-defined]
    return call


def _check(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, d: Tensor) -> None:
    num_experts, num_out, num_in = b.shape
    check(a.is_contiguous() and b.is_contiguous() and d.is_contiguous(), "operands must be contiguous")
    check(a.shape[-1] == num_in and d.shape == (*a.shape[:-1], num_out) and d.dtype == torch.bfloat16, "shapes must fit, d is bfloat16")
    check(num_in % BLOCK == 0 and num_out % 64 == 0, "n % 64 == 0 and k % 128 == 0")
    check(b_scale.shape == (num_experts, -(-num_out // BLOCK), num_in // BLOCK), "scales of b are those of its 128x128 blocks")
    check(b_scale.is_contiguous(), "scales of b must be contiguous")
    check(a_scale.shape == (*a.shape[:-1], num_in // BLOCK), "scales of a are those of its rows' 128 columns")
    rows = a.shape[-2]
    check(a_scale.stride(-2) == 1 and a_scale.stride(-1) == -(-rows // 4) * 4, "scales of a must be as TMA reads them")


def contiguous(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, layout: Tensor) -> None:
    """Each block of 128 rows times the matrix of its expert; those of -1 are left out."""
    _check(*a, *b, d)
    check(layout.dtype == torch.int32 and layout.is_contiguous() and layout.shape == a[0].shape[:1], "an expert for each row")
    check(len(layout) % BLOCK == 0, "rows must be a multiple of 128")
    for first in range(0, len(layout), BLOCK):
        rows, experts = slice(first, first + BLOCK), layout[first : first + BLOCK].unique()
        check(len(experts) == 1, "a block belongs to one expert")
        if (expert := int(experts)) >= 0:
            d[rows] = product(a[0][rows], a[1][rows], b[0][expert], b[1][expert]).bfloat16()


def masked(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, counts: Tensor, expected: int) -> None:
    """The first rows of each expert's block times its matrix; more of them may be written."""
    _check(*a, *b, d)
    check(counts.dtype == torch.int32 and counts.is_contiguous() and len(counts) == len(b[0]) == len(a[0]), "a count for each expert")
    check(expected > 0, "expected_m > 0")
    check(a[0].shape[1] >= 64 and int(counts.max()) <= a[0].shape[1] and int(counts.min()) >= 0, "counts are of rows of a block")
    for expert, count in enumerate(counts.tolist()):
        if count:
            padded = -(-count // 64) * 64
            d[expert, :padded] = product(a[0][expert, :padded], a[1][expert, :padded], b[0][expert], b[1][expert]).bfloat16()
