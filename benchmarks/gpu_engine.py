"""The engine on one GPU, measured there: the bundled checkpoint's answers, and the steps of a model of MiniMax-M2.5's shape.

    python benchmarks/gpu_engine.py cpu answers.json            on any machine: the CPU's answers, for the comparison
    python benchmarks/gpu_engine.py answers --cpu answers.json  accuracy, the share of tokens alike, graphs and none, deterministic
    python benchmarks/gpu_engine.py speed                       start-up, graphs, step times against their floor, profile by kernel

The model is cut to the layers that fit and has dummy weights, which route evenly: the worst case for the bytes of a step. A floor is
the bytes that a step must read, over the bandwidth that a kernel reaches which only reads. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pointsman import LLM, RequestOutput, SamplingParams
from pointsman.bench.accuracy import ARITHMETIC, held_out
from pointsman.bench.bandwidth import BLOCK, read
from pointsman.bench.latency import time_batch
from pointsman.bench.scaling.layouts import ATTENTION_BYTES, EXPERT_BYTES, EXPERTS, HIDDEN, KV_BYTES, TOP_K, VOCABULARY
from pointsman.bench.subject import machine
from pointsman.engine.engine import Engine
from pointsman.moe.spec import experts_hit
from pointsman.request import Request

RESULTS = Path(__file__).parent / "results"
SCALED = 1 + 4 / 128**2  # a byte of FP8 with its share of a scale
MINIMAX_M25 = json.loads((Path(__file__).parents[1] / "tests" / "models" / "minimax_m25.json").read_text())
BATCHES = (1, 16, 128)
LAYER_BYTES = 3.70e9  # of the model above, a little rounded up
RESERVED_BYTES = 12e9  # embedding and head, cache, work space


def keep(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    if args.out is not None:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
        return
    card = torch.cuda.get_device_name().split()[1].lower()
    path = RESULTS / f"engine_{card}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(kept | {args.what: result}, indent=1) + "\n")


def tokens_of(llm: LLM, questions: int) -> tuple[list[list[int]], float, float]:
    """Greedy answers to held-out word problems: token ids, share that is right, seconds."""
    problems = held_out(ARITHMETIC, questions, 0)
    prompts = [llm.render(problem.messages) for problem in problems]
    begin = time.perf_counter()
    results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=512))
    seconds = time.perf_counter() - begin
    right = [ARITHMETIC.check(problem, result.outputs[0].text) == "right" for problem, result in zip(problems, results, strict=True)]
    return [result.outputs[0].token_ids for result in results], sum(right) / len(right), seconds


def agreement(one: list[list[int]], other: list[list[int]]) -> dict[str, float]:
    """How many answers are the same, and the share of tokens before the first that differs."""
    prefix = sum(
        next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), len(a)) for a, b in zip(one, other, strict=False)
    )
    pairs = list(zip(one, other, strict=False))
    return {
        "same_answers": sum(a == b for a, b in pairs) / len(pairs),
        "tokens_before_difference": prefix / max(sum(len(a) for a, _ in pairs), 1),
    }


def cpu(args: argparse.Namespace) -> dict[str, Any]:
    """The CPU's answers."""
    with contextlib.closing(LLM(device="cpu", progress=False)) as llm:
        tokens, accuracy, seconds = tokens_of(llm, args.questions)
        return {"tokens": tokens, "accuracy": accuracy, "seconds": seconds} | machine(llm.engine)


