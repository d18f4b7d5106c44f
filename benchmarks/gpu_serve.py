"""The serving benchmark on several GPUs of one host, engine alone: MiniMax-M2.5's shape with dummy weights, in layers as many as fit.

    python -m benchmarks.gpu_serve [--gpus 2] [--layouts tp2 tp2+ep2] [--runner auto] [--concurrency 1 16 128]

Lengths are drawn as `bench serve --random-range-ratio 0.8` draws them, ids and tokens at random, and the end of a text does not end an
answer; requests are handed to the engine in this process, so what HTTP costs is not in the figures. Each layout with each runner is a
process of its own; `ready_s` goes from its start to the engine's. After the load come steps in which so many sequences decode, by kernel,
and each part of them against its floor: bytes that must be read over the bandwidth of a kernel that only reads, bytes that must cross
over NVLink's. Results go to benchmarks/results as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.gpu_engine import MINIMAX_M25, SCALED, measure_bandwidth, profile, step_reads
from pointsman import LLM, SamplingParams
from pointsman.bench.scaling.layouts import ATTENTION_BYTES, EXPERT_BYTES, EXPERTS, HIDDEN, KV_BYTES, TOP_K, VOCABULARY
from pointsman.bench.serving.datasets import random_lengths
from pointsman.bench.serving.metrics import summarize
from pointsman.bench.serving.query import Outcome, Query
from pointsman.bench.subject import machine
from pointsman.config import MOE_RUNNERS
from pointsman.engine.engine import Engine
from pointsman.request import Request

RESULTS = Path(__file__).parent / "results"
INPUT, OUTPUT, RATIO = 1024, 1024, 0.8
LINK = 450e9  # bytes a second that NVLink carries one way, by its data sheet
CONTEXT_ROOM = 1536  # tokens of cache for each sequence that runs at once
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
# the parts of a step, and how the names of their kernels begin
PARTS = {
    "experts": (
        *("up_kernel", "gemm_kernel", "wide_kernel", "vector_up", "vector_down", "fused_kernel"),
        *("arrange", "count_kernel", "place_kernel", "spread_kernel", "combine", "activate", "gated"),
    ),
    "router": ("gate_kernel", "choose", "route_few"),
    "linear": ("multiply", "dense_kernel", "vector_linear"),
    "attention": ("attend", "join"),
    "norm and sums": ("norm_kernel", "qkv_post", "all_reduce_kernel", "ncclDevKernel_AllReduce"),
    "head": ("nvjet", "ncclDevKernel_AllGather"),
}


def age() -> float:
    """Seconds since this process was started."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def layers_that_fit(gpus: int, most_at_once: int) -> int:
    """Of a device with the memory of this one."""
    _, total = torch.cuda.mem_get_info()
    layer = (EXPERTS * EXPERT_BYTES + ATTENTION_BYTES) * SCALED / gpus + 4 * EXPERTS * HIDDEN
    layer += most_at_once * CONTEXT_ROOM * (KV_BYTES / gpus + TOP_K)
    outside = 2 * VOCABULARY * HIDDEN * 2 + 5e9
    return min(62, int((0.92 * total - outside) / layer))


def queries_of(engine: Engine, count: int, output_len: int, seed: int) -> list[Query]:
    draws = Random(seed)
    ids = range(engine.architecture.vocab_size)
    lengths = random_lengths(draws, count, min(INPUT, engine.context_length - output_len), output_len, RATIO)
    return [Query(ids=tuple(draws.choices(ids, k=length)), input_len=length, output_len=output) for length, output in lengths]


