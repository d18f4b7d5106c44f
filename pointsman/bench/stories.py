"""Stories about one person's stock of goods: a start, a chain of interchangeable events, and a question.

An event takes the running amount and returns the new one; it says what happened and adds one or two lines to the solution.
"""

from collections.abc import Sequence

from pointsman.bench import vocabulary as words
from pointsman.bench.story import Person, Story, Unsuitable


class Stock:
    """What the events share: who owns how many of which goods."""

    def __init__(self, story: Story):
        self.story = story
        self.person: Person = story.person(first_share=0.15)
        self.goods = story.choose(words.GOODS)
        self.amount = story.size()

    def container(self) -> tuple[str, str]:
        """Plural and singular of something that can hold the goods."""
        many, one = self.story.choose(words.CONTAINERS).split(":")
        if many == self.goods:
            raise Unsuitable
        return many, one

    def change(self, low: int = 2) -> int:
        """An amount to add or take, of the order of what is there, smaller than it."""
        high = max(low, int(self.amount * self.story.choose((0.2, 0.5, 0.9))))
        return self.story.between(low, min(high, self.amount - 2))

    def say(self, templates: Sequence[str], **values: str | int) -> None:
        self.story.say(templates, self.person, goods=self.goods, **values)

    def step(self, label: str, operator: str, right: int, left: int | None = None) -> int:
        return self.story.step(label, self.amount if left is None else left, operator, right)


GAINS = (
    (
        "buying",
        ("{Who} [buy] {n} more {goods}.", "Then {who} [buy] another {n} {goods} at the {shop}.", "At the {shop} {who} [buy] {n} more."),
    ),
    (
        "finding",
        (
            "{Who} [find] {n} more {goods} in the {place}.",
            "Then {who} [find] {n} in the {place}.",
            "In the {place}, {who} [find] {n} more {goods}.",
        ),
    ),
    (
        "the gift",
        (
            "{Who} [get] {n} more {goods} from {her} {relative}.",
            "Then {her} {relative} [give] {who_obj} {n} more.",
            "As a gift {who} [get] {n} {goods} from {her} {relative}.",
        ),
    ),
    (
        "collecting",
        ("{Who} [collect] {n} more {goods}.", "Later {who} [collect] another {n} {goods}.", "On {day} {who} [collect] {n} more."),
    ),
    ("winning", ("{Who} [win] {n} {goods} in a game.", "Then {who} [win] {n} more {goods}.", "{Who} [win] another {n} on {day}.")),
    ("making", ("{Who} [make] {n} more {goods}.", "On {day} {who} [make] {n} more {goods}.", "After that {who} [make] another {n}.")),
    ("picking", ("{Who} [pick] {n} more {goods}.", "After lunch {who} [pick] another {n}.", "{Who} [pick] up {n} more {goods} on {day}.")),
)
LOSSES = (
    (
        "giving",
        (
            "{Who} [give] {n} {goods} to {her} {relative}.",
            "Then {who} [give] {n} of them to {her} {relative}.",
            "{Who} [give] away {n} {goods}.",
        ),
    ),
    ("losing", ("{Who} [lose] {n} of the {goods}.", "On the way home {who} [lose] {n} {goods}.", "Sadly, {who} [lose] {n} of them.")),
    ("selling", ("{Who} [sell] {n} {goods} at the {shop}.", "Then {who} [sell] {n} of them.", "On {day} {who} [sell] {n} {goods}.")),
    (
        "donating",
        ("{Who} [donate] {n} {goods} to a school.", "{Who} [donate] {n} of the {goods} to charity.", "Later {who} [donate] {n} of them."),
    ),
    (
        "throwing out",
        (
            "{Who} [throw] out {n} broken {goods}.",
            "{n} of the {goods} [be] damaged, so {who} [throw] them out.",
            "Then {who} [throw] {n} old {goods} away.",
        ),
    ),
    (
        "lending",
        (
            "{Who} [lend] {n} {goods} to {her} {relative}.",
            "{Her} {relative} [borrow] {n} {goods}.",
            "Then {who} [lend] {n} of them to a friend.",
        ),
    ),
    ("using", ("{Who} [use] {n} {goods}.", "Then {who} [use] {n} of them.", "On {day} {who} [use] {n} {goods} for a project.")),
)


def gain(stock: Stock) -> None:
    story = stock.story
    name, templates = story.choose(GAINS)
    count = stock.change() if stock.amount > 8 else story.between(2, 30)
    extras = scenery(story, stock.person)
    stock.say(templates, n=count, **extras)
    stock.amount = stock.step(f"{stock.goods} after {name}", "+", count)


def loss(stock: Stock) -> None:
    story = stock.story
    name, templates = story.choose(LOSSES)
    count = stock.change()
    stock.say(templates, n=count, Her=stock.person.possessive.capitalize(), **scenery(story, stock.person))
    stock.amount = stock.step(f"{stock.goods} after {name}", "-", count)


