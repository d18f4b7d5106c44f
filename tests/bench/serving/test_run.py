"""The whole command, against a server whose answers are known."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from pointsman import cli, tiny
from pointsman.bench.serving import load, report
from pointsman.routed_experts import RoutedExperts, encode
from tests.bench.serving.stub_server import json_answer, running, stream_answer, text_stream

MODELS = json_answer({"data": [{"id": tiny.NAME}]})
COUNTS = {"prompt_tokens": 20, "completion_tokens": 4}
SHORT = "--random-input-len 20 --random-output-len 4"


def bench(stub, *words):
    return cli.main(["bench", "serve", "--port", str(stub.port), *SHORT.split(), *words])


def summary_of(capsys):
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_the_table_is_that_of_the_field_line_by_line(capsys):
    with running({"/v1/models": MODELS, "/v1/completions": text_stream(["a", "b", "c"], COUNTS, wait=0.01)}) as stub:
        assert bench(stub, "--num-prompts", "12", "--max-concurrency", "4", "--ignore-eos") == 0
    summary, out = summary_of(capsys)
    lines = out.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert [line.partition(":")[0] for line in lines[1:8]] == [
        "Successful requests",
        "Benchmark duration (s)",
        "Total input tokens",
        "Total generated tokens",
        "Request throughput (req/s)",
        "Output token throughput (tok/s)",
        "Total Token throughput (tok/s)",
    ]
    assert lines[8] == "---------------Time to First Token----------------"
    assert lines[12] == "-----Time per Output Token (excl. 1st token)------"
    assert lines[16] == "---------------Inter-token Latency----------------"
    names = [line.partition(":")[0] for line in [*lines[9:12], *lines[13:16], *lines[17:20]]]
    assert names == [f"{figure} {metric} (ms)" for metric in ("TTFT", "TPOT", "ITL") for figure in ("Mean", "Median", "P99")]
    assert lines[20] == "=" * 50
    assert len(lines) == 22
    assert (summary["completed"], summary["failed"]) == (12, 0)
    assert (summary["total_input_tokens"], summary["total_output_tokens"], summary["server_input_tokens"]) == (240, 48, 240)
    assert summary["max_concurrency_reached"] == stub.most == 4
    assert 10 <= summary["median_itl_ms"] < 1000
    assert summary["output_throughput"] == pytest.approx(48 / summary["duration"], rel=1e-3)
    asked = [body for path, body, _ in stub.asked if path == "/v1/completions"]
    assert len(asked) == 13  # one that checks the server
    assert len({body["prompt"] for body in asked}) == 13
    assert {body["max_tokens"] for body in asked} == {4}


def test_failures_are_counted_and_their_reasons_told(capsys):
    answers = iter(
        [
            text_stream(["a"], COUNTS),
            json_answer({"error": {"message": "too busy"}}, "503 Busy"),
            [(0, b"HTTP/1.1 2"), (0, None)],
            text_stream([]),
        ]
    )

    def answer(body):
        return next(answers, text_stream(["a"], COUNTS))

    with running({"/v1/models": MODELS, "/v1/completions": answer}) as stub:
        assert bench(stub, "--num-prompts", "8", "--max-concurrency", "1") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert (summary["completed"], summary["failed"]) == (5, 3)
    assert "Failed requests:                         3" in captured.out
    assert "1 failed: 503: too busy" in captured.err
    assert "1 failed: BrokenAnswer: the server closed the connection in the middle of its answer (head)" in captured.err
    assert "1 failed: the answer has no tokens" in captured.err


@pytest.mark.parametrize(
    ("answers", "words", "message"),
    [
        ({"/v1/models": MODELS}, "", "/v1/completions does not answer: 404: no /v1/completions"),
        ({"/v1/models": json_answer({"error": {"message": "who are you?"}}, "401 No")}, "", "answers 401: who are you?"),
        ({}, "", "the server lists no model, so there is no tokenizer to count with; pass --tokenizer"),
        ({"/v1/models": json_answer({"data": [{"id": "a b"}]})}, "", "there is no tokenizer for 'a b'"),
        ({"/v1/models": MODELS}, "--tokenizer server", "does not count tokens at /tokenize"),
        (
            {"/v1/models": MODELS, "/v1/completions": text_stream(["a"])},
            "--output-file /nowhere/x",
            "No such file or directory: '/nowhere/x'",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(answers, words, message, capsys):
    with running(answers) as stub:
        assert bench(stub, *words.split()) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_an_id_of_the_hub_that_cannot_be_had_says_what_to_pass():
    program = "import sys; from pointsman.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["bench", "serve", "--model", "nobody/nothing-at-all", "--num-prompts", "1"]
    answer = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert answer.returncode == 1
    assert "no tokenizer for 'nobody/nothing-at-all'" in answer.stderr
    assert "pass --tokenizer, the folder of the model's tokenizer, or --tokenizer server" in answer.stderr


def test_no_server_is_one_line(capsys):
    with running({}) as stub:
        port = stub.port
    assert cli.main(["bench", "serve", "--port", str(port)]) == 1
    assert capsys.readouterr().err.startswith(f"pointsman bench serve: there is no server at http://127.0.0.1:{port}: ")


def record(rows):
    experts = RoutedExperts(
        rows_RLK=pytest.importorskip("numpy").arange(rows * 2 * 2).reshape(rows, 2, 2).astype("uint8") % 8,
        num_experts=8,
        start=0,
        layers=(0, 1),
        missing=(),
        weight_versions=((0, rows, "0"),),
    )
    return encode(experts)


def test_routing_records_are_checked(capsys):
    def stream(rows):
        last = {"choices": [{"text": "", "finish_reason": "length", "routed_experts": record(rows)}]}
        return stream_answer([{"choices": [{"text": "a"}]}, last, {"choices": [], "usage": COUNTS}])

    answers = iter([stream(23), stream(23), stream(22)])
    models = {"/v1/models": MODELS, "/v1/completions": lambda body: next(answers, text_stream(["a"], COUNTS))}
    with running(models) as stub:
        assert bench(stub, "--num-prompts", "3", "--max-concurrency", "1", "--return-routed-experts") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert summary["routing_records"] == 1
    assert summary["routing_faults"] == {"the record has other rows than tokens were fed": 1, "no record came": 1}
    assert "1 routing records: no record came" in captured.err


def test_a_sweep_compares_saves_and_draws(tmp_path, capsys):
    file, plot = tmp_path / "runs.jsonl", tmp_path / "plot.svg"
    with running({"/v1/models": MODELS, "/v1/completions": text_stream(["a", "b"], COUNTS)}) as stub:
        words = [
            "--sweep-max-concurrency",
            "1",
            "3",
            "--num-prompts",
            "6",
            "--output-file",
            str(file),
            "--save-detailed",
            "--plot",
            str(plot),
        ]
        assert bench(stub, *words) == 0
    summary, out = summary_of(capsys)
    assert [point["max_concurrency"] for point in summary["points"]] == [1, 3]
    assert out.count("Serving Benchmark Result") == 2
    prompts = [body["prompt"] for path, body, _ in stub.asked if path == "/v1/completions"]
    assert len(set(prompts)) == len(prompts) == 14  # no point finds the prompts of another in a cache
    saved = report.read_saved(str(file))
    assert [len(run["requests"]) for run in saved] == [6, 6]
    assert {len(request["piece_s"]) for run in saved for request in run["requests"]} == {2}
    ElementTree.parse(plot)

    other, copy = tmp_path / "other.svg", tmp_path / "copy.jsonl"
    copy.write_text(file.read_text())
    assert cli.main(["bench", "serve", "--compare", str(file), "--compare", str(copy), "--plot", str(other)]) == 0
    out = capsys.readouterr().out
    assert "(1.00x)" in out
    compared = json.loads(out.splitlines()[-1])["compared"]
    assert list(compared) == [str(file), str(copy)]
    assert "requests" not in compared[str(file)]
    ElementTree.parse(other)


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), ("{", "line 1 of .* is not JSON"), ("{}", "line 1 of .* is no saved run")]
)
def test_what_was_not_saved_by_us_is_refused(content, message, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        report.read_saved(str(path))


def test_a_request_that_takes_too_long_is_a_failure(capsys):
    slow = iter([text_stream(["a"], COUNTS)])
    models = {"/v1/models": MODELS, "/v1/completions": lambda body: next(slow, text_stream(["a", "b"], COUNTS, wait=5))}
    with running(models) as stub:
        assert bench(stub, "--num-prompts", "1", "--request-timeout", "0.2") == 1
    assert "1 failed: no whole answer within 0.2 s" in capsys.readouterr().err


def test_a_busy_client_says_so():
    assert load.Effort(busy_share=0.5, late_s=[0.001] * 50).warning() is None
    assert "used 90 % of a core" in load.Effort(busy_share=0.9).warning()
    assert "was 50 ms late" in load.Effort(late_s=[0.05] * 3).warning()


def test_the_client_does_without_the_engine():
    program = "import sys; import pointsman.bench.serving.run; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numba", "fastapi", "pointsman.engine"} & set(modules)
