"""The figures of the documents: measured, kept, and written into them, so that none is typed by hand.

    python benchmarks/figures.py                   measure all, on a machine that does nothing else
    python benchmarks/figures.py latency tools     measure these again
    python benchmarks/figures.py more --data-path FILE    measure what takes long or needs other engines: COMPARISONS
    python benchmarks/figures.py --write           write what is kept into the documents

FILE is GSM8K's test set, which gsm8k alone needs. What a command printed last is kept as it is in benchmarks/results, with machine,
versions and commit. A test compares the documents with it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where it is run as a file

from benchmarks import bookkeeping, comparisons, gpu_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {
    "start_up": "pointsman bench latency --start-up",
    "latency": "pointsman bench latency",
    "arithmetic": "pointsman eval arithmetic",
    "tools": "pointsman eval tools",
    "streaming": "python -m benchmarks.streaming",
    "structured": "python -m benchmarks.structured",
}
# Each has a part of its own in docs/performance.md once it has been measured.
COMPARISONS = {
    "cpu": "pointsman bench cpu",
    "crowded": "python -m benchmarks.crowded",
    "bookkeeping": "python -m benchmarks.bookkeeping",
    "load_client": "python -m benchmarks.load_client",
    "sweep": "python -m benchmarks.sweep",
    "accuracy": "pointsman eval table --num-questions 64 --max-running-requests 128",
    "accuracy_gpu": "pointsman eval table --num-questions 64 --max-running-requests 128 --device cuda",
    "agreement": "pointsman eval agreement",
    "gsm8k": "pointsman eval gsm8k --data-path test.jsonl --num-questions 100",
    "scaling": "pointsman bench scaling --gpu h200 --gpus 2 4 8 16 --chunked-prefill-size 1024",
}
ON_A_GPU = "accuracy_gpu"  # asked for by name
DATA = "test.jsonl"
EVALS = (("word problems", "arithmetic"), ("tool calls", "tools"))
PLACE = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->\n)", re.DOTALL)

Results = dict[str, dict[str, Any]]


def measure(name: str, data_path: str | None) -> None:
    """Run a command and keep the JSON line that it ends with. `data_path` stands in for DATA in it."""
    typed = (COMMANDS | COMPARISONS)[name]
    words = [(data_path or word) if word == DATA else word for word in typed.removeprefix("python -m ").split()]
    command = [sys.executable, "-m", *words]
    print(f"$ {typed}", flush=True)
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    print(out, flush=True)
    RESULTS.mkdir(exist_ok=True)
    path, result = RESULTS / f"{name}.json", json.loads(out.splitlines()[-1])
    if name == "bookkeeping":
        before = json.loads(path.read_text())["history"] if path.is_file() else []
        result = bookkeeping.followed(result, before, datetime.date.today().isoformat())
    path.write_text(json.dumps(result, indent=1) + "\n")


def kept() -> Results:
    """What was measured, by name."""
    paths = {name: RESULTS / f"{name}.json" for name in (*COMMANDS, *COMPARISONS)}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def summary(results: Results) -> str:
    """The table of README.md."""
    start_up, batches = results["start_up"], results["latency"]["batches"]
    sizes, inputs, outputs = _joined(batches, "batch_size"), results["latency"]["input_len"], results["latency"]["output_len"]
    streamed = f"{results['streaming']['streams']} streams"
    rows = [
        ("`pointsman serve`, command to first token", f"{start_up['first_token_s']:.2f} s", "start_up"),
        (f"decoding, {sizes} sequences", f"{_joined(batches, 'decode_tokens_per_s')} tokens/s", "latency"),
        (f"first token after {inputs} tokens, alone", f"{1000 * batches[0]['first_token_s']:.1f} ms", "latency"),
        (f"peak memory, {sizes} sequences of {inputs} + {outputs} tokens", f"{_joined(batches, 'peak_memory_mb')} MB", "latency"),
        (f"{streamed} at {results['streaming']['steps_per_s']:g} steps/s cost the engine", _losses(results["streaming"]), "streaming"),
        ("first byte at an idle server, over the engine's own", f"{results['streaming']['first_byte_ms']['median']:.1f} ms", "streaming"),
        *((f"{what}, {results[name]['num_questions']} held out", _accuracy(results[name]), name) for what, name in EVALS),
    ]
    return _table(("what", "figure", "command"), [(what, figure, f"`{COMMANDS[name]}`") for what, figure, name in rows]) + _machines(
        results
    )


def details(results: Results) -> str:
    """The tables of docs/performance.md."""
    start_up = results["start_up"]
    first_run = f"; on the very first run, with nothing compiled yet, {start_up['first_run_s']:.2f}" if "first_run_s" in start_up else ""
    speeds = [
        (
            f"{row['batch_size']}",
            f"{1000 * row['prefill_s']:.1f} ms",
            f"{1000 * row['first_token_s']:.1f} ms",
            f"{row['decode_tokens_per_s']:,.0f}",
            f"{100 * row['decode_spread']:.0f} %",
            f"{row['peak_memory_mb']:,.0f}",
        )
        for row in results["latency"]["batches"]
    ]
    evals = [
        (f"`{COMMANDS[name]}`", _accuracy(results[name]), f"{results[name]['invalid']:.3f}", f"{results[name]['latency_s']:.1f} s",
         f"{results[name]['output_throughput']:,.0f}")
        for _, name in EVALS
    ]  # fmt: skip
    return (
        f"`{COMMANDS['latency']}`:\n\n"
        + _table(("sequences", "prefill", "first token", "decode tokens/s", "spread", "peak MB"), speeds)
        + f"\n`{COMMANDS['start_up']}`: ready after {start_up['ready_s']:.2f} s, first token after {start_up['first_token_s']:.2f} s "
        + f"(lowest {start_up['lowest_s']:.2f}, highest {start_up['highest_s']:.2f}){first_run}.\n\n"
        + _table(("command", "accuracy", "invalid", "latency", "output tokens/s"), evals)
        + _streaming(results["streaming"])
        + _machines(results)
    )


def _streaming(result: dict[str, Any]) -> str:
    """What the HTTP side costs, and where its time goes."""
    runs = [
        (
            f"{name}",
            f"{run['alone_tokens_per_s']:,.0f}",
            f"{run['served_tokens_per_s']:,.0f}",
            f"{100 * run['loss']:.1f} %",
            f"{run['gap_ms_median']:.1f} / {run['gap_ms_p99']:.1f} ms",
            *(f"{run['cores'][process]:.2f}" for process in ("server", "engine", "client")),
        )
        for name, run in result["runs"].items()
    ]
    head = ("a step", "alone, tokens/s", "served, tokens/s", "loss", "gap, median / p99", "server", "engine", "client")
    shares = [(part, f"{100 * share:.0f} %") for part, share in result["parts"].items()]
    first = result["first_byte_ms"]
    return (
        f"\n`{COMMANDS['streaming']}`, {result['streams']} streams at {result['steps_per_s']:g} steps/s, and the cores in use:\n\n"
        + _table(head, runs)
        + f"\nFirst byte at an idle server, over the engine's own: median {first['median']:.1f} ms, p99 {first['p99']:.1f} ms.\n\n"
        + _table(("part of the web server", "share of its time"), shares)
    )


def structured(results: Results) -> str:
    """The tables of docs/structured-output.md."""
    result = results["structured"]
    tables = []
    for title in result["libraries"]:
        rows = [
            (
                name,
                f"{row['compile ms']:,.1f} ms",
                *(f"{row[key] / 1e3:,.2f} ms" if key in row else "" for key in ("mask us mean", "mask us p99")),
            )
            for name, row in result["libraries"][title].items()
        ]
        tables.append(_table((title, "compile", "mask, mean", "mask, p99"), rows))
    steps = [(name, *(f"{row[key]:.2f}" for key in ("median", "mean", "p99", "max"))) for name, row in result["step ms"].items()]
    tables.append(_table(("ms a step of the bundled model", "median", "mean", "p99", "most"), steps))
    return "\n".join(tables) + _machines({"structured": result})


def _losses(result: dict[str, Any]) -> str:
    return ", ".join(f"{100 * run['loss']:.1f} % where a step {name}" for name, run in result["runs"].items())


def _joined(rows: list[dict[str, Any]], key: str) -> str:
    return " / ".join(f"{row[key]:,.0f}" for row in rows)


def _accuracy(result: dict[str, Any]) -> str:
    low, high = result["accuracy_95"]
    return f"{result['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def _machines(results: Results) -> str:
    """What the figures were measured on; several lines only where that differs."""
    found: dict[str, list[str]] = {}
    for name, result in results.items():
        where = f"{result['cpu']}, {result['cores']} cores; torch {result['torch']}, Python {result['python']}; commit {result['commit']}"
        found.setdefault(where, []).append(name)
    if len(found) == 1:
        return f"\n{next(iter(found))}.\n"
    return "\n" + "".join(f"{', '.join(names)}: {where}.\n" for where, names in found.items())


def documents(results: Results) -> dict[Path, str]:
    """Each document as it should be."""
    first = {name: results[name] for name in COMMANDS}
    more = "".join(f"\n{part(results[name])}" for name, part in comparisons.PARTS.items() if name in results)
    tables = {ROOT / "README.md": summary(first), ROOT / "docs" / "performance.md": details(first) + more}
    tables[ROOT / "docs" / "structured-output.md"] = structured(first)
    if "scaling" in results:
        served, summed = (json.loads((RESULTS / f"{name}_2xh100.json").read_text()) for name in ("serve", "allreduce"))
        measured = f"### Two GPUs, measured\n\n{comparisons.served(served)}\n### Sums over them\n\n{comparisons.summed(summed)}"
        tables[ROOT / "docs" / "scaling.md"] = f"{measured}\n### Simulated\n\n{comparisons.scaling(results['scaling'])}"
    texts = {path: PLACE.sub(functools.partial(_filled, text), path.read_text()) for path, text in tables.items()}
    texts[ROOT / "docs" / "performance.md"] = gpu_tables.filled(texts[ROOT / "docs" / "performance.md"])
    texts[ROOT / "docs" / "experts.svg"] = gpu_tables.experts_plot()
    return texts | {ROOT / "docs" / name: draw(results) for name, draw in comparisons.PLOTS.items() if name.removesuffix(".svg") in results}


def _filled(text: str, place: re.Match[str]) -> str:
    return place[1] + text + place[2]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--data-path", metavar="FILE")
    arguments = parser.parse_args(words)
    names = arguments.name or ([] if arguments.write else list(COMMANDS))
    names = [each for name in names for each in ([more for more in COMPARISONS if more != ON_A_GPU] if name == "more" else [name])]
    for name in names:
        if name not in COMMANDS | COMPARISONS:
            parser.error(f"unknown figure {name!r}; there are {', '.join(COMMANDS | COMPARISONS)}, and more for the latter")
        if DATA in (COMMANDS | COMPARISONS)[name].split() and arguments.data_path is None:
            parser.error(f"{name} needs --data-path, the file that stands in for {DATA}")
    for name in names:
        measure(name, arguments.data_path and str(Path(arguments.data_path).resolve()))
    results = kept()
    if missing := COMMANDS.keys() - results.keys():
        print(f"the documents are as they were: {', '.join(sorted(missing))} have not been measured", file=sys.stderr)
        return 1
    for path, text in documents(results).items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
