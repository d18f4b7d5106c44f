"""The simulator against what was measured, against arithmetic where steps all take one time, and against what a layout must keep."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.bench.options import ScalingOptions
from pointsman.bench.scaling import layouts, parts
from pointsman.bench.scaling.check import against_engine, against_serving
from pointsman.bench.scaling.layouts import Layout, Load, fullest, step_us
from pointsman.bench.scaling.parts import Curve, at_share
from pointsman.bench.scaling.run import block_ids, measure_one
from pointsman.bench.scaling.serving import distinct, new_scheduler, serve
from pointsman.bench.serving.metrics import most_at_once
from pointsman.bench.serving.query import Query
from pointsman.bench.serving.traces import TraceRow
from pointsman.cli import main
from pointsman.engine.step_sizes import step_sizes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STEP_US = 1000.0


def test_a_curve_goes_through_its_points_and_on() -> None:
    curve = Curve.through([(10, 3), (1, 1), (4, 2)])
    assert [curve(x) for x in (0, 1, 2.5, 4, 7, 10, 16)] == [1, 1, 1.5, 2, 2.5, 3, 4]
    with pytest.raises(ValueError, match="two points; there are 1"):
        Curve.through([(1, 1)])


def test_a_share_between_two_lies_between_their_times() -> None:
    table = {1.0: lambda x: 8 * x, 0.5: lambda x: 5 * x, 0.25: lambda x: 4 * x}
    assert [at_share(table, share, 2.0) for share in (1.0, 0.75, 0.5, 0.25, 0.125)] == [16, 13, 10, 8, 7]


def test_the_experts_times_are_those_that_were_measured() -> None:
    found = parts.read(RESULTS)
    files = [json.loads((RESULTS / name).read_text()) for name in ("moe_h100.json", parts.SHARED)]
    measured = [row for file in files for row in file["rows"] if row["runner"] == "routed"]
    assert len(measured) > 8
    for row in measured:
        assert found.experts[1 / row["tp"]](row["experts"], 8 * row["M"]) == pytest.approx(row["us"])


def test_steps_that_were_measured_whole_are_met_within_a_tenth() -> None:
    """Nothing in the parts was fitted to these. Two runs of one layout differed by 4 % of their throughput."""
    found = parts.read(RESULTS)
    assert not found.assumed
    compared = against_engine(found, RESULTS) + against_serving(found, RESULTS)
    assert len(compared) == 3 + 2 * 6
    assert all(abs(entry.error) < 0.1 for entry in compared), compared


def test_what_was_not_measured_is_told(tmp_path: Path) -> None:
    for name in parts.FILES:
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    found = parts.read(tmp_path)
    assert found.assumed == ("experts at a share of their width", "sums over GPUs")
    assert found.experts[0.5](256, 1024) < found.experts[1.0](256, 1024) and found.sums.rows(1) < found.sums.rows(2048)
    assert against_serving(found, tmp_path) == []


def test_the_fullest_group_by_what_a_hypergeometric_says() -> None:
    """One token's 8 of 256 experts fall to two groups of 128 as an urn says; the mean of the larger part, to the noise of the draws."""
    ways = [math.comb(128, k) * math.comb(128, 8 - k) / math.comb(256, 8) for k in range(9)]
    want = sum(way * max(k, 8 - k) for k, way in enumerate(ways))
    in_use, pairs = fullest(1, 2)
    assert in_use == pytest.approx(want, abs=0.1) and pairs == pytest.approx(want, abs=0.1)
    assert fullest(1, 1) == (pytest.approx(8), 8)
    for groups in (2, 4, 8):
        in_use, pairs = fullest(512, groups)
        assert in_use == pytest.approx(256 / groups, rel=0.01) and 512 * 8 / groups < pairs < 1.2 * 512 * 8 / groups


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="do not divide 6 GPUs"):
        Layout(6, 4)
    with pytest.raises(ValueError, match="12 blocks of 128 columns cannot be shared by 16 GPUs"):
        Layout(16, 8)
    with pytest.raises(ValueError, match="512 groups of experts are more than the 256 experts"):
        Layout(512, 1, 512)
    with pytest.raises(ValueError, match="16 GPUs that share attention are on several hosts"):
        Layout(16, 16, 16)


