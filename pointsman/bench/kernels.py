"""The experts' kernels of one layer of MiniMax-M2.5 against what the memory allows: router to sum, every runner, every size.

A time is reported only behind a check of the same call: its experts must be the best by float64 scores, and its output must agree
with the numerics of `kernels.reference` computed in float64. Times are of CUDA graphs that run the block over several batches, one
after another, so that each finds other experts in use and none finds its weights in the cache.

What a block has to move is counted from the routing that ran: the weights of the experts in use, and activations once each. The share
of the read bandwidth is that over time, against a kernel on the same card that only reads.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pointsman.bench.expert_layer import Layer, time_graph
from pointsman.bench.machine import here
from pointsman.bench.options import KernelsOptions
from pointsman.bench.plot import Line, Panel, chart
from pointsman.kernels import reference
from pointsman.kernels.capability import describe
from pointsman.kernels.library import FLASHINFER, installed
from pointsman.kernels.tiles import Shape
from pointsman.kernels.triton_support import reason_against
from pointsman.kernels.unsummed import summed
from pointsman.kernels.weight import FP8
from pointsman.moe.candidates import DEEP_GEMM, unsupported
from pointsman.moe.capture import RouteStore
from pointsman.moe.deep_gemm import DeepGemmRunner
from pointsman.moe.flashinfer import CutlassRunner, RoutedTrtllmRunner, TrtllmRunner
from pointsman.moe.fused import FusedRunner
from pointsman.moe.grouped import RoutedRunner, TritonRunner
from pointsman.moe.router import INVARIANT_ROUTERS, ROUTERS, RouterInput
from pointsman.moe.routing import Routing, route
from pointsman.moe.runner import AnyRunner, counter_for, route_and_run

MINIMAX = {tp: Shape(num_experts=256, top_k=8, hidden=3072, width=1536 // tp, quantized=True) for tp in (1, 2, 4)}
SIZES = tuple(2**power for power in range(14))
QUICK_SIZES = (1, 2, 8, 32, 128, 512, 2048, 8192)
NUM_BATCHES = 8
MANY_BLOCKS = 64  # of a graph: its start counts for little, as in a model of as many layers
CHECKED_TOKENS = 4
# Relative to the norm of the result. Hopper sums FP8 products with some 13 bits within a block of K, which moves some hidden numbers
# to the next bfloat16 and e4m3: 4e-3 to 6e-3 were seen. In `triton` what passes between kernels is rounded too: 15e-3.
BOUNDS = {"triton": 0.03, "routed": 0.01, "routed, deterministic": 0.01, "fused": 0.01, "deep_gemm": 0.03, "flashinfer_cutlass": 0.03}
# FlashInfer's kernels of Blackwell round gate and up to e4m3 besides
BOUNDS |= {f"{name}{layout}": 0.06 for name in ("flashinfer_trtllm_routed", "flashinfer_trtllm") for layout in ("", ", BlockMajorK")}
SCORE_ERROR = 1e-5


class Block:
    """Router and experts of one layer by one runner."""

    def __init__(self, layer: Layer, runner: AnyRunner, *, deterministic: bool = False) -> None:
        self._layer, self._runner = layer, runner
        self._weights = runner.prepare(layer.experts, torch.bfloat16)
        self._router = (INVARIANT_ROUTERS if deterministic else ROUTERS)["triton"]
        self._slots: dict[int, Tensor] = {}
        self._counter = counter_for(runner, layer.gate_ED.device)

    def route(self, x_TD: Tensor) -> Routing:
        """What is chosen for these rows: by the runner, where it does that itself."""
        rows = self._rows(x_TD)
        if isinstance(self._runner, FusedRunner):
            return self._runner.route_and_run(rows, self._layer.spec, self._weights)[1]
        if not self._runner.routes_itself:
            return self._router.run(rows, self._layer.spec)
        spec = self._layer.spec  # it tells experts, not their weights
        routes = RouteStore(len(x_TD), 1, spec.top_k, spec.num_experts, x_TD.device)
        self._runner(dataclasses.replace(rows, routes=routes), spec, self._weights)
        return route(reference.router_logits(x_TD, rows.gate_ED), spec, ids_TK=routes.rows_SLK[:, 0].long())

    def _rows(self, x_TD: Tensor) -> RouterInput:
        layer, num_tokens = self._layer, len(x_TD)
        if num_tokens not in self._slots:
            self._slots[num_tokens] = torch.arange(num_tokens, device=x_TD.device)
        return RouterInput(x_TD, layer.gate_ED, layer.bias_E, 0, self._slots[num_tokens], None, None, counter=self._counter)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return summed(route_and_run(self._rows(x_TD), self._layer.spec, self._router, self._runner, self._weights))


# what is measured, and what is told when it is made
CONTENDERS: dict[str, tuple[type[AnyRunner], dict[str, Any]]] = {
    "triton": (TritonRunner, {}),
    "routed": (RoutedRunner, {}),
    "routed, deterministic": (RoutedRunner, {"deterministic": True}),
    "fused": (FusedRunner, {}),
    "deep_gemm": (DeepGemmRunner, {}),
    "flashinfer_cutlass": (CutlassRunner, {}),
    "flashinfer_trtllm_routed": (RoutedTrtllmRunner, {}),
    "flashinfer_trtllm_routed, BlockMajorK": (RoutedTrtllmRunner, {"layout": "BlockMajorK"}),
    "flashinfer_trtllm": (TrtllmRunner, {}),
    "flashinfer_trtllm, BlockMajorK": (TrtllmRunner, {"layout": "BlockMajorK"}),
}


def blocks(layer: Layer, wanted: tuple[str, ...] = ()) -> dict[str, Block]:
    """The runners of these names, or every one that can serve on this card.

    Raises:
        ValueError: a name is unknown, or that runner or all of them cannot serve here.
    """
    device = describe(layer.gate_ED.device)
    if unknown := [name for name in wanted if name not in CONTENDERS]:
        raise ValueError(f"--runner is {unknown[0]!r}; it must be one of {', '.join(map(repr, CONTENDERS))}")
    found = {}
    for name in wanted or CONTENDERS:
        runner, options = CONTENDERS[name]
        why = unsupported(runner.name, layer.spec, layer.form, device, "bfloat16")
        if why is not None and (wanted or name == "triton"):
            raise ValueError(f"runner {name!r} cannot be measured here: {why}")
        if why is None:
            found[name] = Block(layer, runner(**options), deterministic=options.get("deterministic", False))
        else:
            print(f"runner {name!r} is left out: {why}", file=sys.stderr)
    return found


def run(engine: dict[str, Any], options: KernelsOptions) -> int:
    """`pointsman bench kernels`; 1 where a check fails."""
    logging.basicConfig(level=options.log_level.upper())
    device = torch.device("cuda")
    if (why := reason_against(describe(device), needs=(8, 9))) is not None:
        raise ValueError(f"the kernels cannot be measured here: {why}")
    ceilings = measure_ceilings(device)
    sizes = options.num_tokens or (QUICK_SIZES if options.quick else SIZES)
    rows: list[dict[str, Any]] = []
    faults = 0
    for tp in options.tp_sizes or ((1,) if options.quick else (1, 2, 4)):
        layer = Layer.draw(MINIMAX[tp], device, options.seed)
        table = blocks(layer, options.runner)
        print(heading(tp, table), flush=True)
        for num_tokens in sizes:
            found = list(measure_size(tp, layer, table, num_tokens, ceilings, options))
            faults += sum("us" not in row for row in found)
            rows += found
            print(line(num_tokens, found), flush=True)
        del layer, table
    summary = {"bench": "kernels", "device": torch.cuda.get_device_name(device), **ceilings, "read_bandwidth": 1e9 * ceilings["read_gb_s"]}
    summary |= {"rows": rows, **versions()}
    if options.plot is not None:
        Path(options.plot).write_text(draw(rows))
    print(json.dumps(summary, allow_nan=False))
    return 1 if faults else 0


def draw(rows: Iterable[dict[str, Any]]) -> str:
    """The share of the read bandwidth by tokens, a panel for each tp and a line for each runner, as SVG."""
    lines: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if "us" in row:
            lines.setdefault(row["tp"], {}).setdefault(row["runner"], []).append((row["M"], 100 * row["read_fraction"]))
    return chart(
        [
            Panel(
                title=f"experts of MiniMax-M2.5, tp {tp}",
                x="tokens",
                y="% of the read bandwidth",
                lines=[Line(name=name, points=points) for name, points in runners.items()],
                logarithmic=True,
            )
            for tp, runners in lines.items()
        ]
    )


def versions() -> dict[str, Any]:
    libraries = {names[0]: installed(names) for names in (FLASHINFER, DEEP_GEMM)}
    found = {name: version for name, version in libraries.items() if version is not None}
    return here() | {"triton": importlib.import_module("triton").__version__, "cuda": torch.version.cuda} | found


def measure_size(
    tp: int, layer: Layer, table: dict[str, Block], num_tokens: int, ceilings: dict[str, float], options: KernelsOptions
) -> Iterable[dict[str, Any]]:
    """One row for each runner."""
    generator = torch.Generator(layer.gate_ED.device).manual_seed(options.seed + num_tokens)
    batches = [
        torch.randn(num_tokens, layer.shape.hidden, generator=generator, device=layer.gate_ED.device).bfloat16() for _ in range(NUM_BATCHES)
    ]
    for name, block in table.items():
        row: dict[str, Any] = {"M": num_tokens, "tp": tp, "runner": name}
        fault, error = check(layer, block, batches[0], BOUNDS[name])
        row["error"] = round(error, 6)
        if fault is not None:
            print(f"M={num_tokens} tp={tp} {name}: {fault}; no time is reported", file=sys.stderr)
            yield row | {"fault": fault}
            continue
        used = statistics.mean(len(torch.unique(block.route(x_TD).ids_TK)) for x_TD in batches)
        rounds = MANY_BLOCKS // NUM_BATCHES if num_tokens <= 256 else 1
        work = functools.partial(run_all, block, batches * rounds)
        seconds = time_graph(work) / (NUM_BATCHES * rounds)
        moved = block_bytes(layer.shape, num_tokens, used)
        flops = 2 * layer.shape.top_k * num_tokens * 3 * layer.shape.hidden * layer.shape.width
        yield row | {
            "us": round(1e6 * seconds, 2),
            "experts": round(used, 1),
            "bytes": round(moved),
            "read_fraction": round(moved / seconds / (1e9 * ceilings["read_gb_s"]), 4),
            "tflops": round(flops / seconds / 1e12, 1),
        }


def run_all(block: Block, batches: list[Tensor]) -> None:
    for x_TD in batches:
        block(x_TD)


def block_bytes(shape: Shape, num_tokens: int, num_used: float) -> float:
    """The least that the block moves: gate, FP8 experts in use, activations in and out, hidden rows out and in as FP8."""
    hidden, width = shape.hidden, shape.width
    weights = num_used * 3 * hidden * width * (1 + 4 / 128**2)
    hidden_rows = num_tokens * shape.top_k * width * (1 + 4 / 128)
    return weights + 4 * shape.num_experts * hidden + num_tokens * hidden * (2 + 2) + 2 * hidden_rows


def check(layer: Layer, block: Block, x_TD: Tensor, bound: float) -> tuple[str | None, float]:
    """What is wrong with a block's result, or None, and its distance from the oracle's over some tokens."""
    out_TD = torch.full_like(x_TD, float("nan"))
    out_TD.copy_(block(x_TD))
    chosen = block.route(x_TD)
    if (fault := check_choice(layer, x_TD, chosen)) is not None:
        return fault, float("nan")
    tokens = torch.unique(torch.linspace(0, len(x_TD) - 1, CHECKED_TOKENS).round().long()).to(x_TD.device)
    want = torch.stack([oracle(layer, x_TD[token], chosen.ids_TK[token], chosen.weights_TK[token]) for token in tokens])
    error = float((out_TD[tokens].double() - want).norm() / want.norm())
    if not torch.isfinite(out_TD).all():
        return "its result has numbers that are not finite", error
    if not error < bound:
        return f"its result is {error:.5f} off the reference where {bound} is allowed", error
    if not torch.equal(out_TD, block(x_TD)):
        return "a second run gave other bits", error
    return None, error


def check_choice(layer: Layer, x_TD: Tensor, chosen: Routing) -> str | None:
    """No expert left out may be better, by float64 scores, than one chosen; and the weights are the scores, normed."""
    for first in range(0, len(x_TD), 1024):
        part = slice(first, first + 1024)
        score_TE = (x_TD[part].double() @ layer.gate_ED.double().T).sigmoid()
        biased_TE = score_TE + layer.bias_E.double()
        ids_TK = chosen.ids_TK[part].long()
        if int(ids_TK.min()) < 0 or int(ids_TK.max()) >= layer.shape.num_experts:
            return "it chose experts that do not exist"
        worst_T = biased_TE.gather(1, ids_TK).min(1).values
        left_T = biased_TE.scatter(1, ids_TK, float("-inf")).max(1).values
        if not (left_T <= worst_T + SCORE_ERROR).all():
            return "it left out an expert better than one it chose"
        weights_TK = score_TE.gather(1, ids_TK)
        weights_TK /= weights_TK.sum(1, keepdim=True)
        if not torch.allclose(weights_TK, chosen.weights_TK[part].double(), atol=SCORE_ERROR, rtol=0):
            return "its weights are not the scores of its experts"
    return None


def oracle(layer: Layer, x_D: Tensor, ids_K: Tensor, weights_K: Tensor) -> Tensor:
    """A token's weighted sum in float64, rounded where the reference rounds, [D]."""
    out_D = torch.zeros(layer.shape.hidden, dtype=torch.float64, device=x_D.device)
    rounded = dequantized if layer.shape.quantized else Tensor.double
    x_D = rounded(x_D)
    for expert, weight in zip(ids_K.tolist(), weights_K.tolist(), strict=True):
        gate, up = (layer.experts.gate_up[expert].dequantize(torch.float64) @ x_D).chunk(2)
        hidden_F = rounded((gate * gate.sigmoid() * up).bfloat16())
        out_D += weight * (layer.experts.down[expert].dequantize(torch.float64) @ hidden_F)
    return out_D


