"""The parts of docs/performance.md that compare: with other engines, with a budget, with a library, with Hugging Face. See `figures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import bookkeeping
from pointsman.bench.plot import Line, Panel, chart
from pointsman.bench.serving.report import curves

Result = dict[str, Any]


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def where(result: Result) -> str:
    """What it was measured on."""
    gpu = f"{result['gpu']}; " if "gpu" in result else ""
    return f"\n{gpu}{result['cpu']}, {result['cores']} cores; Python {result['python']}; commit {result['commit']}.\n"


def cpu(result: Result) -> str:
    """Ours beside others on a CPU."""
    sizes = list(next(iter(result["rows"].values()))["sizes"])

    def cells(row: Result, key: str, scale: float, digits: int) -> str:
        return " / ".join(f"{scale * row['sizes'][size][key]:,.{digits}f}" for size in sizes)

    rows = [
        (name, f"{row['start_up_s']:.2f} s", cells(row, "decode_tokens_per_s", 1, 0), cells(row, "spread", 100, 0),
         " / ".join(f"{int(size) * result['input_len'] / row['sizes'][size]['prefill_s']:,.0f}" for size in sizes),
         cells(row, "peak_memory_mb", 1, 0))
        for name, row in result["rows"].items()
    ]  # fmt: skip
    head = ("engine", "first token", f"decode tokens/s at {' / '.join(sizes)}", "spread %", "prefill tokens/s", "peak MB")
    best = [f"{name} {' / '.join(f'{found[size]:.2f}x' for size in sizes)}" for name, found in result["ratios"].items()]
    same = [f"{name} {100 * share:.1f} %" for name, share in result["same_tokens"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"### Beside other engines on a CPU\n\n`pointsman bench cpu`, {result['input_len']} tokens in, {result['output_len']} out:\n\n"
        + table(head, rows)
        + f"\nBy llama.cpp's best of the same kind: {'; '.join(best)}. Greedy tokens up to the first that is another than Hugging Face's: "
        + f"{', '.join(same)}. {versions}.\n\n![Decoding by sequences at once](cpu.svg)\n"
        + where(result)
    )


def cpu_plot(results: dict[str, Result]) -> str:
    lines = [
        Line(name=name, points=[(int(size), entry["decode_tokens_per_s"]) for size, entry in row["sizes"].items()])
        for name, row in results["cpu"]["rows"].items()
    ]
    return chart([Panel(title="decoding on a CPU", x="sequences at once", y="tokens/s", lines=lines, logarithmic=True)])


def crowded(result: Result) -> str:
    """The compiled step where threads share cores."""
    first = result["rows"][0]["tokens_per_s"]
    rows = [
        (
            f"{row['threads']}",
            f"{row['busy']}",
            *(f"{found:,} ({100 * found / first[size]:.0f} %)" for size, found in row["tokens_per_s"].items()),
        )
        for row in result["rows"]
    ]
    head = ("threads", "busy processes beside", *(f"tokens/s at {size}" for size in first))
    return (
        "### More threads than cores\n\n`python -m benchmarks.crowded`: the compiled step alone, decoding, and what is left of the first "
        "row's speed; with a busy process for every core half of it would be fair:\n\n" + table(head, rows) + where(result)
    )


def bookkeeping_part(result: Result) -> str:
    """What a step costs beside the model."""
    names = ("step_ms", *bookkeeping.PARTS)
    rows = [(f"{row['running']:,}", f"{row['prefixes']:,}", *(f"{row[name]:.3f}" for name in names)) for row in result["rows"]]
    head = ("running", "cached prefixes", "step ms", *bookkeeping.PARTS)
    return (
        f"### Bookkeeping\n\n`python -m benchmarks.bookkeeping`: the engine around a model that costs nothing, medians in ms; "
        f"the budget is {result['budget_ms']} ms at {result['budget_running']} running requests, hidden behind the step:\n\n"
        + table(head, rows)
        + "\n![Bookkeeping of a step by running requests, and over time](bookkeeping.svg)\n"
        + where(result)
    )


def load_client(result: Result) -> str:
    """What the load client can time."""
    rows = [
        (row["client"], f"{row['streams']:,}", f"{row['asked_tokens_per_s']:,.0f}", f"{row['tokens_per_s']:,}",
         f"{row['us_per_token']:.1f}", f"{row['p99_late_ms']:.1f}", "yes" if row["keeps_up"] else "no")
        for row in result["rows"]
    ]  # fmt: skip
    head = ("client", "streams", "asked tokens/s", "timed tokens/s", "us a token", "late P99 ms", "keeps up")
    return "### The load client\n\n`python -m benchmarks.load_client`, on one core:\n\n" + table(head, rows) + where(result)


def sweep(result: Result) -> str:
    """Latency against throughput of the server."""
    rows = [
        (
            f"{point['max_concurrency']}",
            f"{point['request_throughput']:,.1f}",
            f"{point['output_throughput']:,.0f}",
            *(
                " / ".join(f"{point[f'{figure}_{name}_ms']:,.1f}" for figure in ("mean", "median", "p99"))
                for name in ("ttft", "tpot", "itl")
            ),
        )
        for point in result["points"]
    ]
    times = ("TTFT mean / median / P99 ms", "TPOT", "ITL")
    return (
        "### Latency against throughput\n\n`python -m benchmarks.sweep` serves the bundled checkpoint with `pointsman serve`, and "
        f"loads it from the same cores with\n\n```sh\n{result['command']} --plot sweep.svg\n```\n\n"
        + table(("at once", "requests/s", "output tokens/s", *times), rows)
        + "\n![Latency against throughput by requests at once](sweep.svg)\n"
        + where(result)
    )


def gsm8k(result: Result) -> str:
    """The field's few-shot benchmark, of a model that was not made for it."""
    low, high = result["accuracy_95"]
    return (
        f"### GSM8K\n\n`pointsman eval gsm8k --data-path test.jsonl --num-questions {result['num_questions']}`: the bundled checkpoint "
        "was trained on generated problems alone, whose words and numbers are few beside those of GSM8K, and is right by chance at most. "
        f"What this shows is that the command works, from the file to the figures, with {result['num_shots']} shots a prompt:\n\n"
        + table(
            ("accuracy", "invalid", "latency", "output tokens/s"),
            [
                (
                    f"{result['accuracy']:.3f} ({low:.3f} to {high:.3f})",
                    f"{result['invalid']:.3f}",
                    f"{result['latency_s']:.1f} s",
                    f"{result['output_throughput']:,.0f}",
                )
            ],
        )
        + where(result)
    )