def test_more_gpus_have_less_to_do_and_more_room() -> None:
    found, load = parts.read(RESULTS), Load(128, 128, 128 * 1000, 0.0)
    steps = [step_us(Layout(gpus, gpus), [load], found) for gpus in (1, 2, 4, 8)]
    for name in ("experts", "linear", "attention"):
        times = [step[name] for step in steps]
        assert times == sorted(times, reverse=True) and times[0] > times[-1]
    assert steps[0]["communication"] == 0 < steps[1]["communication"] < steps[2]["communication"]
    rooms = [Layout(gpus, gpus).cache_tokens(85e9, 62) for gpus in (4, 8)]
    assert 0 < rooms[0] < rooms[1] and Layout(2, 2).cache_tokens(85e9, 62) < 0
    assert Layout(8, 8).width_share == 2 / 12 and Layout(8, 8, 8).width_share == 1
    assert [layouts.padded(rows) for rows in (1, 3, 129, 512, 9999)] == [1, 4, 192, 512, 9999]


def test_a_request_alone_takes_the_steps_of_its_prompt_and_its_answer() -> None:
    budget, length, output = 100, 250, 7
    served = serve(distinct([(length, output)]), [new_scheduler(4096, 4, budget)], lambda _: {"all": STEP_US}, 1)
    (outcome,) = served.outcomes
    prompt = math.ceil(length / budget)
    assert outcome.piece_s == pytest.approx([(prompt + token) * STEP_US / 1e6 for token in range(output)])
    assert served.steps == prompt + output - 1 and served.seconds == outcome.end_s == outcome.piece_s[-1]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 20)), min_size=1, max_size=20),
    concurrency=st.integers(1, 8),
    groups=st.integers(1, 3),
    budget=st.integers(8, 64),
)
def test_every_request_is_answered_whole(lengths: list[tuple[int, int]], concurrency: int, groups: int, budget: int) -> None:
    schedulers = [new_scheduler(2048, 8, budget) for _ in range(groups)]
    rows: list[int] = []

    def time_of(loads: list[Load]) -> dict[str, float]:
        assert len(loads) == groups and all(load.rows <= budget and load.sampled <= load.rows for load in loads)
        rows.append(sum(load.rows for load in loads))
        return {"all": STEP_US}

    served = serve(distinct(lengths), schedulers, time_of, concurrency)
    for outcome, (_, output) in zip(served.outcomes, lengths, strict=True):
        assert len(outcome.piece_s) == outcome.counted == output and outcome.piece_s == sorted(outcome.piece_s)
        assert outcome.sent_s < outcome.piece_s[0] and outcome.end_s == outcome.piece_s[-1]
    assert most_at_once([(outcome.sent_s, outcome.end_s) for outcome in served.outcomes]) <= concurrency
    assert sum(rows) == sum(length + output - 1 for length, output in lengths)  # the last token is never fed
    assert served.seconds == pytest.approx(served.steps * STEP_US / 1e6) == pytest.approx(served.parts_us["all"] / 1e6)


def test_a_trace_has_its_own_moments_and_shares_what_began_alike() -> None:
    rows = [TraceRow(0.0, 1000, 2, (7, 8)), TraceRow(5.0, 1000, 2, (7, 9)), TraceRow(9.0, 1000, 2, (5, 6))]
    queries = [Query(ids=block_ids(row), input_len=row.input_len, output_len=row.output_len, arrival_s=row.at_s) for row in rows]
    served = serve(queries, [new_scheduler(8192, 4, 100)], lambda _: {"all": STEP_US}, None)
    waited = [round((outcome.piece_s[0] - outcome.sent_s) * 1e6 / STEP_US) for outcome in served.outcomes]
    assert [outcome.sent_s for outcome in served.outcomes] == [0.0, 5.0, 9.0]
    assert waited == [10, 5, 10]  # 512 of the second's tokens were the first's


