"""The accuracy commands, against models whose accuracy is known: one that answers as asked for, and ones that do not."""

import json
import math
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman import cli
from pointsman.bench import accuracy, arithmetic, shares, tools
from pointsman.bench.accuracy import ARITHMETIC, TOOLS, held_out
from pointsman.bench.shares import wilson
from pointsman.request import CompletionOutput, FinishReason, RequestOutput

TASKS = {"arithmetic": ARITHMETIC, "tools": TOOLS}


def solution(problem):
    """What a perfect model writes."""
    call = getattr(problem, "call", None)
    return f"{problem.thinking}\n</think>\n\n{problem.reply if call is None else tools.call_text(*call)}"


class KnownModel:
    """Answers the held-out problems of a task with what `write(index, problem)` returns."""

    def __init__(self, task, write, finish=FinishReason.STOP):
        self.task, self.write, self.finish = task, write, finish
        self.rendered = []
        self.engine = types.SimpleNamespace(
            model_name="known", choices={"device": "cpu", "moe_runner_backend": "cpu"}, step_name="torch", step_is_final=True
        )

    def __call__(self, **config):
        self.config = config
        return self

    def render(self, messages, *, tools=None):
        self.rendered.append((messages, tools))
        return [len(self.rendered) - 1]

    def generate(self, prompts, params):
        self.params = params
        problems = held_out(self.task, len(prompts), 3)
        assert [(problem.messages, getattr(problem, "tools", None)) for problem in problems] == self.rendered
        results = []
        for (index,), problem in zip(prompts, problems, strict=True):
            output = CompletionOutput(index=0, text=self.write(index, problem), token_ids=[0] * 10, finish_reason=self.finish)
            results.append(RequestOutput(request_id=str(index), prompt=None, prompt_token_ids=[index], outputs=[output]))
        return results

    def close(self):
        pass


def evaluate(monkeypatch, capsys, model, *words):
    monkeypatch.setattr(accuracy, "LLM", model)
    assert cli.main(["eval", model.task.name, "--num-questions", "40", "--seed", "3", *words]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_model_has_accuracy_one(name, monkeypatch, capsys):
    model = KnownModel(TASKS[name], lambda index, problem: solution(problem))
    out, summary = evaluate(monkeypatch, capsys, model, "--moe-runner-backend", "cpu", "--max-tokens", "300")
    assert (summary["accuracy"], summary["invalid"], summary["truncated"]) == (1.0, 0.0, 0.0)
    assert (summary["eval"], summary["num_questions"], summary["output_tokens"], summary["seed"]) == (name, 40, 400, 3)
    assert (summary["model"], summary["moe_runner_backend"]) == ("known", "cpu")
    assert summary["output_throughput"] > 0
    assert sum(total for _, total in summary["groups"].values()) == 40
    assert "Accuracy: 1.000 (95 % interval 0.912 to 1.000, 40 questions)" in out
    assert all(line in out for line in ("Invalid: 0.000", "Latency: ", "Output throughput: "))
    assert model.config == {"moe_runner_backend": "cpu"}
    assert (model.params.temperature, model.params.max_tokens) == (0.0, 300)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_is_right_every_other_time(name, monkeypatch, capsys):
    wrong = "So be it.\n</think>\n\n0.5 of nothing <minimax:tool_call>" if name == "tools" else "x\n</think>\n\nIt is 0.5."
    model = KnownModel(TASKS[name], lambda index, problem: wrong if index % 2 else solution(problem))
    summary = evaluate(monkeypatch, capsys, model)[1]
    assert summary["accuracy"] == 0.5
    assert summary["invalid"] == (0.5 if name == "tools" else 0.0)


def test_a_model_without_answers_is_invalid_and_truncated(monkeypatch, capsys):
    model = KnownModel(ARITHMETIC, lambda index, problem: "hm</think>", FinishReason.LENGTH)
    out, summary = evaluate(monkeypatch, capsys, model)
    assert (summary["accuracy"], summary["invalid"], summary["truncated"]) == (0.0, 1.0, 1.0)
    assert "Truncated: 1.000" in out


def test_answers_are_saved_and_wrong_ones_shown(monkeypatch, capsys, tmp_path):
    model = KnownModel(TOOLS, lambda index, problem: "no</think>" if index == 5 else solution(problem))
    out, summary = evaluate(monkeypatch, capsys, model, "--save", str(tmp_path / "answers.jsonl"), "--show", "2")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert [index for index, line in enumerate(lines) if line["verdict"] != "right"] == [5]
    assert lines[5]["completion"] == "no</think>"
    assert lines[5]["tools"] and lines[5]["messages"]
    assert out.count("\nwanted: ") == 1
    assert summary["accuracy"] == 0.975


def test_a_file_that_cannot_be_written_is_told_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(accuracy, "LLM", None)
    assert cli.main(["eval", "tools", "--save", str(tmp_path / "no" / "where")]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", TASKS)
def test_the_questions_are_held_out_distinct_and_the_same_every_time(name):
    first, again, other = (held_out(TASKS[name], 200, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({json.dumps([problem.messages, getattr(problem, "tools", None)]) for problem in first}) == 200
    for problem in first:
        if name == "arithmetic":
            assert arithmetic.is_heldout(problem.messages[0]["content"])
        else:
            assert all(tools.is_heldout(tool["function"]["name"]) for tool in problem.tools)


@settings(deadline=None)
@given(st.integers(1, 3000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_is_where_the_score_test_just_rejects(counts):
    """Its ends solve |share - p| = z sqrt(p (1 - p) / n), which is how the interval is defined."""
    hits, total = counts
    low, high = wilson(hits, total)
    share = hits / total
    assert 0.0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1.0
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:  # nearer than that is rounding: the end is 0 or 1
            assert abs(share - end) == pytest.approx(shares.Z_95 * math.sqrt(end * (1 - end) / total), abs=1e-9)