def accuracy(result: Result) -> str:
    """Every way to run a model."""
    rows = [
        (row["moe_runner_backend"], row["kv_cache_dtype"], f"{row['tensor_parallel_size']}", f"{row['expert_parallel_size']}", row["step"],
         _share(row["arithmetic"]), _share(row["tools"]),
         f"{row['output_throughput']:,.0f}")
        for row in result["rows"]
    ]  # fmt: skip
    refused = "".join(
        f"* {', '.join(sorted({way['moe_runner_backend'] for way in ways}))}: {reason}\n" for reason, ways in result["refused"].items()
    )
    return (
        f"### Accuracy of every way to run it{f', on {gpu}' if (gpu := result.get('gpu')) else ''}\n\n"
        f"`pointsman eval table`, the same {result['num_questions']} problems of each kind in every row:\n\n"
        + table(("runner", "cache", "tp", "ep", "step", "word problems", "tool calls", "tokens/s"), rows)
        + (f"\n{result['note']}\n" if "note" in result else "")
        + (f"\nRefused here:\n\n{refused}" if refused else "")
        + where(result)
    )


def _share(entry: Result) -> str:
    low, high = entry["accuracy_95"]
    return f"{entry['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def agreement(result: Result) -> str:
    """Nearness to Hugging Face's model."""
    return (
        "### Agreement with Hugging Face\n\n`pointsman eval agreement`: over "
        f"{result['tokens']:,} tokens the divergence from Hugging Face's model in float32 is {result['kl_mean']:.1e} nats in the mean and "
        f"{result['kl_p99']:.1e} at the 99th percentile, the likeliest token is the same for {100 * result['top1_match']:.2f} %, and "
        f"the experts of a token in a layer are for {100 * result['routing_match']:.2f} % of {result['choices']:,} choices.\n"
        + where(result)
    )