def serve(engine: Engine, queries: Sequence[Query], concurrency: int, *, capture: bool) -> tuple[list[Outcome], float]:
    """Hand the queries in, so many at once, until all are answered; what came of each, and the seconds it took."""
    outcomes = [Outcome(query=query) for query in queries]
    waiting, running = deque(range(len(queries))), 0
    begin = time.perf_counter()
    while waiting or running:
        while waiting and running < concurrency:
            number = waiting.popleft()
            query, outcomes[number].sent_s = queries[number], time.perf_counter() - begin
            params = SamplingParams(max_tokens=query.output_len, ignore_eos=True, temperature=1.0, return_routed_experts=capture)
            assert query.ids is not None
            engine.add(Request(rid=f"load-{number}", prompt_token_ids=query.ids, sampling=params))
            running += 1
        for delta in engine.step():
            outcome, now = outcomes[int(delta.rid.removeprefix("load-"))], time.perf_counter() - begin
            if delta.error is not None:
                raise SystemExit(f"a request failed: {delta.error}")
            if delta.token_ids:
                outcome.piece_s.append(now)
                outcome.counted += len(delta.token_ids)
            if delta.finish_reason is not None:
                outcome.end_s, running = now, running - 1
                if capture:
                    rows = outcome.input_len + outcome.counted - 1
                    assert len(delta.routed_experts) == rows and not delta.routed_experts_missing
    return outcomes, time.perf_counter() - begin


def row_of(engine: Engine, args: argparse.Namespace, concurrency: int, count: int, output_len: int, *, capture: bool) -> dict[str, Any]:
    warm = queries_of(engine, min(concurrency, count), 16, seed=10_000 + concurrency)
    serve(engine, warm, concurrency, capture=capture)
    outcomes, seconds = serve(engine, queries_of(engine, count, output_len, concurrency), concurrency, capture=capture)
    figures = summarize(outcomes, seconds)
    row = {
        "engine": "pointsman",
        "layout": args.layout,
        "runner": engine.choices["moe_runner_backend"],
        "capture": capture,
        "concurrency": concurrency,
        "requests": count,
        "input_len": INPUT,
        "output_len": output_len,
        "duration_s": round(seconds, 2),
        "preemptions": engine.num_preemptions,
        "output_tok_s": round(figures["output_throughput"], 1),
    }
    for metric in ("ttft", "tpot", "itl"):
        for figure in ("mean", "median", "p99"):
            row[f"{figure}_{metric}_ms"] = round(figures[f"{figure}_{metric}_ms"], 3)
    print(json.dumps(row), flush=True)
    return row


def floors(layers: int, gpus: int, batch: int, context: int, bandwidth: float) -> dict[str, float]:
    """Microseconds that each part of a decode step takes at least on each of so many GPUs, when experts are used evenly."""
    found = {
        part: 1e6 * number / bandwidth / (1 if part == "router" else gpus) for part, number in step_reads(batch, layers, context).items()
    }
    crossing = 2 * batch * HIDDEN * 2 + 2 * batch * 4
    found["norm and sums"] = layers * 1e6 * crossing / LINK if gpus > 1 else 0.0
    return found


def part_of(name: str) -> str:
    """The part of a step that a kernel of this name belongs to."""
    return next((part for part, names in PARTS.items() if name.startswith(names)), "rest")


def against_floors(profiled: dict[str, Any], least: dict[str, float]) -> list[dict[str, Any]]:
    """Each part of a profiled step: its kernels' time, its floor, and what it loses. Kernels that begin early count their waiting too."""
    spent = dict.fromkeys([*PARTS, "rest"], 0.0)
    for kernel in profiled["kernels"]:
        spent[part_of(kernel["name"])] += kernel["us"]
    rows: list[dict[str, Any]] = [{"part": part, "us": us, "floor_us": least.get(part, 0.0)} for part, us in spent.items()]
    print(f"{'part':<16}{'us':>10}{'floor':>10}{'over':>10}")
    for row in rows:
        print(f"{row['part']:<16}{row['us']:>10.0f}{row['floor_us']:>10.0f}{row['us'] - row['floor_us']:>10.0f}")
    print(f"{'step':<16}{profiled['step_us']:>10.0f}{sum(least.values()):>10.0f}", flush=True)
    return [{name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()} for row in rows]


