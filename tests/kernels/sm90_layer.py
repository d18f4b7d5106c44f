"""Compiles the kernels of a layer besides the experts', and the sampler's, for sm_90 without a GPU.

    python -m tests.kernels.sm90_layer [--all]

Without `--all`, a few sizes that stand for the others. The lines are those of `sm90_report`.
"""

from __future__ import annotations

import sys

import torch

from pointsman.kernels import block_gemm, dense_gemm, gated, norm_quant, paged_attention
from pointsman.kernels.mailbox import Mailbox, all_reduce
from pointsman.kernels.paged_attention import TilePlan
from pointsman.kernels.qkv_post import qkv_post
from pointsman.kernels.sampling import RowSampling, draw
from pointsman.kernels.unsummed import Unsummed
from pointsman.kernels.weight import FP8, Quantized
from tests.kernels.sm90 import DENSE_PRODUCT, SHARED_LIMIT, Binary, Launch, caught, report, spilled

HIDDEN, HEADS, KV_HEADS, CHANNELS, HALF = 3072, 48, 8, 128, 32
WIDTH = 1536  # of an expert that all tokens share
FEW = [(1, 1), (1, 64), (1, 1024), (4, 16), (2, 128), (8, 1)]
ALL = [(tp, 2**power) for tp in (1, 2, 4) for power in range(14)]


