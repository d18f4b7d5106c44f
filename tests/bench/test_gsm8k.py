"""GSM8K against a model that is known, and its rules against cases written down by hand."""

import json
import re
from pathlib import Path

import pytest

from pointsman import cli, tiny
from pointsman.bench import gsm8k
from pointsman.bench.gsm8k import Problem, choose, last_number, prompt, read
from tests.bench.serving.stub_server import json_answer, running, text_stream

DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl"
PROBLEMS = [Problem(f"What is {number} and 1?", f"It is so.\n#### 1,{number:03}") for number in range(8)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"question": each.question, "answer": each.answer}) + "\n" for each in PROBLEMS))
    return str(file)


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 18", 18), ("1,234 eggs, so 5", 5), ("$1,234.", 1234), ("-7", 7), ("3.5", 5), ("none", None), ("", None), ("007", 7)],
)
def test_the_last_run_of_digits_counts(text, number):
    assert last_number(text) == number


def test_a_prompt_is_the_shots_and_the_question():
    assert prompt(PROBLEMS[:1], PROBLEMS[1]) == (
        "Question: What is 0 and 1?\nAnswer: It is so.\n#### 1,000\n\nQuestion: What is 1 and 1?\nAnswer:"
    )


def test_shots_are_left_out_unless_asked_for():
    shots, rest = choose(PROBLEMS, 3, 5, shots_in_set=False)
    assert (shots, rest) == (PROBLEMS[:3], PROBLEMS[3:])
    assert choose(PROBLEMS, 3, 5, shots_in_set=True) == (PROBLEMS[:3], PROBLEMS[:5])
    with pytest.raises(ValueError, match="the file has 8 problems; 3 shots leave 5, and --num-questions is 6"):
        choose(PROBLEMS, 3, 6, shots_in_set=False)


@pytest.mark.skipif(not DATA.is_file(), reason="the problems are not beside the repository")
def test_the_public_problems_are_read():
    problems = read(str(DATA))
    assert len(problems) == 1319
    assert problems[0].label == 18


def test_a_server_is_asked_and_graded(path, tmp_path, capsys):
    """Right, wrong, without a number, without a word, and refused: one of each of five."""

    def answer(body):
        number = int(re.findall(r"What is (\d)", body["prompt"])[-1])
        assert (body["max_tokens"], body["temperature"], body["stop"]) == (512, 0.0, ["Question", "Assistant:", "<|separator|>"])
        return {
            3: text_stream(["It is", " 1003."], {"prompt_tokens": 9, "completion_tokens": 6}),
            4: text_stream(["5"], {"prompt_tokens": 9, "completion_tokens": 2}),
            5: text_stream(["I do not know"], {"prompt_tokens": 9, "completion_tokens": 2}),
            6: text_stream([], {"prompt_tokens": 9, "completion_tokens": 0}),
            7: json_answer({"error": {"message": "no"}}, "500 No"),
        }[number]

    save = tmp_path / "answers.jsonl"
    with running({"/v1/models": json_answer({"data": [{"id": "m"}]}), "/v1/completions": answer}) as stub:
        words = f"eval gsm8k --data-path {path} --num-shots 3 --num-questions 5 --host 127.0.0.1 --port {stub.port} --save {save}"
        assert cli.main(words.split()) == 1
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    assert (summary["accuracy"], summary["invalid"], summary["failed"], summary["output_tokens"]) == (0.2, 0.6, 1, 10)
    assert [line.split(":")[0] for line in out.splitlines()[:4]] == ["Accuracy", "Invalid", "Latency", "Output throughput"]
    assert "1 requests failed, the first with: 500: no" in out
    verdicts = [json.loads(line)["verdict"] for line in save.read_text().splitlines()]
    assert verdicts == ["right", "wrong", "invalid", "invalid", "invalid"]


def test_the_engine_is_asked_where_no_server_is_named(path, capsys):
    words = f"eval gsm8k --data-path {path} --num-shots 2 --num-questions 4 --max-tokens 8 --model-path {tiny.path()} --parallel 2"
    assert cli.main(words.split()) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["num_questions"], summary["parallel"], summary["moe_runner_backend"]) == (4, 2, "cpu")
    assert 0 < summary["output_tokens"] <= 32


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 2, "--data-path is missing"),
        ("--data-path x --port 3", 2, "--port is 3, but there is no --host"),
        ("--data-path x --base-url http://a --host b", 2, "--base-url stands in place of --host and --port; give one"),
        ("--data-path x --base-url http://a --port 3", 2, "--base-url stands in place of --host and --port; give one"),
        ("--data-path x --api-key k", 2, "--api-key is sent to a server; name it with --host or --base-url"),
        ("--data-path /nowhere", 1, "[Errno 2] No such file or directory: '/nowhere'"),
        ("--data-path {path} --num-questions 4 --host a --page-size 3", 1, "page_size is for an engine here; the server has its own"),
        ("--data-path {path}", 1, "the file has 8 problems; 5 shots leave 3, and --num-questions is 200"),
        ("--data-path {rubbish}", 1, "line 1 of {rubbish} is no problem of GSM8K: "),
    ],
)
def test_what_cannot_be_is_one_line(words, code, message, path, tmp_path, capsys):
    rubbish = tmp_path / "rubbish"
    rubbish.write_text('{"question": "x", "answer": "none"}')
    assert cli.main(["eval", "gsm8k", *words.format(path=path, rubbish=rubbish).split()]) == code
    assert capsys.readouterr().err.startswith(f"pointsman eval gsm8k: {message.format(rubbish=rubbish)}")


def test_the_grader_of_a_failed_request_says_invalid():
    assert gsm8k.verdict(PROBLEMS[1], gsm8k.Reply("1001", 1)) == "right"
    assert gsm8k.verdict(PROBLEMS[1], gsm8k.Reply("1001", 1, error="no")) == "invalid"
