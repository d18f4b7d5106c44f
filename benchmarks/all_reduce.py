"""Sums over the GPUs of one host, measured there: right first, then timed beside NCCL's, alone and joined with what follows.

    python benchmarks/all_reduce.py [--gpus 2]

Every rank is a process with a GPU of its own. Right means: in CUDA graphs that are replayed many times with numbers that change each
time, while ranks are held up at random, each result has the bits of the float32 sum by rank, on all ranks. Times are those of calls
in a graph, the median over replays; the slowest rank counts. Results go to benchmarks/results.

Shape suffixes: R ranks, T rows, D columns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from pointsman.bench.machine import here
from pointsman.distributed import Mesh
from pointsman.kernels import mailbox, norm_quant, reference
from pointsman.kernels.mailbox import Mailbox
from pointsman.kernels.qkv_post import qkv_post
from pointsman.kernels.weight import FP8, Quantized
from pointsman.layers.mailboxes import mailboxes_of, with_mailboxes

RESULTS = Path(__file__).parent / "results"
HIDDEN, HEADS, KV_HEADS, CHANNELS, ROTARY = 3072, 48, 8, 128, 64
RIGHT_ROWS = (1, 2, 3, 16, 64, 129, 512, 1024)
TIMED_ROWS = (1, 4, 16, 64, 128, 256, 384, 512, 1024, 2048)
CALLS, REPLAYS = 20, 15
EPSILON = 1e-6


class Rank:
    """What one process has."""

    def __init__(self, rank: int, num_ranks: int, port: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.plain = Mesh.connect(tp=num_ranks, ep=1, rank=rank, address="127.0.0.1", port=port, device=self.device)
        begin = time.perf_counter()
        found = mailboxes_of(with_mailboxes(self.plain, HIDDEN))
        if found is None:
            raise SystemExit("no memory that all GPUs reach; the log says why")
        self.rows, self.squares, self.exchange = found.rows, found.squares, found
        self.seconds = time.perf_counter() - begin

    def say_together(self) -> None:
        torch.cuda.synchronize()
        self.plain.all_gather(torch.zeros(1, device=self.device)).tolist()

    def everyone(self, value: float) -> list[float]:
        return [float(number) for number in self.plain.all_gather(torch.tensor([value], dtype=torch.float64, device=self.device))]

    def normal(self, *size: int, seed: int) -> Tensor:
        return torch.randn(size, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)


def captured(calls: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        calls()
    return graph


def differing(one: Tensor, other: Tensor) -> Tensor:
    """How many numbers have other bits; zeros of either sign count as one."""
    return (one.view(torch.uint8) != other.view(torch.uint8)).sum() if one.dtype == FP8 else (one != other).sum()


def check_sums(rank: Rank, replays: int, wrong: Tensor) -> int:
    """Sums, alone and in norms, against the sum by rank and the norm of it; how many were compared."""
    turn = torch.zeros(1, device=rank.device)
    weight_D = rank.normal(HIDDEN, seed=99).bfloat16()
    sizes = [rows for rows in RIGHT_ROWS if rows <= rank.rows.num_rows]
    parts = {rows: [rank.normal(rows, HIDDEN, seed=1000 * rows + other) for other in range(rank.num_ranks)] for rows in sizes}
    residuals = {rows: rank.normal(rows, HIDDEN, seed=rows).bfloat16() for rows in sizes}

    def one_round() -> None:
        turn.add_(1).remainder_(61)
        for rows, every in parts.items():
            now = [(part * (turn + 0.37)).bfloat16() for part in every]
            want_TD = now[0].float()
            for part in now[1:]:
                want_TD = want_TD + part.float()
            want_TD = want_TD.bfloat16()
            wrong.add_(differing(mailbox.all_reduce(now[rank.rank], rank.rows), want_TD))
            added_TD, normed_TD = norm_quant.norm(residuals[rows], want_TD, weight_D, EPSILON)
            got_added, got_normed = norm_quant.norm(residuals[rows], now[rank.rank], weight_D, EPSILON, mailbox=rank.rows)
            assert isinstance(normed_TD, Tensor) and isinstance(got_normed, Tensor)
            wrong.add_(differing(got_added, added_TD)).add_(differing(got_normed, normed_TD))
            _, quantized = norm_quant.norm(residuals[rows], want_TD, weight_D, EPSILON, quantize=True)
            _, got = norm_quant.norm(residuals[rows], now[rank.rank], weight_D, EPSILON, quantize=True, mailbox=rank.rows)
            assert isinstance(quantized, Quantized) and isinstance(got, Quantized)
            wrong.add_(differing(got.data, quantized.data)).add_(differing(got.scale, quantized.scale))

    graph = captured(one_round)
    delays = random.Random(rank.rank)
    for index in range(replays):
        if index % 3 == rank.rank % 3:
            torch.cuda._sleep(delays.randrange(200_000))  # type: ignore[no-untyped-call]
        if index % 10 == 0:
            one_round()  # launched one by one, between replays
        graph.replay()
    torch.cuda.synchronize()
    return (replays + 2) * len(sizes) * 3


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


class Heads:
    """The joined projection's rows of all ranks, and this rank's share."""

    def __init__(self, rank: Rank, rows: int) -> None:
        n = rank.num_ranks
        self.all_q = rank.normal(rows, HEADS, CHANNELS, seed=1).bfloat16()
        self.all_k = rank.normal(rows, KV_HEADS, CHANNELS, seed=2).bfloat16()
        self.all_v = rank.normal(rows, KV_HEADS, CHANNELS, seed=3).bfloat16()
        self.q_weight, self.k_weight = rank.normal(HEADS, CHANNELS, seed=4).bfloat16(), rank.normal(KV_HEADS, CHANNELS, seed=5).bfloat16()
        self.angles = reference.rotary_angles(torch.arange(rows, device=rank.device) * 97, ROTARY, 5e6)
        self.slots = torch.arange(rows, device=rank.device)
        self.pages = (rows + 15) // 16
        self.mine = slice(rank.rank * HEADS // n, (rank.rank + 1) * HEADS // n)
        self.mine_kv = slice(rank.rank * KV_HEADS // n, (rank.rank + 1) * KV_HEADS // n)
        parts = (self.all_q[:, self.mine], self.all_k[:, self.mine_kv], self.all_v[:, self.mine_kv])
        self.joined = torch.cat([part.flatten(1) for part in parts], dim=1).contiguous()
        self.weights = self.q_weight[self.mine].flatten().contiguous(), self.k_weight[self.mine_kv].flatten().contiguous()
        self.k, self.v = (torch.zeros(self.pages, KV_HEADS // n, 16, CHANNELS, device=rank.device).bfloat16() for _ in range(2))

    def post(self, box: Mailbox | None) -> Tensor:
        return qkv_post(self.joined, *self.weights, EPSILON, *self.angles, self.k, self.v, self.slots, box)

    def worst(self, got_TQC: Tensor) -> float:
        """How far q and k are from the reference over all heads, as a share of the largest number."""
        k, v = (torch.zeros(self.pages, KV_HEADS, 16, CHANNELS, device=self.k.device).bfloat16() for _ in range(2))
        joined = torch.cat([self.all_q.flatten(1), self.all_k.flatten(1), self.all_v.flatten(1)], dim=1)
        want = reference.qkv_post(joined, self.q_weight.flatten(), self.k_weight.flatten(), EPSILON, *self.angles, k, v, self.slots)
        return max(distance(got_TQC, want[:, self.mine]), distance(self.k, k[:, self.mine_kv]))


def check_heads(rank: Rank, replays: int) -> dict[str, float]:
    """The q and k norms over all ranks' heads: distance to the reference, and numbers that ever changed."""
    heads = Heads(rank, 128)
    first = heads.post(rank.squares)
    worst, changed = heads.worst(first), torch.zeros(1, dtype=torch.int64, device=rank.device)

    def one_round() -> None:
        changed.add_(differing(heads.post(rank.squares), first))

    graph = captured(one_round)
    for _ in range(replays):
        graph.replay()
    return {"worst": worst, "changed": float(changed)}


