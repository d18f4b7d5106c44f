"""The benchmarks run and count what is there; what they say of this machine is not tested."""

import contextlib
import itertools
import json
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pointsman
from benchmarks import capture, gpu_serve, load_client, streaming, structured
from pointsman import LLM

STREAMS, STEPS = 3, 40


def test_streams_are_counted_to_the_last_token(monkeypatch):
    """`read_all` checks the events and the end of each stream itself."""
    monkeypatch.setattr(streaming, "WARM_STEPS", STEPS)
    run = streaming.served(0.005, STREAMS, STEPS, busy=False)
    assert 0 < run.rate <= STREAMS / 0.005
    assert set(run.cores) == {"server", "engine", "client"}


@pytest.mark.parametrize("busy", [False, True])
def test_the_stub_alone_is_as_fast_as_its_steps(busy):
    assert 0 < streaming.alone(0.002, STREAMS, STEPS, busy=busy) <= STREAMS / 0.002


def test_time_is_told_by_part(tmp_path):
    path = tmp_path / "parts.json"
    prelude = f"from benchmarks.sampled import sample_into; sample_into({str(path)!r}, {streaming.PARTS!r}); "
    with streaming.server(streaming.program(0.002, busy=False), STREAMS, prelude) as (process, port):
        streaming.read_all(port, STREAMS, 200, {"server": process.pid})
    shares = json.loads(path.read_text())
    assert set(shares) <= {*streaming.PARTS.values(), "other"}
    assert sum(shares.values()) == pytest.approx(1)


def test_a_large_vocabulary_has_no_token_twice():
    tokens, total, eos_ids = structured.vocabulary(5000)
    small, _, _ = structured.vocabulary(None)
    assert total == len(tokens) == 5000 and tokens[: len(small)] == small
    added = tokens[len(small) :]
    assert len(set(added)) == len(added) and not set(added) & set(small) and eos_ids


def test_the_stub_of_the_load_client_sees_a_request_behind_the_body_of_the_one_before(monkeypatch):
    monkeypatch.setattr(load_client.Stub, "streams", [], raising=False)
    written = []
    stub = load_client.Stub()
    stub.connection_made(SimpleNamespace(write=written.append))
    for data in (b"POST /v1/completions HTTP/1.1\r\n\r\n", b'{"prompt":"x"}POST /v1/completions HTTP/1.1\r\n\r\n', b'{"prompt":"x"}'):
        stub.data_received(data)
    assert written == [load_client.HEAD] * 2 and len(load_client.Stub.streams) == 2


def test_a_cost_is_found_under_drift_and_hiccups():
    """Two parts of a hundred on every second step are one of a hundred; a tenth of the steps takes three times as long."""
    draws, blocks = np.random.default_rng(0), capture.Blocks()
    for number in range(60):
        windows = (1 + 0.3 * np.sin(number / 9)) * draws.normal(1, 0.01, (4, 16)) * np.where(draws.random((4, 16)) < 0.1, 3, 1)
        windows[1:3, ::2] *= 1.02
        blocks.add(windows[::3], windows[1:3])
    cost, low, high = blocks.cost()
    assert low < 0.01 < high and low < cost < high and high - low < 0.003


@pytest.mark.parametrize("pace", [Fraction(2), Fraction(1, 2), Fraction(3, 8)])
def test_what_runs_in_steps_that_count_is_of_their_kind(pace):
    """A replay costs from an answer's first step to its last, rows when it ends; what ends at a place of a window ends there in all."""
    life, windows = 9, list(itertools.islice(capture.windows_of(list(capture.KINDS), pace, 9), 48))
    ending = [window.kind for window in windows for _ in range(window.length)]
    begun = [int((step + 1) * pace) - int(step * pace) for step in range(len(ending))]
    places: dict[str, set[tuple[int, ...]]] = {kind: set() for kind in capture.KINDS}
    first = 0
    for window in windows[:-4]:
        counted = range(first + window.begin, first + window.begin + window.steps)
        for step in counted:
            running = ending[step : step + life]
            assert running[0] == window.kind and ("replay" not in running or set(running) == {"replay"})
        places[window.block].add(tuple(begun[step] for step in counted))
        first += window.length
    assert all(len(found) == 1 for found in places.values())
    kinds = [[window.block for window in windows[block : block + 4]] for block in range(0, 48, 4)]
    assert kinds == [[kind] * 4 for kind in capture.KINDS] * 4
    assert all(sum(window.with_it for window in windows[block : block + 4]) == 2 for block in range(0, 48, 4))


def test_answers_that_are_asked_for_rows_have_them():
    """`Flow` checks each answer: its kind, its rows, the steps that it took."""
    kinds = list(capture.KINDS)
    with contextlib.closing(LLM(device="cpu", progress=False)) as llm:
        flow = capture.Flow(llm, 2, 4, replays=True)
        figures = list(itertools.islice(capture.measure(flow, kinds, lambda count: True), 2))[-1]
    assert all(figures[kind]["blocks"] == 2 for kind in kinds)
    assert figures["tokens_per_s"] > 0 and figures["reading"] > 0


def test_every_kernel_of_a_layer_is_in_a_part_of_the_step():
    """By what is defined: only those that draw tokens are in none. A product's time belongs to its part, not to the rest."""
    found = {
        name: path.stem
        for path in (Path(pointsman.__file__).parent / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\b", path.read_text(), re.MULTILINE)
    }
    assert len(found) > 30
    drawing = {name for name, module in found.items() if module in ("sampling_kernels", "nucleus_kernels")}
    rows = gpu_serve.against_floors({"step_us": 0.0, "kernels": [{"name": name, "us": 1.0} for name in found]}, {})
    counted = {row["part"]: row["us"] for row in rows}
    assert counted["rest"] == len(drawing) and sum(counted.values()) == len(found)
    assert [gpu_serve.part_of(name) for name in ("vector_up_kernel", "route_few_kernel", "vector_linear_kernel", "dense_kernel")] == [
        *("experts", "router", "linear", "linear")
    ]
