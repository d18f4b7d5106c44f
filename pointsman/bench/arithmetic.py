"""Grade-school word problems with their full solution, and the check of an answer.

`problems(split, seed)` is an endless stream. A problem belongs to the held-out split if the SHA-256 of its normalised first question
falls into one bucket of eight, so that no question of one split can occur in the other, whatever the seeds.
The solution (`thinking` and `reply`) is a function of the conversation alone.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from pointsman.bench import counting, journeys, shopping, stories, wholes
from pointsman.bench.equations import equation
from pointsman.bench.story import LARGEST, Story, Unsuitable

FAMILIES = (
    (stories.stock_story, 34),
    (shopping.shopping, 13),
    (journeys.comparing, 12),
    (journeys.working, 8),
    (journeys.journey, 6),
    (journeys.saving, 7),
    (counting.seats, 5),
    (counting.ages, 2),
    (counting.times, 3),
    (counting.legs, 2),
    (counting.plain, 3),
    (wholes.resource, 5),
    (wholes.recipe, 4),
    (wholes.group, 5),
)
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


def is_heldout(question: str) -> bool:
    """True for the questions that training never sees."""
    normal = " ".join(question.lower().split())
    return hashlib.sha256(normal.encode()).digest()[0] % HELDOUT_BUCKETS == 0


def problems(split: str, seed: int, follow_ups: float = 0.2) -> Iterator[ArithmeticProblem]:
    """Endless problems of the split "train" or "heldout"; the share `follow_ups` asks again about an answered problem, once or twice.

    A few of the others come after another problem that was answered in the same conversation.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}: it must be 'train' or 'heldout'")
    rng = Random(f"{split}-{seed}")
    before: ArithmeticProblem | None = None
    while True:
        try:
            problem = draw(rng)
            if is_heldout(problem.messages[0]["content"]) != (split == "heldout"):
                continue
            if rng.random() < follow_ups:
                first = continued(rng, problem)
                yield continued(rng, first) if rng.random() < 0.25 else first
            elif before is not None and rng.random() < follow_ups / 4:
                yield replace(problem, messages=[*answered(before), *problem.messages])
            else:
                yield problem
            before = problem
        except Unsuitable:
            continue


def draw(rng: Random) -> ArithmeticProblem:
    """One problem of any family; raises Unsuitable when its numbers do not work out."""
    story = Story(rng)
    family = FAMILY_POOL[int(rng.random() * len(FAMILY_POOL))]
    family(story)
    if len(story.lines) > 6:
        raise Unsuitable
    sentences = joined(story)
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
    )


def joined(story: Story) -> list[str]:
    """The sentences, some of which become one: "She buys 3 pens. She loses 2." to "She buys 3 pens and loses 2."."""
    sentences: list[str] = []
    for text in story.sentences:
        first, _, rest = text.partition(" ")
        before = sentences[-1] if sentences else ""
        same = before.partition(" ")[0] in {first, *story.names_taken} and "," not in before and " and " not in before
        if first in ("He", "She", "I") and same and before and story.rng.random() < 0.25:
            sentences[-1] = f"{before[:-1]} and {rest}"
        elif first == "Then" and before and story.rng.random() < 0.2:
            sentences[-1] = f"{before[:-1]}, then {rest}"
        else:
            sentences.append(text)
    return sentences


CHANGES = (
    ("+", ("And with {n} more?", "What if there were {n} more?", "Now add {n}.", "How much would it be with {n} more?"), "with {n} more"),
    (
        "-",
        ("And with {n} fewer?", "What if {n} of that were gone?", "Now take away {n}.", "How much would it be with {n} less?"),
        "with {n} less",
    ),
    (
        "*",
        ("And {n} times that?", "What if it were {n} times as much?", "Now multiply that by {n}.", "How much is {n} times as much?"),
        "{n} times that",
    ),
    (
        "/",
        ("And if that were split into {n} equal parts?", "Now divide that by {n}.", "How much is one of {n} equal parts of that?"),
        "one of {n} parts",
    ),
)


def answered(problem: ArithmeticProblem) -> list[dict[str, str]]:
    """The conversation with the right answer."""
    return [*problem.messages, {"role": "assistant", "content": problem.reply, "reasoning_content": problem.thinking}]


def continued(rng: Random, problem: ArithmeticProblem) -> ArithmeticProblem:
    """The problem answered, and another question about it."""
    history = answered(problem)
    if rng.random() < 0.25:
        asked = rng.choice(("How did you get that?", "Can you show the steps?", "Please explain.", "Show me how you got there.", "Why?"))
        return follow(
            problem,
            history,
            asked,
            problem.thinking,
            f"Here are the steps:\n{problem.thinking}\nSo the answer is {problem.answer}.",
            problem.answer,
        )
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


def follow(
    problem: ArithmeticProblem, history: list[dict[str, str]], asked: str, thinking: str, reply: str, answer: int
) -> ArithmeticProblem:
    return ArithmeticProblem(
        messages=[*history, {"role": "user", "content": asked}],
        thinking=thinking,
        reply=reply,
        answer=answer,
        steps=thinking.count("\n") + 1,
        family=problem.family,
        follow_up=True,
    )


def check(problem: ArithmeticProblem, completion: str) -> str:
    """ "right", "wrong", or "invalid" when the text after the reasoning has no number; the last number counts."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion.rpartition("</think>")[2])
    if not numbers:
        return "invalid"
    return "right" if float(numbers[-1].rstrip(",").replace(",", "")) == problem.answer else "wrong"
