"""Writes a word problem sentence by sentence and keeps its solution line by line.

Sentences come from small templates: `[verb]` is put into the story's person and tense, `{Who}`, `{who}` and `{her}` name the
person, `{n}` and other numbers are written in digits or in words. The solution never depends on the wording's random choices
beyond what the reader can see, so it has one right text.
"""

import re
from collections.abc import Sequence
from random import Random
from typing import TypeVar

from pointsman.bench import vocabulary as words
from pointsman.bench.equations import equation

LARGEST = 9999


T = TypeVar("T")


class Unsuitable(Exception):
    """The numbers drawn do not make a fair problem; draw again."""


class Person:
    """A name with its pronouns; the first person is called I."""

    def __init__(self, name: str, pronoun: str, possessive: str):
        self.name, self.pronoun, self.possessive = name, pronoun, possessive
        self.first = name == "I"
        self.you = "you" if self.first else name
        self.mentioned = False


class Story:
    def __init__(self, rng: Random):
        self.rng = rng
        self.past = rng.random() < 0.5
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.labels: list[tuple[str, int]] = []
        self.names_taken: set[str] = set()
        self.money_form = rng.choice(("${}", "${}", "{} dollars", "{} euros", "{} coins", "€{}"))
        self.words_share = rng.choice((0.0, 0.0, 0.25, 0.6))
        self.question = self.reply = ""
        self.value = 0

    def choose(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def between(self, low: int, high: int) -> int:
        if high < low:
            raise Unsuitable
        return low + int(self.rng.random() * (high - low + 1))

    def size(self) -> int:
        """A starting amount: usually two digits, sometimes up to four."""
        low, high = self.choose(((6, 30), (12, 99), (12, 99), (40, 400), (100, 999), (1000, 4000)))
        return self.between(low, high)

    def person(self, first_share: float = 0.0) -> Person:
        if self.rng.random() < first_share:
            return Person("I", "I", "my")
        woman = self.rng.random() < 0.5
        while True:
            if self.rng.random() < 0.15:
                name = "".join(self.choose(words.SYLLABLES) for _ in range(self.between(2, 3))).capitalize()
            else:
                name = self.choose(words.WOMEN if woman else words.MEN)
            if name not in self.names_taken:
                break
        self.names_taken.add(name)
        return Person(name, "she" if woman else "he", "her" if woman else "his")

    def number(self, value: int) -> str:
        if value <= 100 and self.rng.random() < self.words_share:
            return words.number_words(value)
        if value >= 1000 and self.rng.random() < 0.2:
            return f"{value:,}"
        return str(value)

    def money(self, value: int) -> str:
        return self.money_form.format(value)

    def fill(self, template: str, person: Person | None = None, **values: str | int) -> str:
        """One template as text; numbers are drawn as digits or words, sentence starts are capitals."""
        fields = {key: self.number(value) if isinstance(value, int) else value for key, value in values.items()}
        if person is not None:
            short = person.mentioned and not person.first and len(self.names_taken) == 1 and self.rng.random() < 0.6
            fields["who"] = person.pronoun if short or person.first else person.name
            fields["her"] = person.possessive
            fields["Who"] = fields["who"][0].upper() + fields["who"][1:]
        third = person is None or not person.first
        template = re.sub(r"\[(\w+)\]", lambda match: self.verb(match[1], third), template)
        text = template.format(**fields)
        return text[0].upper() + text[1:]

    def verb(self, verb: str, third: bool) -> str:
        if self.past:
            return words.past(verb)
        return words.third_person(verb) if third else verb

    def say(self, templates: Sequence[str], person: Person | None = None, **values: str | int) -> None:
        template = self.choose(templates)
        self.sentences.append(self.fill(template, person, **values))
        if person is not None and "{who}" in template.lower():
            person.mentioned = True

    def step(self, label: str, left: int, operator: str, right: int) -> int:
        """Add a line to the solution and return its value."""
        if right < 1 or left < 1 or (operator == "-" and left <= right) or (operator == "/" and left % right):
            raise Unsuitable
        value, text = equation(left, operator, right)
        if value > LARGEST:
            raise Unsuitable
        self.lines.append(f"{label}: {text}")
        self.labels.append((label, value))
        return value

    def ask(self, forms: Sequence[tuple[str, str]], value: int, **fields: str) -> None:
        """Close with one of the (question, reply) pairs; `{answer}` in the reply is the value in digits."""
        if value < 2:
            raise Unsuitable
        question, reply = self.choose(forms)
        self.question = question.format(**fields)
        self.reply = reply.format(answer=value, **fields)
        self.question = self.question[0].upper() + self.question[1:]
        self.reply = self.reply[0].upper() + self.reply[1:]
        self.value = value

    def ask_money(self, forms: Sequence[tuple[str, str]], value: int, **fields: str) -> None:
        """Like `ask`, the answer being an amount of money in the story's currency."""
        self.ask(
            [(question, reply.replace("{answer}", self.money_form.replace("{}", "{answer}"))) for question, reply in forms], value, **fields
        )

    def divisor(self, value: int, low: int = 2, high: int = 9) -> int:
        """A divisor of value in the range, or now and then a multiple of ten."""
        found = [d for d in range(low, high + 1) if value % d == 0 and value // d > 1]
        if high >= 9 and self.rng.random() < 0.3:
            found = [d for d in range(10, 100, 10) if value % d == 0 and value // d > 1] or found
        if not found:
            raise Unsuitable
        return self.choose(found)