def scenery(story: Story, person: Person) -> dict[str, str]:
    """Words that carry no number: a shop, a place, a relative, a day."""
    return {
        "shop": story.choose(words.SHOPS),
        "place": story.choose(words.FINDS),
        "relative": story.choose(words.RELATIVES),
        "day": story.choose(words.DAYS),
        "who_obj": "me" if person.first else {"she": "her", "he": "him"}[person.pronoun],
    }


def gain_in_containers(stock: Stock) -> None:
    story = stock.story
    many, one = stock.container()
    count, each = story.between(2, 9), story.between(2, story.choose((9, 12, 40, 120)))
    if story.rng.random() < 0.15:
        count = story.choose((10, 12, 15, 20, 30, 40))
    stock.say(
        (
            "{Who} [buy] {n} {many} of {goods} with {k} {goods} in each {one}.",
            "Then {who} [get] {n} {many} with {k} {goods} each.",
            "{Who} [find] {n} {many}, and each {one} [hold] {k} {goods}.",
            "A friend [bring] {n} {many}, each with {k} {goods}.",
        ),
        n=count,
        k=each,
        many=many,
        one=one,
    )
    new = stock.step(f"{stock.goods} in the {many}", "*", each, left=count)
    stock.amount = stock.step(f"{stock.goods} with the {many}", "+", new)


