"""The figures of README.md and docs/performance.md: measured, kept, and written into them, so that none is typed by hand.

    python benchmarks/figures.py                   measure all, on a machine that does nothing else
    python benchmarks/figures.py latency tools     measure these again
    python benchmarks/figures.py --write           write what is kept into the documents

What a command printed last is kept as it is in benchmarks/results, with machine, versions and commit. A test compares the
documents with it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {
    "start_up": "pointsman bench latency --start-up",
    "latency": "pointsman bench latency",
    "arithmetic": "pointsman eval arithmetic",
    "tools": "pointsman eval tools",
}
EVALS = (("word problems", "arithmetic"), ("tool calls", "tools"))
PLACE = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->\n)", re.DOTALL)

Results = dict[str, dict[str, Any]]


def measure(name: str) -> None:
    """Run a command and keep the JSON line that it ends with."""
    command = [sys.executable, "-m", *COMMANDS[name].split()]
    print(f"$ {COMMANDS[name]}", flush=True)
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    print(out, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(json.loads(out.splitlines()[-1]), indent=1) + "\n")


def kept() -> Results:
    """What was measured, by name."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in COMMANDS if (RESULTS / f"{name}.json").is_file()}


def summary(results: Results) -> str:
    """The table of README.md."""
    start_up, batches = results["start_up"], results["latency"]["batches"]
    sizes, inputs, outputs = _joined(batches, "batch_size"), results["latency"]["input_len"], results["latency"]["output_len"]
    rows = [
        ("`pointsman serve`, command to first token", f"{start_up['first_token_s']:.2f} s", "start_up"),
        (f"decoding, {sizes} sequences", f"{_joined(batches, 'decode_tokens_per_s')} tokens/s", "latency"),
        (f"first token after {inputs} tokens, alone", f"{1000 * batches[0]['first_token_s']:.1f} ms", "latency"),
        (f"peak memory, {sizes} sequences of {inputs} + {outputs} tokens", f"{_joined(batches, 'peak_memory_mb')} MB", "latency"),
        *((f"{what}, {results[name]['num_questions']} held out", _accuracy(results[name]), name) for what, name in EVALS),
    ]
    return _table(("what", "figure", "command"), [(what, figure, f"`{COMMANDS[name]}`") for what, figure, name in rows]) + _machines(
        results
    )


def details(results: Results) -> str:
    """The tables of docs/performance.md."""
    start_up = results["start_up"]
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
        + f"(lowest {start_up['lowest_s']:.2f}, highest {start_up['highest_s']:.2f}).\n\n"
        + _table(("command", "accuracy", "invalid", "latency", "output tokens/s"), evals)
        + _machines(results)
    )


def _joined(rows: list[dict[str, Any]], key: str) -> str:
    return " / ".join(f"{row[key]:,.0f}" for row in rows)


def _accuracy(result: dict[str, Any]) -> str:
    low, high = result["accuracy_95"]
    return f"{result['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
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
    tables = {ROOT / "README.md": summary(results), ROOT / "docs" / "performance.md": details(results)}
    return {path: PLACE.sub(rf"\g<1>{text}\g<2>", path.read_text()) for path, text in tables.items()}


def main(words: list[str]) -> int:
    names = [word for word in words if word != "--write"] or ([] if words else list(COMMANDS))
    for name in names:
        if name not in COMMANDS:
            print(f"unknown figure {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
            return 2
        measure(name)
    results = kept()
    if missing := COMMANDS.keys() - results.keys():
        print(f"the documents are as they were: {', '.join(sorted(missing))} have not been measured", file=sys.stderr)
        return 1
    for path, text in documents(results).items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
