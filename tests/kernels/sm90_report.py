"""Compiles the experts' kernels for sm_90 without a GPU and says what the assembler made of them.

    python -m tests.kernels.sm90_report [--all]

Without `--all`, a few sizes that stand for the others. Each line is a kernel: the width of the experts (by how many devices share
them), tokens, registers, bytes of shared memory and of stack, and what is wrong with it; the last is JSON.
"""

from __future__ import annotations

import dataclasses
import sys

import torch

from pointsman.kernels import few_tokens, fused_experts, tiles, vector_products, wide_gemm
from pointsman.kernels.arrange import arrange, spread
from pointsman.kernels.expert_rows import activate, combine
from pointsman.kernels.grouped_gemm import gemm, up
from pointsman.kernels.routing import Choice, choose_experts, router_logits
from pointsman.kernels.tiles import Shape, Tiles
from pointsman.kernels.weight import FP8, Weight
from tests.kernels.sm90 import SHARED_LIMIT, WIDE_PRODUCT, Binary, Launch, caught, report, spilled

NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 256, 8, 3072, 1536
PRODUCTS = ("up_kernel", "gemm_kernel", "fused_kernel")
FEW = [(1, 1), (2, 1), (1, 128), (4, 8), (2, 512), (1, 1024), (1, 8192)]
ALL = [(tp, 2**power) for tp in (1, 2, 4) for power in range(14)]


def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def stack(rows: int, columns: int) -> Weight:
    return Weight(meta(NUM_EXPERTS, rows, columns, dtype=FP8), meta(NUM_EXPERTS, rows // 128, columns // 128))


def launches(tp: int, num_tokens: int, cut: Tiles, plain: Tiles) -> list[Launch]:
    """What the layer launches for a step of this size, and the plain arrangement's kernels."""
    width, num_pairs = WIDTH // tp, num_tokens * TOP_K
    gate_up, down = stack(2 * width, HIDDEN), stack(HIDDEN, width)
    x_TD = meta(num_tokens, HIDDEN, dtype=torch.bfloat16)
    rows_CLK = meta(4096, 62, TOP_K, dtype=torch.uint8)
    with caught() as found:
        logits = router_logits(x_TD, meta(NUM_EXPERTS, HIDDEN), pdl=True)
        slots_T = meta(num_tokens, dtype=torch.int64)
        choice = Choice(top_k=TOP_K, softmax=False, bias_E=meta(NUM_EXPERTS), rows_CLK=rows_CLK, layer=1)
        ids_TK, weights_TK = choose_experts(logits, choice, slots_T, pdl=True)
        order, q_TD, scale_TG = arrange(ids_TK, NUM_EXPERTS, cut.up.block, x_TD, pdl=True)
        assert q_TD is not None
        h_PF, scale_PG = up(q_TD, scale_TG, gate_up, order, num_pairs, TOP_K, cut.up, pdl=True)
        y_RD = gemm(h_PF, scale_PG, down, order, num_pairs, cut.down, meta(num_pairs, HIDDEN), pdl=True)
        combine(y_RD, ids_TK, weights_TK, torch.bfloat16, pdl=True)
        if num_tokens <= few_tokens.MOST_TOKENS:
            counter = meta(few_tokens.NUM_COUNTERS, dtype=torch.int32)
            for arranged in (True, False):
                options = {"arranged": arranged, "num_zeros": 0 if arranged else 8, "pdl": True}
                few_tokens.route_few(x_TD, meta(NUM_EXPERTS, HIDDEN), slots_T, counter, choice, **options)
        if num_tokens <= vector_products.MOST_TOKENS:
            zeros = meta(vector_products.num_arrivals(num_pairs, width), dtype=torch.int32)
            vector_products.experts(q_TD, scale_TG, ids_TK, weights_TK, gate_up, down, zeros, pdl=True)
        order, q_TD, scale_TG = arrange(ids_TK, NUM_EXPERTS, plain.up.block, x_TD)
        assert q_TD is not None
        both_PF = meta(len(order.pairs_P), 2 * width, dtype=torch.bfloat16)
        gemm(q_TD, scale_TG, gate_up, order, num_pairs, plain.up, both_PF, gather=TOP_K)
        h_PF, scale_PG = activate(both_PF, order, num_pairs, plain.up.block, quantize=True)
        gemm(h_PF, scale_PG, down, order, num_pairs, plain.down, meta(num_pairs, HIDDEN, dtype=torch.bfloat16))
        combine(y_RD, ids_TK, weights_TK, torch.bfloat16)
        if num_tokens * TOP_K >= NUM_EXPERTS * 64:
            order, q_PD, scale_GP = spread(ids_TK, NUM_EXPERTS, wide_gemm.ROWS, x_TD, pdl=True)
            h_PF, scale_HP = wide_gemm.up(q_PD, scale_GP, gate_up, order, num_pairs, processors=132, pdl=True)
            for dtype in (torch.bfloat16, torch.float32):
                wide_gemm.down(h_PF, scale_HP, down, order, num_pairs, meta(num_pairs, HIDDEN, dtype=dtype), processors=132, pdl=True)
        if num_tokens <= fused_experts.MOST_TOKENS:
            for given_TK in (None, ids_TK):
                given = dataclasses.replace(choice, given_TK=given_TK, alike_C=meta(4096, dtype=torch.int16))
                gate_ED, counter = meta(NUM_EXPERTS, HIDDEN), meta(3, dtype=torch.int32)
                fused_experts.run(
                    x_TD, gate_up, down, gate_ED, slots_T, given, ids_TK, weights_TK, counter, processors=132, pdl=True
                )  # fmt: skip
    return found


def faults(launch: Launch, binary: Binary) -> list[str]:
    """What a shipped kernel must not be."""
    found = spilled(launch, binary)
    if binary.shared > SHARED_LIMIT:
        found.append(f"needs {binary.shared} bytes of shared memory")
    columns = launch.arguments.get("COLUMNS", 0)
    left = columns if launch.arguments.get("SWAP") else launch.arguments.get("BLOCK_M", 0)
    if launch.kernel.__name__ == "wide_kernel" and WIDE_PRODUCT not in binary.ptx:
        found.append(f"multiplies with no {WIDE_PRODUCT}")
    if launch.kernel.__name__ == "fused_kernel":
        left = launch.arguments["COLUMNS"]
        if not launch.options["launch_cooperative_grid"]:
            found.append("has barriers of the grid and is not launched as a cooperative one")
    if launch.kernel.__name__ in PRODUCTS and (left >= 64) != binary.uses_wgmma:
        found.append(f"{'uses no' if left >= 64 else 'uses'} wgmma with {left} rows on the left")
    return found


def cuts(tp: int, num_tokens: int) -> list[tuple[Tiles, Tiles]]:
    """The rule's cuts, and those of every table for this shape that holds at this size."""
    shape = Shape(num_experts=NUM_EXPERTS, top_k=TOP_K, hidden=HIDDEN, width=WIDTH // tp, quantized=True)
    devices = ["none", *tiles.load_tables()]
    return [
        (tiles.TileTable("routed", shape, device)(num_tokens), tiles.TileTable("triton", shape, device)(num_tokens)) for device in devices
    ]


def main() -> int:
    found = (
        (f"tp {tp} tokens {num_tokens:5}", launch)
        for tp, num_tokens in (ALL if "--all" in sys.argv[1:] else FEW)
        for cut, plain in cuts(tp, num_tokens)
        for launch in launches(tp, num_tokens, cut, plain)
    )
    return report(found, faults)


if __name__ == "__main__":
    sys.exit(main())