def answers(args: argparse.Namespace) -> dict[str, Any]:
    """The bundled checkpoint on the GPU, in every way to run a step."""
    ways: dict[str, dict[str, Any]] = {
        "graphs": {},
        "no graphs": {"disable_cuda_graph": True},
        "plain order": {"disable_overlap_schedule": True},
        "fp8 cache": {"kv_cache_dtype": "fp8_e4m3"},
        "deterministic": {"enable_deterministic_inference": True},
    }
    found: dict[str, Any] = {}
    tokens: dict[str, list[list[int]]] = {}
    wanted = json.loads(Path(args.cpu).read_text()) if args.cpu else None
    for name, way in ways.items():
        if args.ways and name not in args.ways:
            continue
        begin = time.perf_counter()
        with contextlib.closing(LLM(device="cuda", progress=False, **way)) as llm:
            start_up = time.perf_counter() - begin
            tokens[name], accuracy, seconds = tokens_of(llm, args.questions)
            found[name] = {"accuracy": accuracy, "start_up_s": start_up, "seconds": seconds, "step": llm.engine.step_name}
            if wanted is not None:
                found[name]["with_cpu"] = agreement(tokens[name], wanted["tokens"])
            found[name]["with_graphs"] = agreement(tokens[name], tokens["graphs"])
            if name == "deterministic":
                found[name]["alone_and_together"] = alone_and_together(llm)
            found["machine"] = machine(llm.engine)
        print(name, json.dumps(found[name]), flush=True)
        keep(args, found)
    if wanted is not None:
        found["cpu"] = {"accuracy": wanted["accuracy"], "questions": len(wanted["tokens"])}
    return found


def alone_and_together(llm: LLM) -> bool:
    """Whether requests get the same tokens, log-probabilities and routing bit for bit alone as with others."""
    prompts = [llm.render(problem.messages) for problem in held_out(ARITHMETIC, 12, 1)]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=48, logprobs=1, return_routed_experts=True, ignore_eos=True)
    together = llm.generate(prompts, params)
    llm.engine.flush_cache()
    alone = []
    for prompt in prompts[:4]:
        alone += llm.generate([prompt], params)
        llm.engine.flush_cache()
    return all(_same(one, other) for one, other in zip(alone, together, strict=False))


def _same(one: RequestOutput, other: RequestOutput) -> bool:
    a, b = one.outputs[0], other.outputs[0]
    return a.token_ids == b.token_ids and a.logprobs == b.logprobs and bool((a.routed_experts == b.routed_experts).all())


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Start-up, step times and the profile of the cut model."""
    _, total = torch.cuda.mem_get_info()
    layers = args.layers or int((total - RESERVED_BYTES) / LAYER_BYTES)
    bandwidth = measure_bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        options = {"moe_runner_backend": args.runner, "disable_cuda_graph": args.eager}
        llm = cut_model(folder, layers, max_running_requests=max(BATCHES), **options)
        start_up = time.perf_counter() - begin
    found: dict[str, Any] = {"layers": layers, "start_up_s": start_up, "read_bandwidth": bandwidth}
    print(json.dumps(found), flush=True)
    with contextlib.closing(llm):
        found |= machine(llm.engine)
        found |= {"decode": [], "profile": {}}
        for batch in BATCHES:
            found["decode"].append(decode(llm.engine, batch, layers, bandwidth, args.output_len))
            keep(args, found)
        for batch in BATCHES:
            found["profile"][batch] = profile(llm.engine, batch)
            keep(args, found)
    return found


def cut_model(folder: str, layers: int, *, max_running_requests: int, **options: Any) -> LLM:
    """A model of MiniMax-M2.5's shape with so many layers and dummy weights; its config is written into the folder."""
    config = MINIMAX_M25 | {"num_hidden_layers": layers, "attn_type_list": [1] * layers}
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return LLM(
        folder,
        load_format="dummy",
        served_model_name="minimax-m2.5-shape",
        device="cuda",
        progress=False,
        kv_cache_dtype="fp8_e4m3",
        max_running_requests=max_running_requests,
        max_total_tokens=max_running_requests * 512,
        context_length=4096,
        **options,
    )