def microseconds(rank: Rank, call: Callable[[], Any]) -> float:
    """One call's time in a graph of many, the slowest rank's."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    graph = captured(calls)
    times = []
    for _ in range(REPLAYS):
        rank.say_together()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        graph.replay()  # brings the ranks together on the device
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(1000 * events[0].elapsed_time(events[1]) / CALLS)
    return round(max(rank.everyone(statistics.median(times))), 2)


def timed(rank: Rank, rows: int) -> dict[str, Any]:
    """Microseconds for so many rows: the sum alone, then with residual, norm and quantization, then q/k norm and cache."""
    x_TD, residual_TD, weight_D = (rank.normal(*size, seed=7).bfloat16() for size in ((rows, HIDDEN), (rows, HIDDEN), (HIDDEN,)))
    heads = Heads(rank, rows)

    def summed_then_normed() -> None:
        rank.plain.all_reduce(x_TD)
        norm_quant.norm(residual_TD, x_TD, weight_D, EPSILON, quantize=True)

    def squares_by_nccl() -> None:
        rank.plain.all_reduce(squares_T2)
        heads.post(None)

    squares_T2 = torch.ones(rows, 2, device=rank.device)
    ways: dict[str, Callable[[], Any]] = {
        "nccl": lambda: rank.plain.all_reduce(x_TD),
        "mailbox": lambda: mailbox.all_reduce(x_TD, rank.rows),
        "norm alone": lambda: norm_quant.norm(residual_TD, x_TD, weight_D, EPSILON, quantize=True),
        "nccl, then norm": summed_then_normed,
        "norm with mailbox": lambda: norm_quant.norm(residual_TD, x_TD, weight_D, EPSILON, quantize=True, mailbox=rank.rows),
        "qkv_post alone": lambda: heads.post(None),
        "qkv_post and nccl": squares_by_nccl,
        "qkv_post with mailbox": lambda: heads.post(rank.squares),
    }
    return {"rows": rows, "bytes": rows * HIDDEN * 2} | {name: microseconds(rank, way) for name, way in ways.items()}


def member(args: argparse.Namespace) -> None:
    rank = Rank(args.rank, args.gpus, args.port)
    versions = here() | {"triton": triton.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    result: dict[str, Any] = versions | {"gpus": args.gpus, "hidden": HIDDEN, "mailboxes_s": round(rank.seconds, 2)}
    wrong = torch.zeros(1, dtype=torch.int64, device=rank.device)
    with torch.inference_mode():
        compared = check_sums(rank, args.replays, wrong)
        result["sums"] = {"compared": compared, "wrong_numbers": sum(rank.everyone(float(wrong)))}
        heads = check_heads(rank, args.replays)
        result["heads"] = {name: max(rank.everyone(value)) for name, value in heads.items()}
        report(rank, args, result)
        if result["sums"]["wrong_numbers"] or result["heads"]["changed"] or result["heads"]["worst"] > 2**-6:
            raise SystemExit("results differ: nothing is timed")
        result["rows"] = []
        for rows in (rows for rows in TIMED_ROWS if rows <= rank.rows.num_rows):
            result["rows"].append(timed(rank, rows))
            report(rank, args, result)
    rank.say_together()
    os._exit(0)  # nothing of torch's is worth an orderly end


def report(rank: Rank, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    if rank.rank:
        return
    print(json.dumps(result["rows"][-1] if result.get("rows") else result), flush=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


def start(args: argparse.Namespace) -> int:
    """Run a process for each rank; the first that fails ends the others."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    card = torch.cuda.get_device_name().split()[1].lower()
    out = args.out or str(RESULTS / f"allreduce_{args.gpus}x{card}.json")
    command = [sys.executable, __file__, "--gpus", str(args.gpus), "--replays", str(args.replays), "--port", str(port), "--out", out]
    members = [subprocess.Popen([*command, "--rank", str(rank)], env=os.environ | {"NCCL_NVLS_ENABLE": "0"}) for rank in range(args.gpus)]
    try:
        while any(member.poll() is None for member in members):
            if any(member.poll() for member in members):
                return 1
            time.sleep(0.1)
        return max(member.returncode for member in members)
    finally:
        for member in members:
            member.kill()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--replays", type=int, default=300, help="of the graphs whose results are compared")
    parser.add_argument("--out", help="file for the result (default: in benchmarks/results)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.rank is None:
        return start(args)
    logging.basicConfig(level="INFO")
    member(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