def one(args: argparse.Namespace) -> None:
    """One layout, in this process."""
    tp, _, ep = args.layout.removeprefix("tp").partition("+ep")
    most = max(args.concurrency)
    cuda = args.device == "cuda"
    layers = args.layers or layers_that_fit(int(tp), most)
    config = MINIMAX_M25 | (SMALL if args.small else {}) | {"num_hidden_layers": layers, "attn_type_list": [1] * layers}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            folder,
            load_format="dummy",
            served_model_name=f"minimax-m2.5-shape, {layers} layers" + (", small" if args.small else ""),
            device=args.device,
            progress=False,
            tp=int(tp),
            ep=int(ep or 1),
            kv_cache_dtype="fp8_e4m3" if cuda else "auto",
            moe_runner_backend=args.runner[0],
            max_running_requests=most,
            max_total_tokens=max(most * CONTEXT_ROOM, 4096),
            context_length=4096,
            disable_cuda_graph=args.eager,
            **({} if cuda else {"cpu_step": "torch"}),
        )
        ready = age()
    with contextlib.closing(llm):
        found: dict[str, Any] = {"layout": args.layout, "layers": layers, "ready_s": round(ready, 1)} | machine(llm.engine)
        found |= {"rows": [], "profile": {}}
        print(json.dumps(found), flush=True)
        keep(args, found)
        for concurrency, count, output_len in zip(args.concurrency, args.requests, args.output_len, strict=True):
            for capture in (False, True) if concurrency == most and args.capture else (False,):
                found["rows"].append(row_of(llm.engine, args, concurrency, count, output_len, capture=capture))
                keep(args, found)
        if not cuda or args.no_profile:
            return
        found["read_bandwidth"] = bandwidth = measure_bandwidth()
        for concurrency in args.concurrency:
            profiled = profile(llm.engine, concurrency)
            least = floors(layers, int(tp), concurrency, 32, bandwidth)
            found["profile"][concurrency] = profiled | {"parts": against_floors(profiled, least), "floor_us": round(sum(least.values()), 1)}
            keep(args, found)


def keep(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Put what has been measured so far of a layout beside the others."""
    path = Path(args.out)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    name = args.layout if args.runner == ["auto"] else f"{args.layout} {args.runner[0]}"
    path.write_text(json.dumps(kept | {name: result}, indent=1) + "\n")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layouts", nargs="*", help="default: tpN and tpN+epN of the GPUs")
    parser.add_argument(
        "--runner", nargs="+", default=["auto"], choices=MOE_RUNNERS, help="what runs the experts; several, one after the other"
    )
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 16, 128])
    parser.add_argument("--requests", type=int, nargs="*", default=[4, 64, 512], help="one number for each concurrency")
    parser.add_argument("--output-len", type=int, nargs="*", default=[256, 512, 1024], help="one number for each concurrency")
    parser.add_argument("--layers", type=int, help="layers of the cut model (default: what fits)")
    parser.add_argument(
        "--capture", action="store_true", help="the largest concurrency once more, with the routing of each request returned"
    )
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this script")
    parser.add_argument("--small", action="store_true", help="a small model in the other's place: to try this script")
    parser.add_argument("--out", help="file for the result (default: in benchmarks/results)")
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if not len(args.concurrency) == len(args.requests) == len(args.output_len):
        parser.error("--concurrency, --requests and --output-len need as many numbers each")
    if args.layout:
        logging.basicConfig(level="INFO", format="%(relativeCreated)6.0f ms %(message)s")
        one(args)
        return 0
    card = torch.cuda.get_device_name().split()[1].lower() if args.device == "cuda" else "cpu"
    out = args.out or str(RESULTS / f"serve_{args.gpus}x{card}.json")
    layouts = args.layouts or [f"tp{args.gpus}", f"tp{args.gpus}+ep{args.gpus}"]
    return max(
        subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_serve", *words, "--out", out, "--layout", layout, "--runner", runner], check=False
        ).returncode
        for layout in layouts
        for runner in args.runner
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
