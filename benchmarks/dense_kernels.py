"""Time of a MiniMax-M2.5 layer's kernels besides the experts', and of the sampler's, on one GPU.

    python -m benchmarks.dense_kernels [--only linear head attention glue sampling] [--tp 1 2 4] [--json FILE] [--warm]

A time is reported only behind a check of the same call: products against float64, attention and glue against `kernels.reference`, tokens
against the host's sampler. Times are of CUDA graphs over several weights or caches in turn, so that none is found in the cache of the
chip. The share of the read bandwidth counts what must be moved at least. `--warm` only compiles: run it for the parts at once.

Shape suffixes: M rows, N columns out, K columns in, T rows, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pointsman.bench.expert_layer import time_graph
from pointsman.bench.kernels import measure_ceilings, versions
from pointsman.kernels import block_gemm, norm_quant, paged_attention, reference
from pointsman.kernels.candidates import AttentionShape
from pointsman.kernels.qkv_post import qkv_post
from pointsman.kernels.reference import Span
from pointsman.kernels.sampling import RowSampling, draw
from pointsman.kernels.weight import FP8, Quantized, Weight
from pointsman.request import SamplingParams
from pointsman.sampling.filters import kept, pick
from pointsman.sampling.philox import round_keys, uniform

HIDDEN, HEADS, KV_HEADS, CHANNELS, VOCABULARY = 3072, 48, 8, 128, 200_064
SIZES = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024)
COPIES = 8
CONTEXT = 1386
PAGE = 16
# relative to the norm of the result, which is rounded to bfloat16 (attention rounds its weights too)
BOUNDS = {"linear": 0.004, "head": 0.004, "attention": 0.01}
DEVICE = torch.device("cuda")

Row = dict[str, Any]
Work = Callable[[int], Any]
# what a row says of itself, the call for one of COPIES inputs, what is wrong with its result, bytes and operations
Case = tuple[Row, Work, Callable[[], str | None], float, float]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def off(got: Tensor, want: Tensor, bound: float) -> str | None:
    """What is wrong with a result, given the right one."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return None if error < bound else f"it is {error:.5f} off where {bound} is allowed"


