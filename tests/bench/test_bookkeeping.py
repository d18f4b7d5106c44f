"""The benchmark of bookkeeping runs, and its figures become a part of the document; so do those of the other comparisons."""

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import bookkeeping, comparisons, crowded, figures, sweep

HERE = {"cpu": "a CPU", "cores": 2, "python": "3", "commit": "abc"}
SIZE = {"decode_tokens_per_s": 10.0, "spread": 0.1, "prefill_s": 0.01, "peak_memory_mb": 5.0}


def test_every_request_decodes_in_every_step_that_is_timed():
    row = bookkeeping.measure(3, 5)
    assert (row["running"], row["prefixes"]) == (3, 5)
    assert 0 < max(row[name] for name in bookkeeping.PARTS) < row["step_ms"] * 3
    result = {"budget_ms": 1.5, "budget_running": 256, "rows": [row]} | HERE
    assert "| 3 | 5 |" in comparisons.PARTS["bookkeeping"](result)
    budgeted = result | {"rows": [row, row | {"running": 256, "step_ms": 2.0}]}
    first = bookkeeping.followed(budgeted, [], "2026-01-01")
    again = bookkeeping.followed(budgeted, first["history"], "2026-01-02")
    assert [point["date"] for point in again["history"]] == ["2026-01-01", "2026-01-02"]
    assert again["history"][0]["step_ms"] == {"5": 2.0}
    picture = comparisons.PLOTS["bookkeeping.svg"]({"bookkeeping": again})
    ElementTree.fromstring(picture)
    assert "over time" in picture and picture.count(">abc<") == 2


def test_other_engines_are_a_table_and_a_picture():
    result = HERE | {
        "input_len": 64,
        "output_len": 128,
        "rows": {"pointsman": {"start_up_s": 1.0, "sizes": {"1": SIZE, "8": SIZE}}},
        "ratios": {"pointsman": {"1": 1.25, "8": 1.5}},
        "same_tokens": {"pointsman": 1.0},
        "versions": {"xllamacpp": "1"},
    }
    text = comparisons.PARTS["cpu"](result)
    assert "| pointsman | 1.00 s | 10 / 10 | 10 / 10 | 6,400 / 51,200 | 5 / 5 |" in text
    assert "pointsman 1.25x / 1.50x" in text
    ElementTree.fromstring(comparisons.PLOTS["cpu.svg"]({"cpu": result}))


def test_threads_that_share_cores_are_a_table():
    row = crowded.measure(2, 1, range(100, 103))
    assert (row["threads"], row["busy"]) == (2, 1) and min(row["tokens_per_s"].values()) > 0
    rows = [row | {"tokens_per_s": {"1": 2000, "8": 4000}}, row | {"threads": 4, "tokens_per_s": {"1": 1500, "8": 4000}}]
    text = comparisons.PARTS["crowded"]({"rows": rows} | HERE)
    assert "| 4 | 1 | 1,500 (75 %) | 4,000 (100 %) |" in text


def test_a_sweep_is_a_table_and_a_picture():
    """With the real command, over a server of ours."""
    typed = sweep.command([1, 2], 3)
    points = sweep.measure(typed.replace("--random-output-len 128", "--random-output-len 4"))
    assert [(point["max_concurrency"], point["completed"]) for point in points] == [(1, 3), (2, 3)]
    result = {"command": typed, "points": points} | HERE
    text = comparisons.PARTS["sweep"](result)
    assert f"```sh\n{typed} --plot sweep.svg\n```" in text and "\n| 2 | " in text
    ElementTree.fromstring(comparisons.PLOTS["sweep.svg"]({"sweep": result}))


def test_a_figure_that_needs_a_file_says_so(capsys):
    for words in (["gsm8k"], ["more"]):
        with pytest.raises(SystemExit):
            figures.main(words)
        assert "gsm8k needs --data-path, the file that stands in for test.jsonl" in capsys.readouterr().err
    entry = {"num_questions": 7, "num_shots": 5, "accuracy": 0.0, "accuracy_95": [0.0, 0.1], "invalid": 0.0, "latency_s": 1.0}
    assert "--num-questions 7`" in comparisons.PARTS["gsm8k"](entry | {"output_throughput": 5.0} | HERE)
