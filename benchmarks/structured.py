"""What structured output costs: compiling, masks, and the steps of requests that have nothing to do with it.

    python -m benchmarks.structured [--steps 300]

The first table is the library behind its door, with the bundled vocabulary and with one of MiniMax-M2's size, whose tokens are made by
joining the bundled ones at random. The second is the bundled model: milliseconds a step of eight free sequences, in company and while
grammars are compiled. The baseline is taken again at the end, because whatever else the machine does is in all of it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence

import numpy as np

from pointsman import tiny
from pointsman.bench.machine import here
from pointsman.bench.subject import settle
from pointsman.config import engine_config
from pointsman.engine.engine import Engine
from pointsman.grammar import Grammar, tool_call_grammar
from pointsman.request import Request, SamplingParams
from pointsman.sampling.grammar import Compiler
from pointsman.sampling.grammar_messages import num_words
from pointsman.text import Tokenizer

LARGE = 200_064
SEQUENCES = 8
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["a", "b", "c"]},
        "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "items": {
            "type": "array",
            "items": {"type": "object", "properties": {"id": {"type": "integer"}, "note": {"type": "string"}}, "required": ["id", "note"]},
        },
    },
    "required": ["name", "kind", "code", "items"],
}
TOOL = {"name": "save", "parameters": SCHEMA}
GRAMMARS = {
    "json_schema": Grammar.json_schema(SCHEMA),
    "json_object": Grammar.json_object(),
    "regex": Grammar.regex("(19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}( [a-z]+){1,30}"),
    "tool call": tool_call_grammar([TOOL], "required"),
}
ENDLESS = Grammar.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 100_000})
HEAVY = "root ::= r0\n" + "\n".join(f'r{i} ::= "x" r{i + 1} | r{i + 1}' for i in range(4000)) + '\nr4000 ::= "a"'


def vocabulary(size: int | None) -> tuple[list[bytes], int, tuple[int, ...]]:
    tokenizer = Tokenizer.load(tiny.path())
    tokens = [b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    rng, pieces = random.Random(0), [token for token in tokens if token.strip().isalnum()]
    known = set(tokens)
    while size is not None and len(tokens) < size:
        joined = rng.choice(pieces) + rng.choice(pieces).strip()
        if joined not in known:
            known.add(joined)
            tokens.append(joined)
    return tokens, len(tokens), tokenizer.eos_ids


def library(size: int | None) -> dict[str, dict[str, float]]:
    """Milliseconds to compile, microseconds of a mask and of taking a token in, over random texts: processor time, as limits are."""
    tokens, total, eos_ids = vocabulary(size)
    started = time.process_time()
    compiler = Compiler(tokens, total, eos_ids)
    results: dict[str, dict[str, float]] = {"vocabulary": {"compile ms": 1e3 * (time.process_time() - started)}}
    for name, grammar in GRAMMARS.items():
        started = time.process_time()
        compiled = compiler.compile(grammar)
        compile_ms = 1e3 * (time.process_time() - started)
        fills: list[float] = []
        words, rng = np.zeros(num_words(total), np.int32), random.Random(1)
        while len(fills) < 1000:
            matcher = compiled.matcher(())
            for _ in range(200):
                started = time.process_time()
                matcher.fill(words)
                allowed = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0]
                between = time.process_time()
                token = int(rng.choice(allowed))
                again = time.process_time()
                matcher.accept(token)
                fills.append(time.process_time() - again + between - started)
                if token in eos_ids:
                    break
        fills.sort()
        results[name] = {
            "compile ms": compile_ms,
            "mask us mean": 1e6 * statistics.mean(fills),
            "mask us p99": 1e6 * fills[len(fills) * 99 // 100],
        }
    return results


def requests(kind: str, grammar: Grammar | None, count: int) -> list[Request]:
    params = SamplingParams(max_tokens=1500, ignore_eos=True, grammar=grammar)
    return [Request(rid=f"{kind}-{index}", prompt_token_ids=(3, 5, 8 + index), sampling=params) for index in range(count)]


def steps(engine: Engine, asked: Sequence[Request], waiting: Sequence[Request], count: int) -> dict[str, float]:
    """Milliseconds a step while all those asked decode and the others wait for their grammars."""
    for request in asked:
        engine.add(request)
    missing = {request.rid for request in asked}
    while missing:
        missing -= {delta.rid for delta in engine.step()}
    for request in waiting:
        engine.add(request)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - started))
    for request in (*asked, *waiting):
        engine.abort(request.rid)
    while engine.has_work:
        engine.step()
    times.sort()
    return {"median": statistics.median(times), "mean": statistics.mean(times), "p99": times[count * 99 // 100], "max": times[-1]}


def company(count: int) -> dict[str, dict[str, float]]:
    engine = Engine(engine_config(max_running_requests=2 * SEQUENCES), progress=False)
    settle(engine)
    free = requests("free", None, SEQUENCES)
    steps(engine, free, (), count)
    slow = [request for index in range(8) for request in requests(f"slow-{index}", Grammar.ebnf(HEAVY + "\n" * index), 1)]
    results = {
        "8 free": steps(engine, free, (), count),
        "8 free, first grammar ever": steps(engine, free, requests("first", GRAMMARS["regex"], 1), count),
        "16 free": steps(engine, [*free, *requests("more", None, SEQUENCES)], (), count),
        "8 free, 8 kept": steps(engine, [*free, *requests("kept", ENDLESS, SEQUENCES)], (), count),
        "8 free, two compiling": steps(engine, free, slow[:2], count),
        "8 free, again": steps(engine, free, (), count),
    }
    engine.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    libraries = {"bundled vocabulary": library(None), f"{LARGE:,} tokens": library(LARGE)}
    steps_ms = company(arguments.steps)
    for title, rows in (*libraries.items(), ("step ms", steps_ms)):
        print(f"\n{title}")
        for name, row in rows.items():
            print(f"  {name:28}" + "".join(f"{label:>14} {value:9.3f}" for label, value in row.items()))
    print(json.dumps(here() | {"libraries": libraries, "step ms": steps_ms}))


if __name__ == "__main__":
    main()
