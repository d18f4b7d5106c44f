"""The word problems: the solutions are true, the splits are disjoint, the checks tell right from wrong."""

import re
from itertools import islice
from random import Random

import pytest

from pointsman.bench import arithmetic
from pointsman.bench.equations import equation, places
from pointsman.bench.vocabulary import number_words, past, third_person


def drawn(split: str, seed: int, count: int) -> list[arithmetic.ArithmeticProblem]:
    return list(islice(arithmetic.problems(split, seed), count))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_equation_is_true_and_the_last_one_is_the_answer(split):
    for problem in drawn(split, 11, 400):
        for line in problem.thinking.splitlines():
            sides = line.rpartition(": ")[2].split(" = ")
            assert len(sides) >= 2
            assert len({eval(side) for side in sides}) == 1, line
        assert int(line.rpartition(" = ")[2]) == problem.answer
        assert arithmetic.check(problem, f"{problem.thinking}\n</think>\n\n{problem.reply}") == "right"


def test_every_number_of_the_first_step_is_in_the_question():
    for problem in drawn("heldout", 5, 200):
        if problem.follow_up:
            continue
        question = problem.messages[-1]["content"].lower().replace(",", "")
        for number in re.findall(r"\d+", problem.thinking.splitlines()[0].partition(" = ")[0].rpartition(": ")[2]):
            value = int(number)
            words = {number, number_words(value) if value < 1000 else number}
            implied = {
                "2": ("half", "twice", "double", "50"),
                "3": ("third", "triple"),
                "4": ("quarter", "25"),
                "5": ("fifth", "20"),
                "10": ("tenth",),
            }
            assert any(word in question for word in words | set(implied.get(number, ()))), (number, question)


def test_no_question_is_in_both_splits():
    train = {problem.messages[0]["content"] for problem in drawn("train", 1, 4000)}
    heldout = {problem.messages[0]["content"] for problem in drawn("heldout", 1, 1000)}
    assert not train & heldout
    assert not any(map(arithmetic.is_heldout, train))
    assert all(map(arithmetic.is_heldout, heldout))


def test_a_question_belongs_to_one_split_however_it_is_spaced_or_capitalised():
    for problem in drawn("heldout", 2, 50):
        question = problem.messages[0]["content"]
        assert arithmetic.is_heldout("  " + question.upper().replace(" ", "\n "))


def test_the_stream_is_a_function_of_split_and_seed():
    assert drawn("heldout", 3, 50) == drawn("heldout", 3, 50)
    assert drawn("heldout", 3, 50) != drawn("heldout", 4, 50)


def test_the_mix_has_all_step_counts_families_and_follow_ups():
    problems = drawn("heldout", 0, 1000)
    assert {problem.steps for problem in problems if not problem.follow_up} == {1, 2, 3, 4, 5, 6}
    assert {problem.family for problem in problems} == {family.__name__ for family, _ in arithmetic.FAMILIES}
    assert 100 < sum(problem.follow_up for problem in problems) < 300
    assert all(2 <= problem.answer <= 9999 for problem in problems if not problem.follow_up)
    assert all(message["content"] for problem in problems for message in problem.messages)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        next(arithmetic.problems("test", 0))


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("84 / 2 = 42\n</think>\n\nShe has 42 pens.", "right"),
        ("She has 42 pens", "right"),
        ("The cost is $1,042.", "wrong"),
        ("So it is 7, no, 42.", "right"),
        ("42\n</think>\n\nI do not know.", "invalid"),
        ("", "invalid"),
    ],
)
def test_the_last_number_after_the_reasoning_counts(completion, verdict):
    problem = arithmetic.ArithmeticProblem(messages=[], thinking="", reply="", answer=42, steps=1, family="plain")
    assert arithmetic.check(problem, completion) == verdict


def test_equations_agree_with_python():
    rng = Random(0)
    for _ in range(2000):
        left, right = rng.randint(1, 5000), rng.randint(1, 99)
        assert equation(left, "+", right)[0] == left + right
        assert equation(left + right, "-", right)[0] == left
        assert equation(left, "*", right)[0] == left * right
        assert equation(left * right, "/", right)[0] == left
    with pytest.raises(ValueError, match="multiple"):
        equation(7, "/", 2)


def test_equations_are_written_out_step_by_step():
    assert equation(36, "+", 48)[1] == "36 + 48 = 76 + 8 = 84"
    assert equation(7, "*", 236)[1] == "236 * 7 = 1400 + 210 + 42 = 1610 + 42 = 1652"
    assert equation(1652, "/", 7)[1] == "1652 / 7 = 200 + 252 / 7 = 230 + 42 / 7 = 236"
    assert equation(720, "/", 40)[1] == "720 / 40 = 72 / 4 = 10 + 32 / 4 = 18"
    assert places(1304) == [1000, 300, 4]


def test_words():
    assert [number_words(n) for n in (7, 40, 86, 100, 315)] == ["seven", "forty", "eighty-six", "one hundred", "three hundred and fifteen"]
    assert [third_person(v) for v in ("buy", "catch", "carry", "have")] == ["buys", "catches", "carries", "has"]
    assert [past(v) for v in ("buy", "pick", "carry", "bake")] == ["bought", "picked", "carried", "baked"]
