"""`pointsman bench serve`: check the server, load it, say what was found."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pointsman import tiny
from pointsman.bench.machine import here
from pointsman.bench.serving import report
from pointsman.bench.serving.arrivals import Arrivals
from pointsman.bench.serving.backends import BACKENDS, Wish, error_of
from pointsman.bench.serving.datasets import Source
from pointsman.bench.serving.http import OK, HttpClient, Origin
from pointsman.bench.serving.load import Load, Run
from pointsman.bench.serving.metrics import summarize
from pointsman.bench.serving.options import ServeOptions
from pointsman.bench.serving.prompts import Counter, LocalCounter, ServerCounter
from pointsman.bench.serving.query import Outcome, Query
from pointsman.bench.serving.routing import check_routing
from pointsman.models.folder import locate
from pointsman.text import Tokenizer

MOST_ERRORS = 5
DENIED = (401, 403)
BAR_SECONDS = 0.5


def run(engine: dict[str, Any], options: ServeOptions) -> int:
    """`pointsman bench serve`; 1 where no request was answered."""
    assert not engine, engine
    if options.compare:
        return _compare(options)
    for path in (options.output_file, options.plot):
        if path is not None:
            Path(path).touch()  # a path that cannot be written is told before the load
    return asyncio.run(_measure(options))


@dataclass(frozen=True)
class Point:
    """One run of a sweep, or the one run there is."""

    max_concurrency: int | None
    request_rate: float | None


def points(options: ServeOptions) -> list[Point]:
    """The runs that were asked for."""
    if options.sweep_max_concurrency:
        return [Point(most, options.request_rate) for most in options.sweep_max_concurrency]
    rates = options.sweep_request_rate or (options.request_rate,)
    return [Point(options.max_concurrency, rate) for rate in rates]


async def _measure(options: ServeOptions) -> int:
    origin = Origin.parse(options.base_url) if options.base_url else Origin.of(options.host, options.port)
    client = HttpClient(origin, options.headers)
    try:
        model = options.model or await first_model(client)
        counter = await asyncio.to_thread(find_counter, options.tokenizer, origin, model, options.headers)
        load = _new_load(options, client, model)
        summaries = []
        for index, point in enumerate(points(options)):
            summary = await _run_point(options, point, index, load, counter)
            _save(summary, options)
            summaries.append({name: value for name, value in summary.items() if name != "requests"})
    finally:
        client.close()
    if len(summaries) > 1:
        print(report.comparison([report.load_of(summary) for summary in summaries], summaries))
    if options.plot is not None:
        Path(options.plot).write_text(report.curves({model or str(origin): summaries}), encoding="utf-8")
    print(json.dumps(summaries[0] if len(summaries) == 1 else {"bench": "serve", "points": summaries}, allow_nan=False))
    return 0 if all(summary["completed"] for summary in summaries) else 1


def _new_load(options: ServeOptions, client: HttpClient, model: str | None) -> Load:
    backend = BACKENDS[options.backend]
    if options.endpoint is not None:
        backend = dataclasses.replace(backend, path="/" + options.endpoint.lstrip("/"))
    wish = Wish(
        model=None if options.backend == "generate" else model,
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
        return_routed_experts=options.return_routed_experts,
        extra=options.extra,
    )
    return Load(client=client, backend=backend, wish=wish, timeout_s=options.request_timeout)


async def first_model(client: HttpClient) -> str | None:
    """The model that the server names first; None where it lists none. Raises ValueError where there is no server, or it wants a key."""
    try:
        answer = await client.get("/v1/models")
    except OSError as error:
        raise ValueError(f"there is no server at {client.origin}: {error}") from None
    if answer.status in DENIED:
        raise ValueError(f"{client.origin} answers {answer.status}: {error_of(answer.body)}")
    if answer.status != OK:
        return None
    try:
        return str(msgspec.json.decode(answer.body)["data"][0]["id"])
    except (msgspec.MsgspecError, KeyError, IndexError, TypeError):
        return None


def find_counter(wanted: str | None, origin: Origin, model: str | None, headers: dict[str, str]) -> Counter:
    """What counts tokens: the folder or id that was given, the bundled checkpoint where the server has that, or the server itself."""
    if wanted == "server":
        return ServerCounter(origin, model, headers)
    place = wanted or (str(tiny.path()) if model == tiny.NAME else model)
    if place is None:
        raise ValueError("the server lists no model, so there is no tokenizer to count with; pass --tokenizer, its folder, or `server`")
    try:
        if Path(place).is_dir():
            return LocalCounter(Tokenizer.load(place))
        return LocalCounter(Tokenizer.load(locate(place, weights=False)))
    except ValueError as error:
        raise ValueError(
            f"there is no tokenizer for {place!r} ({error}); pass --tokenizer, the folder of the model's tokenizer, "
            "or --tokenizer server to let the server count"
        ) from None


async def _run_point(options: ServeOptions, point: Point, index: int, load: Load, counter: Counter) -> dict[str, Any]:
    """One run: prompts that no other run has, the check, the warm-ups, the load, the table."""
    draws = Random(f"{options.seed}-{index}")
    source = Source(options, counter)
    queries = await asyncio.to_thread(source.queries, draws)
    offsets = _offsets(options, point, queries, draws)
    load = dataclasses.replace(load, max_concurrency=point.max_concurrency)
    warm = [source.like(queries[number % len(queries)], draws) for number in range(1 + options.num_warmups)]
    await _check(load, warm[0])
    if options.num_warmups:
        await load.run(warm[1:], [0.0] * options.num_warmups)
    with _progress(len(queries)) as step:
        result = await dataclasses.replace(load, on_end=step).run(queries, offsets)
    summary = _describe(options, point, load, result)
    _print(summary, result, options)
    return summary


def _offsets(options: ServeOptions, point: Point, queries: Sequence[Query], draws: Random) -> list[float]:
    """When each query is sent. Raises ValueError where a file and a flag both say."""
    own = [query.arrival_s for query in queries]
    if any(moment is not None for moment in own):
        if point.request_rate is not None or options.ramp_up_strategy is not None:
            raise ValueError(f"{options.path} has its own times; leave out --request-rate and the ramp")
        if any(moment is None for moment in own):
            raise ValueError(f"{options.path} has a timestamp on some lines only; give all or none")
        return [moment for moment in own if moment is not None]
    if options.ramp_up_strategy is not None:
        assert options.ramp_up_start_rps is not None
        ramp = Arrivals(
            rate=options.ramp_up_start_rps,
            end_rate=options.ramp_up_end_rps,
            exponential=options.ramp_up_strategy == "exponential",
            burstiness=options.burstiness,
        )
        return ramp.offsets_s(len(queries), draws)
    rate = math.inf if point.request_rate is None else point.request_rate
    return Arrivals(rate=rate, burstiness=options.burstiness).offsets_s(len(queries), draws)


async def _check(load: Load, query: Query) -> None:
    """One request before all others. Raises ValueError with the server's reason where it is not answered."""
    outcome = (await load.run([query], [0.0])).outcomes[0]
    if outcome.error is not None:
        raise ValueError(f"{load.client.origin}{load.backend.path} does not answer: {outcome.error}")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal, drawn seldom and in this thread: it must not be what is measured."""
    console = Console(stderr=True)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("requests", total=total)
        drawn = time.monotonic()

        def step(outcome: Outcome) -> None:
            nonlocal drawn
            bar.advance(task)
            if not bar.disable and time.monotonic() - drawn > BAR_SECONDS:
                bar.refresh()
                drawn = time.monotonic()

        yield step


def _describe(options: ServeOptions, point: Point, load: Load, result: Run) -> dict[str, Any]:
    """The figures of a run with what they were measured by, ready for JSON."""
    answered = [outcome for outcome in result.outcomes if outcome.error is None]
    summary: dict[str, Any] = {
        "bench": "serve",
        "backend": options.backend,
        "server": f"{load.client.origin}",
        "model": load.wish.model,
        "num_prompts": len(result.outcomes),
        "max_concurrency": point.max_concurrency,
        "request_rate": None if point.request_rate is None or math.isinf(point.request_rate) else point.request_rate,
    } | options.described
    summary |= summarize(result.outcomes, result.duration_s, percentiles=options.percentiles, goodput_ms=options.goodput_ms)
    summary["server_input_tokens"] = sum(outcome.prompt_tokens or 0 for outcome in answered)
    if options.return_routed_experts:
        summary |= check_routing(answered)
    summary["errors"] = dict(Tally(outcome.error for outcome in result.outcomes if outcome.error is not None).most_common(MOST_ERRORS))
    summary |= {"client_busy_share": result.effort.busy_share, "client_p99_late_ms": 1000 * result.effort.p99_late_s}
    summary = {name: round(value, 4) if isinstance(value, float) else value for name, value in summary.items()}
    return summary | here() | {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "requests": _details(result)}


def _details(result: Run) -> list[dict[str, Any]]:
    return [
        {
            "input_len": outcome.input_len,
            "output_len": outcome.output_len,
            "sent_s": round(outcome.sent_s, 6),
            "end_s": round(outcome.end_s, 6),
            "piece_s": [round(moment, 6) for moment in outcome.piece_s],
            "error": outcome.error,
        }
        for outcome in result.outcomes
    ]


def _print(summary: dict[str, Any], result: Run, options: ServeOptions) -> None:
    """The table, and a line for whatever somebody should know before believing it."""
    print(report.table(summary, options.metrics, options.percentiles))
    for reason, count in summary["errors"].items():
        print(f"{count} failed: {reason}", file=sys.stderr)
    if options.return_routed_experts:
        print(f"Routing records: {summary['routing_records']} whole, {summary['routing_bytes_per_token']:.0f} bytes a token as sent")
        for fault, count in summary["routing_faults"].items():
            print(f"{count} routing records: {fault}", file=sys.stderr)
    counted = summary["server_input_tokens"]
    if counted and counted != summary["total_input_tokens"]:
        template = options.backend == "openai-chat" and not options.use_chat_template
        hint = "; the chat template makes the difference, and --use-chat-template counts it" if template else ""
        print(f"the server counts {counted} input tokens, this client {summary['total_input_tokens']}{hint}", file=sys.stderr)
    if (warning := result.effort.warning()) is not None:
        print(warning, file=sys.stderr)


def _save(summary: dict[str, Any], options: ServeOptions) -> None:
    """Add the figures to the file that was asked for."""
    path = options.output_file
    if options.save_result:
        load = "inf" if summary["request_rate"] is None else f"{summary['request_rate']:g}"
        model = str(summary["model"] or "model").replace("/", "_")
        path = f"{options.backend}-{load}qps-concurrency{summary['max_concurrency']}-{model}-{summary['date'].replace(':', '')}.json"
        print(f"figures are in {path}", file=sys.stderr)
    if path is not None:
        kept = summary if options.save_detailed else {name: value for name, value in summary.items() if name != "requests"}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(kept, allow_nan=False) + "\n")


def _compare(options: ServeOptions) -> int:
    """`--compare`: the last run of each file side by side, all of them as curves."""
    groups = {path: report.read_saved(path) for path in options.compare}
    lasts = [{name: value for name, value in runs[-1].items() if name != "requests"} for runs in groups.values()]
    names = [Path(path).stem for path in groups]
    print(report.comparison(names, lasts))
    if options.plot is not None:
        Path(options.plot).write_text(report.curves(groups), encoding="utf-8")
    print(json.dumps({"bench": "serve", "compared": dict(zip(groups, lasts, strict=True))}, allow_nan=False))
    return 0