def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def weight(rows: int, columns: int, *, quantized: bool = True, aligned: bool = True, invariant: bool = False) -> block_gemm.BlockWeight:
    return block_gemm.BlockWeight(
        data=meta(rows, columns, dtype=FP8 if quantized else torch.bfloat16),
        scale=meta(rows // 128, columns // 128) if quantized else None,
        scale_row_N=meta(rows, dtype=torch.int32),
        aligned=aligned,
        arrivals=meta(rows // 4, dtype=torch.int32),
        invariant=invariant,
    )


def rows_of(num_rows: int, width: int) -> Quantized:
    return Quantized(meta(num_rows, width, dtype=FP8), meta(num_rows, width // 128))


def box(tp: int, num_rows: int, width: int, dtype: torch.dtype) -> Mailbox | None:
    """The last rank's mailbox; one device needs none."""
    turns, addresses = meta(num_rows, dtype=torch.int32), meta(tp, dtype=torch.int64)
    return Mailbox(rank=tp - 1, num_ranks=tp, width=width, dtype=dtype, boxes_R=addresses, turns_P=turns) if tp > 1 else None


def products(tp: int, num_rows: int, *, hopper: bool = True) -> list[Launch]:
    """The linears of a layer on one of `tp` devices; and, once, the head that never varies and weights of ragged parts."""
    width = HEADS * CHANNELS // tp
    with caught() as found:
        for rows, columns in ((width + 2 * KV_HEADS * CHANNELS // tp, HIDDEN), (HIDDEN, width)):
            block_gemm.linear(rows_of(num_rows, columns), weight(rows, columns), pdl=hopper)
            block_gemm.linear(rows_of(num_rows, columns), weight(rows, columns, aligned=False), pdl=hopper)
            block_gemm.linear(rows_of(num_rows, columns), weight(rows, columns, invariant=True), pdl=hopper)
            if hopper and num_rows > 128:
                for tile_columns in (128, 256):
                    ready = weight(rows, columns)
                    assert ready.scale is not None
                    dense_gemm.product(*rows_of(num_rows, columns), ready.data, ready.scale, tile_columns, 132)
        block_gemm.linear(
            meta(num_rows, HIDDEN, dtype=torch.bfloat16), weight(200_064, HIDDEN, quantized=False, invariant=True), pdl=hopper
        )
    return found


def others(tp: int, num_rows: int, *, hopper: bool = True) -> list[Launch]:
    """Norms, sums over ranks, the activation between matrices, what follows the joined projection, and attention, by dtype of the cache."""
    heads, kv_heads = HEADS // tp, KV_HEADS // tp
    x_TD, weight_D = meta(num_rows, HIDDEN, dtype=torch.bfloat16), meta(HIDDEN, dtype=torch.bfloat16)
    positions_T, table_LP = meta(num_rows, dtype=torch.int64), meta(128, 4096, dtype=torch.int32)
    rows, squares = box(tp, num_rows, HIDDEN, torch.bfloat16), box(tp, 2 * num_rows, 1, torch.float32)
    with caught() as found:
        norm_quant.norm(x_TD, x_TD, weight_D, 1e-6, mailbox=rows, pdl=hopper)
        norm_quant.norm(x_TD, x_TD, weight_D, 1e-6, quantize=True, mailbox=rows, pdl=hopper)
        ids_TK, weights_TK = meta(num_rows, 8, dtype=torch.int32), meta(num_rows, 8)
        # rows that are rounded are more than the mailboxes of many ranks take
        for dtype, summing in ((torch.float32, rows), (torch.bfloat16, rows if tp <= 2 else None)):
            unsummed = Unsummed(meta(num_rows * 8, HIDDEN, dtype=dtype), ids_TK, weights_TK, torch.bfloat16)
            norm_quant.norm(x_TD, unsummed, weight_D, 1e-6, quantize=True, mailbox=summing, pdl=hopper)
        if rows is not None:
            all_reduce(x_TD, rows)
        norm_quant.quantize(meta(num_rows, heads * CHANNELS, dtype=torch.bfloat16))
        for quantize in (False, True):
            gated.activate(meta(num_rows, 2 * WIDTH, dtype=torch.bfloat16), quantize)
        for dtype in (torch.bfloat16, FP8):
            pages = meta(4096, kv_heads, 16, CHANNELS, dtype=dtype)
            qkv_TN = meta(num_rows, (heads + 2 * kv_heads) * CHANNELS, dtype=torch.bfloat16)
            norms = meta(heads * CHANNELS, dtype=torch.bfloat16), meta(kv_heads * CHANNELS, dtype=torch.bfloat16)
            angles = meta(num_rows, HALF), meta(num_rows, HALF)
            qkv_post(qkv_TN, *norms, 1e-6, *angles, pages, pages, positions_T, squares, pdl=hopper)
            for weights in (norms, (norms[0][:CHANNELS], norms[1][:CHANNELS]), (None, None)):
                q_TQC = qkv_post(qkv_TN, *weights, 1e-6, *angles, pages, pages, positions_T, pdl=hopper)
            for splits in (1, paged_attention.num_splits(num_rows, kv_heads)):
                tiles = TilePlan(
                    decode_D3=meta(num_rows, 3, dtype=torch.int32), prefill_P3=meta(9, 3, dtype=torch.int32), num_splits=splits
                )
                paged_attention.attention(q_TQC, pages, pages, tiles, positions_T, table_LP, 0.1, pdl=hopper)
                paged_attention.attention_quantize(q_TQC, pages, pages, tiles, positions_T, table_LP, 0.1, pdl=hopper)
    return found


def sampler(num_rows: int) -> list[Launch]:
    """A token for each row, of the vocabulary of MiniMax-M2."""
    whole, number = meta(num_rows, dtype=torch.int64), meta(num_rows, dtype=torch.float64)
    rows = RowSampling(whole, meta(num_rows, dtype=torch.int32), number, number, number, whole, whole)
    with caught() as found:
        draw(meta(num_rows, 200_064), rows, score=True, top_B=rows.top_k_B, most_top=20)
    return found


def faults(launch: Launch, binary: Binary) -> list[str]:
    """What a shipped kernel must not be."""
    found = spilled(launch, binary)
    if binary.shared > SHARED_LIMIT:
        found.append(f"needs {binary.shared} bytes of shared memory")
    given = launch.arguments
    left = given["M"] if "M" in given else given.get("COLUMNS" if given.get("SWAP") else "ROWS")
    if left is not None and (left >= 64) != binary.uses_wgmma:
        found.append(f"{'uses no' if left >= 64 else 'uses'} wgmma with {left} rows on the left")
    if launch.kernel.__name__ == "dense_kernel" and DENSE_PRODUCT not in binary.ptx:
        found.append(f"multiplies with no {DENSE_PRODUCT}")
    return found


def launches(tp: int, num_rows: int) -> list[Launch]:
    """Those of a layer and, at two sizes, what else a step launches."""
    more = others(tp, num_rows) + sampler(num_rows) if num_rows in (1, 128) else []
    return products(tp, num_rows) + more


def label(tp: int, num_rows: int, launch: Launch) -> str:
    tile = (f"{name}={launch.arguments[name]}" for name in ("ROWS", "COLUMNS", "SPLITS", "SWAP", "M") if name in launch.arguments)
    return f"tp {tp} rows {num_rows:5} {' '.join(tile):40}"


def main() -> int:
    sizes = ALL if "--all" in sys.argv[1:] else FEW
    return report(((label(tp, rows, launch), launch) for tp, rows in sizes for launch in launches(tp, rows)), faults)


if __name__ == "__main__":
    sys.exit(main())
