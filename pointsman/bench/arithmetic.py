"""Grade-school word problems with their full solution, and the check of an answer.

`problems(split, seed)` is an endless stream. A problem belongs to the held-out split if the SHA-256 of its normalised first question
falls into one bucket of eight, so that no question of one split can occur in the other, whatever the seeds.
The solution (`thinking` and `reply`) is a function of the conversation alone.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from pointsman.bench import counting, journeys, stories
from pointsman.bench.equations import equation
from pointsman.bench.story import LARGEST, Story, Unsuitable

FAMILIES = (
    (stories.stock_story, 34), (journeys.shopping, 14), (journeys.comparing, 13), (journeys.working, 9), (journeys.journey, 7),
    (journeys.saving, 8), (counting.seats, 5), (counting.ages, 2), (counting.times, 3), (counting.legs, 2), (counting.plain, 3),
)  # fmt: skip
FAMILY_POOL = tuple(family for family, weight in FAMILIES for _ in range(weight))
HELDOUT_BUCKETS = 8


@dataclass(frozen=True, kw_only=True)
class ArithmeticProblem:
    """A conversation that ends with a question, and the one right continuation."""

    messages: list[dict[str, str]]
    thinking: str
    reply: str
    answer: int
    steps: int
    family: str
    follow_up: bool = False
    earlier: tuple[str, ...] = field(default=(), repr=False)


def is_heldout(question: str) -> bool:
    """True for the questions that training never sees."""
    normal = " ".join(question.lower().split())
    return hashlib.sha256(normal.encode()).digest()[0] % HELDOUT_BUCKETS == 0


def problems(split: str, seed: int, follow_ups: float = 0.2) -> Iterator[ArithmeticProblem]:
    """Endless problems of the split "train" or "heldout"; the share `follow_ups` continues an answered problem."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}: it must be 'train' or 'heldout'")
    rng = Random(f"{split}-{seed}")
    while True:
        try:
            problem = draw(rng)
            if is_heldout(problem.messages[0]["content"]) == (split == "heldout"):
                yield continued(rng, problem) if rng.random() < follow_ups else problem
        except Unsuitable:
            continue


def draw(rng: Random) -> ArithmeticProblem:
    """One problem of any family; raises Unsuitable when its numbers do not work out."""
    story = Story(rng)
    family = FAMILY_POOL[int(rng.random() * len(FAMILY_POOL))]
    family(story)
    if len(story.lines) > 6:
        raise Unsuitable
    sentences = story.sentences
    if sentences:
        for _ in range(story.choose((0, 0, 1, 1, 2))):
            sentences.insert(story.between(1, len(sentences)), counting.distraction(story))
    question = " ".join([*sentences, story.question])
    return ArithmeticProblem(
        messages=[{"role": "user", "content": question}],
        thinking="\n".join(story.lines),
        reply=story.reply,
        answer=story.value,
        steps=len(story.lines),
        family=family.__name__,
        earlier=tuple(story.lines),
    )


CHANGES = (
    ("+", ("And with {n} more?", "What if there were {n} more?", "Now add {n}.", "How much would it be with {n} more?"), "with {n} more"),
    ("-", ("And with {n} fewer?", "What if {n} of that were gone?", "Now take away {n}.", "How much would it be with {n} less?"), "with {n} less"),
    ("*", ("And {n} times that?", "What if it were {n} times as much?", "Now multiply that by {n}.", "How much is {n} times as much?"), "{n} times that"),
    ("/", ("And if that were split into {n} equal parts?", "Now divide that by {n}.", "How much is one of {n} equal parts of that?"), "one of {n} parts"),
)


def continued(rng: Random, problem: ArithmeticProblem) -> ArithmeticProblem:
    """The problem answered, and a second question about it."""
    history = [*problem.messages, {"role": "assistant", "content": problem.reply, "reasoning_content": problem.thinking}]
    if rng.random() < 0.25:
        asked = rng.choice(("How did you get that?", "Can you show the steps?", "Please explain.", "Show me how you got there.", "Why?"))
        return follow(problem, history, asked, problem.thinking, f"Here are the steps:\n{problem.thinking}\nSo the answer is {problem.answer}.", problem.answer)
    operator, forms, label = CHANGES[int(rng.random() * len(CHANGES))]
    value = problem.answer
    if operator == "/":
        divisors = [d for d in range(2, 10) if value % d == 0 and value > d]
        if not divisors:
            raise Unsuitable
        number = rng.choice(divisors)
    elif operator == "*":
        number = rng.randint(2, 9)
    else:
        number = rng.randint(2, max(2, min(value - 1, 300)))
    if operator == "-" and number >= value:
        raise Unsuitable
    result, text = equation(value, operator, number)
    if result > LARGEST:
        raise Unsuitable
    asked = rng.choice(forms).format(n=number)
    return follow(problem, history, asked, f"{label.format(n=number)}: {text}", f"That would be {result}.", result)


def follow(problem: ArithmeticProblem, history: list, asked: str, thinking: str, reply: str, answer: int) -> ArithmeticProblem:
    return ArithmeticProblem(
        messages=[*history, {"role": "user", "content": asked}], thinking=thinking, reply=reply, answer=answer,
        steps=thinking.count("\n") + 1, family=problem.family, follow_up=True,
    )  # fmt: skip


def check(problem: ArithmeticProblem, completion: str) -> str:
    """"right", "wrong", or "invalid" when the text after the reasoning has no number; the last number counts."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion.rpartition("</think>")[2])
    if not numbers:
        return "invalid"
    return "right" if float(numbers[-1].rstrip(",").replace(",", "")) == problem.answer else "wrong"