def loss_to_people(stock: Stock) -> None:
    story = stock.story
    people = story.choose(words.PEOPLE).partition(":")[0]
    count = story.between(2, 9)
    each = story.between(2, min(60, (stock.amount - 2) // count))
    stock.say(
        (
            "{Who} [give] {k} {goods} to each of {n} {people}.",
            "Then {who} [give] {n} {people} {k} {goods} each.",
            "{n} {people} [get] {k} {goods} each from {obj}.",
            "{Who} [hand] out {k} {goods} to each of {her} {n} {people}.",
        ),
        n=count,
        k=each,
        people=people,
        obj=scenery(story, stock.person)["who_obj"],
    )
    given = stock.step(f"{stock.goods} for the {people}", "*", each, left=count)
    stock.amount = stock.step(f"{stock.goods} after sharing", "-", given)


def half(stock: Stock) -> None:
    if stock.amount % 2:
        raise Unsuitable
    stock.say(
        (
            "{Who} [give] half of the {goods} to {her} {relative}.",
            "Then {who} [sell] half of them.",
            "{Who} [use] half of the {goods}.",
            "Half of the {goods} [be] lost.",
        ),
        relative=stock.story.choose(words.RELATIVES),
    )
    stock.amount = stock.step(f"half of the {stock.goods}", "/", 2)


def fraction(stock: Stock) -> None:
    name, parts = stock.story.choose((("third", 3), ("quarter", 4), ("fifth", 5), ("tenth", 10)))
    stock.say(
        (
            "{Who} [give] a {part} of the {goods} to {her} {relative}.",
            "Then {who} [sell] a {part} of them.",
            "{Who} [use] a {part} of the {goods}.",
        ),
        part=name,
        relative=stock.story.choose(words.RELATIVES),
    )
    taken = stock.step(f"a {name} of the {stock.goods}", "/", parts)
    stock.amount = stock.step(f"{stock.goods} after that", "-", taken)


def doubling(stock: Stock) -> None:
    word, factor = stock.story.choose((("double", 2), ("double", 2), ("triple", 3)))
    stock.say(
        (
            "Then the number of {goods} {word}s.",
            "In a month {who} [manage] to {word} the number of {goods}.",
            "{Who} [work] hard to {word} the {goods}.",
        ),
        word=word,
    )
    stock.amount = stock.step(f"{word} the {stock.goods}", "*", factor)


EVENTS = (gain, gain, gain, loss, loss, loss, loss, gain_in_containers, gain_in_containers, loss_to_people, half, fraction, doubling)


def start(stock: Stock) -> None:
    story = stock.story
    if story.rng.random() < 0.25:
        many, one = stock.container()
        count, each = story.between(2, 9), story.between(3, story.choose((9, 20, 99)))
        stock.say(
            (
                "{Who} [have] {n} {many} with {k} {goods} in each.",
                "{Who} [fill] {n} {many} with {k} {goods} each.",
                "There were {n} {many} of {k} {goods} in {who_s} room.",
            ),
            n=count,
            k=each,
            many=many,
            who_s="my" if stock.person.first else stock.person.name + "'s",
        )
        stock.amount = stock.step(f"{stock.goods} at first", "*", each, left=count)
    elif story.rng.random() < 0.25:
        first, second = stock.amount, story.size()
        one, two = story.choose(words.COLOURS), story.choose(words.COLOURS)
        if one == two:
            raise Unsuitable
        stock.say(
            ("{Who} [have] {n} {one} {goods} and {k} {two} {goods}.", "{Who} [own] {n} {one} and {k} {two} {goods}."),
            n=first,
            k=second,
            one=one,
            two=two,
        )
        stock.amount = stock.step(f"{stock.goods} at first", "+", second, left=first)
    else:
        stock.say(
            (
                "{Who} [have] {n} {goods}.",
                "{Who} [start] with {n} {goods}.",
                "{Who} [own] {n} {goods}.",
                "On {day} morning {who} [have] {n} {goods}.",
                "In the {place}, {who} [keep] {n} {goods}.",
            ),
            n=stock.amount,
            day=story.choose(words.DAYS),
            place=story.choose(words.FINDS),
        )


def finish_now(stock: Stock) -> None:
    story, person = stock.story, stock.person
    does, has = ("do", "have") if person.first else ("does", "has")
    name = "I" if person.first else person.name
    story.ask(
        [
            (
                f"How many {stock.goods} {does} {name} have now?",
                f"{person.you} now {'have' if person.first else has} {{answer}} {stock.goods}.",
            ),
            (
                f"How many {stock.goods} {does} {name} have in the end?",
                f"In the end {person.you} {'have' if person.first else has} {{answer}} {stock.goods}.",
            ),
            (f"How many {stock.goods} remain?", f"{{answer}} {stock.goods} remain."),
            (f"So how many {stock.goods} is that now?", f"That is now {{answer}} {stock.goods}."),
            (f"How many {stock.goods} are left?", f"There are {{answer}} {stock.goods} left."),
            (f"What is the number of {stock.goods} now?", f"The number of {stock.goods} is now {{answer}}."),
            (f"Find how many {stock.goods} there are at the end.", f"At the end there are {{answer}} {stock.goods}."),
        ],
        stock.amount,
    )


def finish_containers(stock: Stock) -> None:
    story = stock.story
    many, one = stock.container()
    each = story.divisor(stock.amount)
    stock.say(
        (
            "{Who} [pack] all the {goods} into {many} of {n}.",
            "Then {who} [put] all of them into {many}, {n} in each {one}.",
            "Every {one} [hold] {n} {goods}, and {who} [pack] them all.",
        ),
        n=each,
        many=many,
        one=one,
    )
    value = stock.step(f"{many} needed", "/", each)
    story.ask(
        [
            (f"How many {many} are needed?", f"{{answer}} {many} are needed."),
            (f"How many {many} is that?", f"That is {{answer}} {many}."),
            (f"How many {many} are there?", f"There are {{answer}} {many}."),
        ],
        value,
    )


def finish_shares(stock: Stock) -> None:
    story = stock.story
    people, one = story.choose(words.PEOPLE).split(":")
    count = story.divisor(stock.amount)
    stock.say(
        (
            "{Who} [share] the rest equally among {n} {people}.",
            "Then {n} {people} [divide] all of them equally.",
            "At last {who} [give] all the {goods} to {n} {people}, the same number to each.",
        ),
        n=count,
        people=people,
    )
    value = stock.step(f"{stock.goods} for each {one}", "/", count)
    story.ask(
        [
            (f"How many {stock.goods} does each {one} get?", f"Each {one} gets {{answer}} {stock.goods}."),
            (f"How many does each {one} receive?", f"Each {one} receives {{answer}} {stock.goods}."),
        ],
        value,
    )


def finish_sale(stock: Stock) -> None:
    story, person = stock.story, stock.person
    price = story.between(2, 9)
    stock.say(
        (
            "{Who} [sell] all of them for {m} each.",
            "Then {who} [sell] every one of the {goods} for {m}.",
            "Finally, all the {goods} [be] sold at {m} apiece.",
        ),
        m=story.money(price),
    )
    value = stock.step("money from the sale", "*", price)
    does, name = ("do", "I") if person.first else ("does", person.name)
    gets = f"{person.you} {'get' if person.first else 'gets'}"
    story.ask_money(
        [(f"How much money {does} {name} get?", f"{gets} {{answer}}."), ("How much money is that in total?", "That is {answer} in total.")],
        value,
    )


def finish_goal(stock: Stock) -> None:
    story, person = stock.story, stock.person
    goal = stock.amount + story.between(2, max(9, stock.amount))
    stock.say(("{Who} [want] to have {n} {goods}.", "The goal is {n} {goods}.", "{Who} [need] {n} {goods} in all."), n=goal)
    value = stock.step(f"{stock.goods} still missing", "-", stock.amount, left=goal)
    does, name = ("do", "I") if person.first else ("does", person.name)
    needs = f"{person.you} {'need' if person.first else 'needs'}"
    story.ask(
        [
            (f"How many more {stock.goods} {does} {name} need?", f"{needs} {{answer}} more {stock.goods}."),
            ("How many are still missing?", f"{{answer}} {stock.goods} are still missing."),
        ],
        value,
    )


FINISHES = (finish_now, finish_now, finish_now, finish_containers, finish_shares, finish_sale, finish_goal)


def stock_story(story: Story) -> None:
    """One to five events between the start and the question."""
    stock = Stock(story)
    start(stock)
    target = story.between(2, 6)
    finish = story.choose(FINISHES)
    room = 0 if finish is finish_now else 1
    while len(story.lines) + room < target:
        story.choose(EVENTS)(stock)
    finish(stock)
