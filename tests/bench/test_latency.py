"""The latency benchmark, against an engine whose times are known, and the start-up of a server."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pointsman import cli
from pointsman.bench import latency, start_up
from pointsman.bench.latency import Timing, check, summarize, time_batch
from pointsman.bench.options import LatencyOptions
from pointsman.request import ChoiceDelta, FinishReason, Logprob


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class SteadyEngine:
    """Prefills one sequence a step, decodes all that have begun in the same step; a step takes a tenth of a second."""

    def __init__(self, clock, token=lambda rid, index, run: index, logprob=-0.5):
        self.clock, self.token, self.logprob = clock, token, logprob
        self.waiting, self.running = [], []
        self.run = 0

    def add(self, request):
        if not self.waiting and not self.running:
            self.run += 1
        self.waiting.append(request)

    def step(self):
        self.clock.now += 0.1
        if self.waiting:
            self.running.append([self.waiting.pop(0), 0])
        deltas = []
        for entry in self.running:
            request, count = entry
            token = self.token(request.rid, count, self.run)
            done = FinishReason.LENGTH if count + 1 == request.sampling.max_tokens else None
            logprobs = None if request.sampling.logprobs is None else [{token: Logprob(self.logprob, 1)}]
            deltas.append(ChoiceDelta(rid=request.rid, index=0, token_ids=[token], logprobs=logprobs, finish_reason=done))
            entry[1] += 1
        self.running = [entry for entry in self.running if entry[1] < entry[0].sampling.max_tokens]
        return deltas


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


@pytest.mark.parametrize(("batch", "output_len"), [(1, 2), (1, 50), (4, 20), (8, 9)])
def test_decoding_is_timed_while_all_sequences_run(clock, batch, output_len):
    timing = time_batch(SteadyEngine(clock), [(1, 2)] * batch, output_len)
    assert timing.first_token_s == pytest.approx([0.1 * (index + 1) for index in range(batch)])
    assert timing.prefill_s == pytest.approx(0.1 * batch)
    assert timing.decode_rate == pytest.approx(10 * batch)
    assert timing.end_s == pytest.approx(0.1 * (batch + output_len - 1))


def test_sequences_that_never_run_together_are_refused(clock):
    with pytest.raises(ValueError, match="output_len is 4: of 8 sequences"):
        time_batch(SteadyEngine(clock), [(1,)] * 8, 4)


def test_the_check_finds_other_tokens_and_infinite_logprobs(clock):
    prompts = [(1,)] * 3
    assert check(SteadyEngine(clock), prompts, 5) is None
    other = SteadyEngine(clock, token=lambda rid, index, run: index + (run == 2 and rid.endswith("1") and index == 3))
    assert check(other, prompts, 5) == "sequence 1 of 3 got other tokens the second time"
    assert check(SteadyEngine(clock, logprob=-math.inf), prompts, 5) == "sequence 0 of 3 has a log-probability that is not finite"


def test_the_median_and_the_spread():
    timings = [Timing([0.1, 0.2], 1.2, 1.3, 100), Timing([0.1, 0.2], 1.2, 1.3, 120), Timing([0.3, 0.4], 1.4, 1.5, 90)]
    summary = summarize(timings)
    assert summary["decode_tokens_per_s"] == 100.0
    assert summary["decode_spread"] == 0.3
    assert (summary["prefill_s"], summary["first_token_s"]) == (0.2, 0.2)


def test_the_command_measures_the_engine(capsys):
    words = "bench latency --load-format dummy --batch-size 1 3 --input-len 5 --output-len 4 --num-iters 2 --num-warmups 0"
    assert cli.main(words.split()) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch_size"] for row in summary["batches"]] == [1, 3]
    for row in summary["batches"]:
        assert 0 < row["first_token_s"] <= row["prefill_s"] < row["end_s"]
        assert row["decode_tokens_per_s"] > 0
        assert row["peak_memory_mb"] > 1
    assert summary["moe_runner_backend"] == "cpu"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--input-len 2000 --output-len 100", "--input-len 2000 and --output-len 100 make 2100 tokens; the context has 2048"),
        ("--batch-size 8 --max-running-requests 4", "--batch-size 8 is more than --max-running-requests 4"),
    ],
)
def test_what_cannot_run_is_refused(words, message, capsys):
    assert cli.main(["bench", "latency", "--load-format", "dummy", *words.split()]) == 1
    assert capsys.readouterr().err == f"pointsman bench latency: {message}\n"


def test_no_speed_behind_a_failed_check(monkeypatch, capsys):
    monkeypatch.setattr(latency, "check", lambda engine, prompts, output_len: "it is wrong")
    assert cli.main(["bench", "latency", "--load-format", "dummy", "--batch-size", "2"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "pointsman bench latency: it is wrong; no speed is reported\n")


def test_the_flags_of_the_server_are_those_that_were_typed():
    typed = ["--model-path", "x", "--kv-cache-dtype", "fp8_e4m3", "--page-size", "32", "--disable-radix-cache"]
    command = cli.read(["bench", "latency", "--start-up", *typed])
    assert command.options == LatencyOptions(start_up=True)
    assert sorted(start_up.serve_flags(command.engine)) == sorted(typed)
    assert cli.read(["serve", *start_up.serve_flags(command.engine)]).engine == command.engine


def test_a_server_that_ends_is_told_with_its_last_line(monkeypatch):
    script = "import sys; print('hello'); sys.exit('there is no such model')"
    popen = start_up.subprocess.Popen
    fake = types.SimpleNamespace(**vars(start_up.subprocess))
    fake.Popen = lambda command, **how: popen([sys.executable, "-c", script], **how)
    monkeypatch.setattr(start_up, "subprocess", fake)
    with pytest.raises(ValueError, match="the server ended with code 1: there is no such model"):
        start_up.start_once({})


def test_start_up_is_measured_for_real(monkeypatch, capsys):
    """But for the very first run, which would compile for half a minute."""
    monkeypatch.setattr(start_up, "first_run", lambda engine: 1.5)
    assert cli.main(["bench", "latency", "--start-up", "--num-warmups", "0", "--num-iters", "1", "--load-format", "dummy"]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    assert 0 < summary["ready_s"] <= summary["first_token_s"] == summary["lowest_s"] == summary["highest_s"]
    assert "command to first token: " in out
    assert summary["first_run_s"] == 1.5 and "very first run, with nothing compiled: 1.50 s" in out


def test_the_first_run_finds_nothing_compiled(monkeypatch):
    """A copy of the package is started, without objects and with an empty cache of the user's; it is gone when its own object is there."""
    found = []

    def start(engine, environment):
        program = "import pointsman.kernels.cpu_object as one; print(one.__file__, *one._places(('bfloat16',) * 4))"
        words = [sys.executable, "-c", program]
        out = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
        module, *places = map(Path, out.split())
        found.extend([module, *places])
        assert not any(list(place.parent.glob("cpu_step-*.o")) for place in places)
        places[0].touch()
        return 1.0, 2.0

    monkeypatch.setattr(start_up, "start_once", start)
    assert start_up.first_run({}) == 2.0
    root = found[0].parents[2]
    assert not root.exists() and all(place.is_relative_to(root) for place in found)