def linears(tp: int) -> Iterator[Case]:
    shapes = {"qkv": ((HEADS + 2 * KV_HEADS) * CHANNELS // tp, HIDDEN), "o": (HIDDEN, HEADS * CHANNELS // tp)}
    for name, (height, width) in shapes.items():
        weights = [reference.quantize_weight(normal(height, width, seed=seed)) for seed in range(COPIES)]
        ready = {mode: [block_gemm.prepare(weight, invariant=mode == "invariant") for weight in weights] for mode in ("ours", "invariant")}
        exact = weights[0].dequantize(torch.float64)
        for rows in SIZES:
            x_MK = normal(rows, width, seed=100).bfloat16()
            q = Quantized(*(part.contiguous() for part in reference.quantize_activation(x_MK)))
            want = (q.data.double().view(rows, -1, 128) * q.scale.double()[..., None]).view(rows, width) @ exact.T
            moved = height * width + rows * (width + 2 * height)
            row = {"kernel": "linear", "name": name, "tp": tp, "M": rows}
            runs: dict[str, Work] = {
                "ours": functools.partial(multiply, q, ready["ours"]),
                "ours, quantizing": functools.partial(multiply, x_MK, ready["ours"]),
                "invariant": functools.partial(multiply, q, ready["invariant"]),
            }
            library = scaled_mm(q, weights, want)
            if isinstance(library, str):
                print(f"torch scaled_mm, {name} tp {tp} M {rows}: {library}", file=sys.stderr)
            else:
                runs["torch scaled_mm"] = library
            for variant, work in runs.items():
                fault = functools.partial(check_twice, work, want, BOUNDS["linear"])
                yield row | {"variant": variant}, work, fault, moved, 2.0 * rows * height * width


def multiply(x: Tensor | Quantized, ready: list[block_gemm.BlockWeight], i: int) -> Tensor:
    return block_gemm.linear(x, ready[i])


def alone(run: Callable[[], Any], i: int) -> Any:
    """A call whose inputs are few beside what it reads anew."""
    return run()


def check_twice(work: Work, want: Tensor, bound: float) -> str | None:
    first = work(0)
    return off(first, want, bound) or (None if torch.equal(first, work(0)) else "a second run gave other bits")


def scaled_mm(q: Quantized, weights: list[Weight], want: Tensor) -> Work | str:
    """torch's own block-wise product, in whichever layout of scales it takes; or why it gives none."""
    scaling = getattr(F, "ScalingType", None)
    if scaling is None:
        return "this torch has none"
    reasons = []
    scales = [weight.scale for weight in weights if weight.scale is not None]
    orders = [[scale.t() for scale in scales], [scale.t().contiguous() for scale in scales], scales]
    for left in (q.scale.t().contiguous().t(), q.scale):
        for rights in orders:
            work = functools.partial(_scaled_mm, q.data, weights, left, rights, (scaling.BlockWise1x128, scaling.BlockWise128x128))
            try:
                fault = off(work(0), want, BOUNDS["linear"])
            except (RuntimeError, ValueError, TypeError) as error:
                fault = str(error).splitlines()[0][:160]
            if fault is None:
                return work
            reasons.append(fault)
    return "; ".join(dict.fromkeys(reasons))


def _scaled_mm(data: Tensor, weights: list[Weight], left: Tensor, rights: list[Tensor], kinds: tuple[Any, Any], i: int) -> Tensor:
    product: Any = F.scaled_mm
    out: Tensor = product(data, weights[i].data.t(), left, kinds[0], rights[i], kinds[1], output_dtype=torch.bfloat16)
    return out


def heads(tp: int) -> Iterator[Case]:
    height = VOCABULARY // tp
    weight = Weight(normal(height, HIDDEN).mul_(HIDDEN**-0.5).bfloat16())
    torchs, ours = block_gemm.prepare(weight), block_gemm.prepare(weight, invariant=True)
    for rows in (1, 16, 128):
        x_MK = normal(rows, HIDDEN, seed=1).bfloat16()
        want = x_MK.float() @ weight.data.float().T
        runs: dict[str, Work] = {
            "torch": functools.partial(alone, functools.partial(block_gemm.linear_or_torch, x_MK, torchs)),
            "invariant": functools.partial(alone, functools.partial(block_gemm.linear_or_torch, x_MK, ours)),
        }
        for variant, work in runs.items():
            row = {"kernel": "head", "name": "head", "tp": tp, "M": rows, "variant": variant}
            fault = functools.partial(check_twice, work, want, BOUNDS["head"])
            yield row, work, fault, 2.0 * height * HIDDEN, 2.0 * rows * height * HIDDEN


STEPS = {
    "decode 1": [(CONTEXT, 1)],
    "decode 16": [(CONTEXT, 1)] * 16,
    "decode 128": [(CONTEXT, 1)] * 128,
    "prefill 512": [(0, 512)],
    "prefill 512 after 4096": [(4096, 512)],
    "128 and a chunk of 384": [(CONTEXT, 1)] * 128 + [(512, 384)],
}


def attentions(tp: int) -> Iterator[Case]:
    shape = AttentionShape(HEADS // tp, KV_HEADS // tp, CHANNELS)
    for name, lanes in STEPS.items():
        for dtype in (torch.bfloat16, FP8):
            most = -(-max(past + new for past, new in lanes) // PAGE)
            used = most * len(lanes)
            size = (used, shape.num_kv_heads, PAGE, CHANNELS)
            caches = [(normal(*size, seed=2 * copy).to(dtype), normal(*size, seed=2 * copy + 1).to(dtype)) for copy in range(COPIES)]
            table = torch.randperm(used, generator=torch.Generator().manual_seed(1)).view(len(lanes), most).int().to(DEVICE)
            spans: list[Span] = []
            positions: list[int] = []
            for lane, (past, new) in enumerate(lanes):
                spans.append(Span(lane, len(positions), new))
                positions += range(past, past + new)
            positions_T = torch.tensor(positions, device=DEVICE)
            q_TQC = normal(len(positions), shape.num_heads, CHANNELS, seed=77).bfloat16()
            heads_bytes = 2 * shape.num_kv_heads * CHANNELS * dtype.itemsize
            moved = sum(past + new for past, new in lanes) * heads_bytes + 4 * q_TQC.numel()
            pairs = sum(new * past + new * (new + 1) / 2 for past, new in lanes)
            want = reference.attention(q_TQC, *caches[0], spans, positions_T, table, CHANNELS**-0.5)
            for variant in ("ours", "invariant", "ours, quantizing"):
                tiles = paged_attention.plan(spans, len(positions), shape, DEVICE, uniform=variant == "invariant")
                run = paged_attention.attention_quantize if "quantizing" in variant else paged_attention.attention
                work = functools.partial(attend, run, q_TQC, caches, tiles, positions_T, table)
                row = {"kernel": "attention", "name": name, "tp": tp, "M": len(positions), "variant": variant, "cache": str(dtype)[6:]}
                row["splits"] = tiles.num_splits
                yield row, work, functools.partial(check_attention, work, want), moved, 4 * pairs * shape.num_heads * CHANNELS


def attend(run: Any, q_TQC: Tensor, caches: list[tuple[Tensor, Tensor]], tiles: Any, positions_T: Tensor, table: Tensor, i: int) -> Any:
    return run(q_TQC, *caches[i], tiles, positions_T, table, CHANNELS**-0.5)


def check_attention(work: Work, want: Tensor) -> str | None:
    got = work(0)
    if isinstance(got, Quantized):
        plain = (got.data.float().view(*want.shape) * got.scale[..., None]).to(want.dtype)
        return off(plain, want, 0.04)  # e4m3 keeps three bits
    return off(got, want, BOUNDS["attention"]) or (None if torch.equal(got, work(0)) else "a second run gave other bits")


def glue(tp: int) -> Iterator[Case]:
    num_heads, kv_heads = HEADS // tp, KV_HEADS // tp
    norms = normal(num_heads * CHANNELS).bfloat16(), normal(kv_heads * CHANNELS).bfloat16()
    weight_D = normal(HIDDEN).bfloat16()
    for rows in (1, 16, 128, 1024):
        x, delta = normal(rows, HIDDEN).bfloat16(), normal(rows, HIDDEN, seed=1).bfloat16()
        want = reference.rms_norm(x + delta, weight_D, 1e-6)
        for quantize in (False, True):
            row = {"kernel": "glue", "name": f"sum and norm{', quantizing' if quantize else ''}", "tp": tp, "M": rows, "variant": "ours"}
            norm = functools.partial(norm_quant.norm, x, delta, weight_D, 1e-6, quantize)
            moved = rows * HIDDEN * (7.0 if quantize else 8.0)
            yield row, functools.partial(alone, norm), functools.partial(check_norm, norm, want), moved, 0.0
        qkv_TN = normal(rows, (num_heads + 2 * kv_heads) * CHANNELS).bfloat16()
        k = torch.zeros(1024, kv_heads, PAGE, CHANNELS, dtype=torch.bfloat16, device=DEVICE)
        pages, others = (k, torch.zeros_like(k)), (torch.zeros_like(k), torch.zeros_like(k))
        slots_T = torch.randperm(1024 * PAGE, device=DEVICE)[:rows]
        cos, sin = reference.rotary_angles(slots_T, CHANNELS // 2, 5e6)
        run = functools.partial(qkv_post, qkv_TN, *norms, 1e-6, cos, sin, *pages, slots_T)
        want = reference.qkv_post(qkv_TN, *norms, 1e-6, cos, sin, *others, slots_T)
        row = {"kernel": "glue", "name": "qkv_post", "tp": tp, "M": rows, "variant": "ours"}
        yield row, functools.partial(alone, run), functools.partial(check_post, run, want, pages, others), 4.0 * qkv_TN.numel(), 0.0


def check_norm(run: Callable[[], Any], want: Tensor) -> str | None:
    _, got = run()
    if isinstance(got, Quantized):
        return off((got.data.float().view(len(want), -1, 128) * got.scale[..., None]).view(want.shape), want, 0.04)
    return off(got, want, 1e-3)


def check_post(run: Callable[[], Tensor], want: Tensor, pages: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> str | None:
    return off(run(), want, 1e-3) or off(pages[0], others[0], 1e-3) or off(pages[1], others[1], 1e-9)


KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "top_k 40, top_p 0.95": SamplingParams(temperature=1.0, top_k=40, top_p=0.95),
    "all tokens": SamplingParams(temperature=1.0),
    "top_p 0.95": SamplingParams(temperature=1.0, top_p=0.95),
}


def sampling(tp: int) -> Iterator[Case]:
    for rows in (1, 16, 128):
        logits_RV = normal(rows, VOCABULARY, seed=rows) * 3
        for name, kind in KINDS.items():
            number = functools.partial(torch.full, (rows,), dtype=torch.float64, device=DEVICE)
            whole = torch.arange(rows, device=DEVICE)
            top_k = torch.full((rows,), 1 if kind.greedy else kind.top_k, dtype=torch.int32, device=DEVICE)
            given = RowSampling(whole, top_k, number(kind.temperature or 1.0), number(kind.top_p), number(kind.min_p), whole + 5, whole * 3)
            few = kind.greedy or kind.top_k > 0
            for score in (False, True):
                run = functools.partial(draw, logits_RV, given, few=few, whole=not few, nucleus=kind.top_p < 1 and not few, score=score)
                row = {"kernel": "sampling", "name": name, "tp": tp, "M": rows, "variant": "scored" if score else "token"}
                check = functools.partial(check_tokens, run, logits_RV, kind)
                yield row, functools.partial(alone, run), check, 4.0 * logits_RV.numel(), 0.0


def check_tokens(run: Callable[[], Any], logits_RV: Tensor, kind: SamplingParams) -> str | None:
    got = run().token_B.tolist()
    for row in range(min(len(got), 16)):
        row_V = logits_RV[row].cpu().numpy()
        chance = uniform(round_keys(row + 5), row * 3)
        want = int(row_V.argmax()) if kind.greedy else pick(*kept(row_V, kind), chance)
        if got[row] != want:
            return f"row {row} drew {got[row]}, the host {want}"
    return None


PARTS: dict[str, Callable[[int], Iterator[Case]]] = {
    "linear": linears,
    "head": heads,
    "attention": attentions,
    "glue": glue,
    "sampling": sampling,
}


def measure(case: Case, ceilings: dict[str, float]) -> Row:
    row, work, check, moved, operations = case
    if (fault := check()) is not None:
        return row | {"fault": fault}
    seconds = time_graph(lambda: [work(i) for i in range(COPIES)]) / COPIES
    found = row | {"us": round(1e6 * seconds, 2), "bytes": int(moved)}
    found["read_fraction"] = round(moved / seconds / (1e9 * ceilings["read_gb_s"]), 4)
    if operations:
        found["tflops"] = round(operations / seconds / 1e12, 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tp", nargs="+", type=int, choices=(1, 2, 4), default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warm", action="store_true", help="run every check, time nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these kernels need a CUDA device, and torch sees none")
    rows: list[Row] = []
    ceilings = {} if options.warm else measure_ceilings(DEVICE)
    for name in options.only:
        for tp in options.tp if name != "sampling" else options.tp[:1]:
            for case in PARTS[name](tp):
                if options.warm:
                    case[2]()
                    continue
                rows.append(measure(case, ceilings))
                print(" ".join(str(value) for value in rows[-1].values()), file=sys.stderr, flush=True)
    summary = {"bench": "dense kernels", "device": torch.cuda.get_device_name(DEVICE), **ceilings, "rows": rows, **versions()}
    if options.json is not None:
        options.json.write_text(json.dumps(summary, allow_nan=False))
    print(json.dumps({key: value for key, value in summary.items() if key != "rows"} | {"faults": [row for row in rows if "fault" in row]}))
    return 1 if any("fault" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