def measure_bandwidth() -> float:
    """Bytes a second that a kernel reads which does nothing else."""
    x = torch.ones((4 << 30) // 4 // BLOCK * BLOCK, device="cuda")
    read(x)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    events[0].record()
    for _ in range(5):
        read(x)
    events[1].record()
    torch.cuda.synchronize()
    milliseconds: float = events[0].elapsed_time(events[1])
    return 5 * x.nbytes / (milliseconds / 1000)


def step_reads(batch: int, layers: int, context: int) -> dict[str, float]:
    """Bytes that a decode step of the cut model must read, by part: each expert that one of the tokens chose, once."""
    layer = {
        "experts": experts_hit(EXPERTS, TOP_K, batch) * EXPERT_BYTES * SCALED,
        "router": EXPERTS * HIDDEN * 4,
        "linear": ATTENTION_BYTES * SCALED,
        "attention": batch * context * KV_BYTES,
    }
    return {part: layers * number for part, number in layer.items()} | {"head": VOCABULARY * HIDDEN * 2}


def prompts_of(engine: Engine, batch: int, length: int, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(engine.architecture.vocab_size, (length,), generator=generator).tolist()) for _ in range(batch)]


def decode(engine: Engine, batch: int, layers: int, bandwidth: float, output_len: int) -> dict[str, Any]:
    """Seconds of a step in which so many sequences decode, against its floor."""
    length = 128
    time_batch(engine, prompts_of(engine, batch, length, 0), 8 + batch * length // 512)
    extra = batch * length // 512
    timing = time_batch(engine, prompts_of(engine, batch, length, 1), output_len + extra)
    step = batch / timing.decode_rate
    floor = sum(step_reads(batch, layers, length + extra + output_len // 2).values()) / bandwidth
    row = {"batch": batch, "step_ms": 1000 * step, "floor_ms": 1000 * floor, "share": floor / step, "prefill_s": timing.prefill_s}
    print(json.dumps(row), flush=True)
    return row


def profile(engine: Engine, batch: int, num_steps: int = 5) -> dict[str, Any]:
    """Microseconds of each kernel in a step in which so many sequences decode, and what the device did not work in."""
    params = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
    for index, prompt in enumerate(prompts_of(engine, batch, 16, 2)):
        engine.add(Request(rid=f"profile-{index}", prompt_token_ids=prompt, sampling=params))
    for _ in range(8 + batch * 16 // 512):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    for index in range(batch):
        engine.abort(f"profile-{index}")
    while engine.has_work:
        engine.step()
    found = [(entry.self_device_time_total / num_steps, entry.count / num_steps, entry.key) for entry in profiler.key_averages()]
    rows = sorted((row for row in found if row[0] > 0), reverse=True)
    print(f"batch {batch}: {1e6 * seconds / num_steps:.0f} us a step, {sum(us for us, _, _ in rows):.0f} us of kernels")
    for us, count, name in rows[:16]:
        print(f"  {us:9.1f} us {count:7.1f} x  {name[:90]}", flush=True)
    return {
        "step_us": round(1e6 * seconds / num_steps, 1),
        "kernels": [{"name": name[:120], "us": round(us, 1), "count": round(count, 1)} for us, count, name in rows[:40]],
    }


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cpu", "answers", "speed"))
    parser.add_argument(
        "out", nargs="?", help="file for the result (default: benchmarks/results/engine_GPU.json, in which it is kept by name)"
    )
    parser.add_argument("--cpu", help="the CPU's answers, to compare with")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--ways", nargs="*", help="only these ways to run a step, graphs first")
    parser.add_argument("--layers", type=int, help="layers of the cut model (default: what fits)")
    parser.add_argument("--runner", default="auto", help="--moe-runner-backend of the cut model")
    parser.add_argument("--eager", action="store_true", help="the cut model without CUDA graphs")
    parser.add_argument("--output-len", type=int, default=64)
    args = parser.parse_args(words)
    logging.basicConfig(level="INFO", format="%(relativeCreated)6.0f ms %(message)s")
    keep(args, {"cpu": cpu, "answers": answers, "speed": speed}[args.what](args))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