def served(result: Result) -> str:
    """The serving benchmark on two GPUs, and where its steps' time goes."""
    rows = [
        (
            run["layout"],
            f"{row['concurrency']}",
            f"{row['requests']} x {row['input_len']}/{row['output_len']}",
            "yes" if row["capture"] else "no",
            f"{row['output_tok_s']:,.0f}",
            *(" / ".join(f"{row[f'{figure}_{name}_ms']:,.1f}" for figure in ("mean", "median", "p99")) for name in ("ttft", "tpot", "itl")),
        )
        for run in result.values()
        for row in run["rows"]
    ]
    run = next(iter(result.values()))
    profiles = run["profile"]
    head = ("part", *(f"{batch}: us (floor)" for batch in profiles))
    parts = [
        (entry["part"], *(f"{found['parts'][index]['us']:,.0f} ({found['parts'][index]['floor_us']:,.0f})" for found in profiles.values()))
        for index, entry in enumerate(next(iter(profiles.values()))["parts"])
    ]
    parts.append(("step", *(f"{found['step_us']:,.0f} ({found['floor_us']:,.0f})" for found in profiles.values())))
    ready = ", ".join(f"{name} {entry['ready_s']:.1f} s" for name, entry in result.items())
    times = ("TTFT mean / median / P99 ms", "TPOT", "ITL")
    return (
        table(("layout", "at once", "requests", "routing returned", "output tok/s", *times), rows)
        + f"\nFrom the command to ready: {ready}. Where the time of a decode step goes on each GPU, {run['layout']}, by sequences "
        + "at once; kernels that begin early count their waiting too:\n\n"
        + table(head, parts)
        + f"\n{run['gpu']}, two; {run['layers']} layers; torch {run['torch']}; commit {run['commit']}.\n"
    )


def summed(result: Result) -> str:
    """Sums over two GPUs beside NCCL's."""
    names = ("nccl", "mailbox", "nccl, then norm", "norm with mailbox", "qkv_post and nccl", "qkv_post with mailbox")
    rows = [(f"{row['rows']:,}", f"{row['bytes'] / 1e6:.2f}", *(f"{row[name]:.1f}" for name in names)) for row in result["rows"]]
    checked = f"{result['sums']['compared']:,} results compared, {result['sums']['wrong_numbers']:.0f} numbers other than the sum by rank"
    return (
        table(("rows", "MB", *names), rows)
        + f"\nMicroseconds in a CUDA graph, the slower rank's. {checked}.\n"
        + f"{result['gpu']}, two; torch {result['torch']}; commit {result['commit']}.\n"
    )


def scaling(result: Result) -> str:
    """The tables of docs/scaling.md."""
    loads = sorted({row["load"] for row in result["rows"]})
    figures = {(row["gpus"], row["layout"], row["load"]): row for row in result["rows"]}
    most = {(gpus, load): max(row["output_tok_s"] for row in result["rows"] if (row["gpus"], row["load"]) == (gpus, load))
            for gpus, _, load in figures}  # fmt: skip

    def cell(gpus: int, layout: str, load: float) -> str:
        row = figures.get((gpus, layout, load))
        if row is None:
            return ""
        rate = f"{row['output_tok_s']:,.0f}"
        return f"{f'**{rate}**' if row['output_tok_s'] == most[gpus, load] else rate} ({row['mean_tpot_ms']:.1f})"

    rows = [
        (f"{gpus}", layout, *(cell(gpus, layout, load) for load in loads))
        for gpus, layout in dict.fromkeys((row["gpus"], row["layout"]) for row in result["rows"])
    ]
    compared = [
        (f"{entry['what']}, {entry['unit']}", f"{entry['measured']:,.2f}", f"{entry['predicted']:,.2f}", f"{100 * entry['error']:+.1f} %")
        for entry in result["compared"]
    ]
    return (
        table(("on H100", "measured", "simulated", "error"), compared)
        + "\nOutput tokens a second, and in brackets mean milliseconds a token of a request, by requests at once:\n\n"
        + table(("GPUs", "layout", *(f"{load:g}" for load in loads)), rows)
        + f"\n{result['device']}. Not measured: {'; '.join(result['assumed']) or 'nothing'}.\n"
    )


PARTS = {
    "cpu": cpu,
    "crowded": crowded,
    "bookkeeping": bookkeeping_part,
    "sweep": sweep,
    "load_client": load_client,
    "accuracy": accuracy,
    "accuracy_gpu": accuracy,
    "agreement": agreement,
    "gsm8k": gsm8k,
}
PLOTS: dict[str, Callable[[dict[str, Result]], str]] = {
    "cpu.svg": cpu_plot,
    "bookkeeping.svg": lambda results: bookkeeping.figure(results["bookkeeping"]["rows"], results["bookkeeping"]["history"]),
    "sweep.svg": lambda results: curves({"pointsman serve": results["sweep"]["points"]}),
}