def test_the_command_prints_a_table_and_a_line_of_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "scaling.png"
    words = ["--gpus", "2", "4", "--max-concurrency", "1", "8", "--num-prompts", "8", "--random-output-len", "32", "--plot", str(plot)]
    assert main(["bench", "scaling", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "2 GPUs: 62 layers and 1,056 tokens do not fit" in lines
    assert {row["layout"] for row in summary["rows"]} == {"tp4", "tp4+ep2", "tp4+ep4", "dp4+ep4"}
    assert all(row["requests"] == 8 and row["output_tok_s"] > 0 and row["mean_ttft_ms"] > 0 for row in summary["rows"])


def test_numbers_that_divide_nothing_are_served_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """An odd number of GPUs, copies of which some have one request more than others, and more copies than requests."""
    words = ["--gpu", "h200", "--gpus", "5", "8", "12", "--max-concurrency", "5", "--random-output-len", "8", "--log-level", "error"]
    for prompts in (3, 9):
        assert main(["bench", "scaling", *words, "--num-prompts", str(prompts)]) == 0
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        assert {"dp5+ep5", "4x tp2", "tp8+ep8", "tp4+dp3+ep12"} <= {row["layout"] for row in rows}
        assert all(row["requests"] == prompts and row["parts_ms"]["experts"] > 0 for row in rows)


def test_what_is_left_over_is_at_once_too() -> None:
    options = ScalingOptions(gpu="h200", max_concurrency=(3,), num_prompts=9, random_output_len=64)
    spread = measure_one(Layout(2, 2), 2, 3, parts.read(RESULTS), options)
    options = replace(options, max_concurrency=(2,))
    even = measure_one(Layout(2, 2), 2, 2, parts.read(RESULTS), options)
    assert spread["output_tok_s"] > even["output_tok_s"]


def test_the_fullest_gpu_decides_how_large_a_cache_is() -> None:
    """At an eighth of its 12 blocks some hold two and some one; with whole experts all hold as many."""
    more, even = (Layout(8, 8, ep).cache_tokens(85e9, 62) for ep in (1, 8))
    lost = 62 * 256 * layouts.EXPERT_BYTES * (2 / 12 - 1 / 8)
    assert (even - more) * (62 * layouts.KV_BYTES / 8 + layouts.ROUTE_BYTES) == pytest.approx(lost, rel=1e-4)


def test_what_a_layout_rests_on_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    told = [" ".join(layouts.assumed(layout)) for layout in (Layout(2, 2), Layout(2, 2, 2), Layout(8, 8), Layout(16, 8, 16))]
    assert told[:2] == ["", ""]
    assert "sums over more than two GPUs" in told[2] and "a quarter of their width" in told[2] and "hosts" not in told[2]
    assert "messages between hosts (50 GB/s a GPU, and 20 us each)" in told[3] and "rows on their way to experts" in told[3]
    words = ["--gpu", "h200", "--gpus", "2", "--max-concurrency", "1", "--num-prompts", "1", "--random-output-len", "2"]
    assert main(["bench", "scaling", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["assumed"][0].startswith("H200 (predicted): reads at 4.49 TB/s, all else as on the NVIDIA H100")
    assert any(line.startswith("not measured: rows on their way") for line in lines)  # of dp2+ep2


AZURE = ["--dataset-name", "azure", "--dataset-path", "/nowhere"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "2"], "62 layers and 2,048 tokens fit on none of 2 H100; give more --gpus, or fewer --layers"),
        (["--gpus", "8", "--plot", "/nowhere/x.png"], "'/nowhere/x.png'"),
        ([*AZURE, "--seed", "2"], "--seed is for --dataset-name random; azure has its own moments and lengths"),
        ([*AZURE, "--max-concurrency", "2"], "--max-concurrency is for --dataset-name random"),
        ([*AZURE, "--random-input-len", "8"], "--random-input-len is for --dataset-name random"),
        (AZURE, "No such file or directory: '/nowhere'"),
        (["--dataset-name", "azure"], "--dataset-name azure needs --dataset-path"),
        (["--dataset-path", "x"], "--dataset-name random has no file"),
        (["--trace-slowdown", "2"], "--trace-slowdown is for --dataset-name azure or mooncake"),
        (["--results", "/nowhere"], "/nowhere has no moe_h100.json"),
        (["--gpus", "0"], "must be from 1 to 256"),
    ],
)
def test_what_cannot_be_simulated_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", *words]) != 0
    told = capsys.readouterr()
    assert says in told.err and not told.out


def test_steps_are_padded_as_those_of_an_engine() -> None:
    assert step_sizes(2048)[:-1] == layouts.STEP_SIZES