def dequantized(x_D: Tensor) -> Tensor:
    """What quantization leaves of a row, in float64."""
    q_TD, scale_TG = reference.quantize_activation(x_D.unsqueeze(0))
    return (q_TD.double().view(-1, 128) * scale_TG.double().view(-1, 1)).flatten()


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a kernel that only reads and of a copy (both ways counted), and TFLOP/s of a large FP8 product of the library."""
    bandwidth = importlib.import_module("pointsman.bench.bandwidth")
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / time_graph(functools.partial(bandwidth.read, source))
    copy = 2 * source.nbytes / time_graph(functools.partial(target.copy_, source))
    a, b = (torch.randn(8192, 8192, device=device).to(FP8) for _ in range(2))
    one = torch.ones(1, device=device)
    seconds = time_graph(lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
    return {"read_gb_s": round(read / 1e9, 1), "copy_gb_s": round(copy / 1e9, 1), "fp8_tflops": round(2 * 8192**3 / seconds / 1e12, 1)}


def heading(tp: int, names: Iterable[str]) -> str:
    return (
        f"\ntp {tp}{'':>4}"
        + "".join(f"{name:>32}" for name in names)
        + f"\n{'tokens':>8}"
        + f"{'us   share  TFLOP/s':>32}" * len(list(names))
    )


def line(num_tokens: int, rows: Iterable[dict[str, Any]]) -> str:
    cells = (f"{row['us']:.1f} {100 * row['read_fraction']:6.1f} % {row['tflops']:7.1f}" if "us" in row else "wrong" for row in rows)
    return f"{num_tokens:>8}" + "".join(f"{cell:>32}" for cell in cells)
