"""Stories of a shop: prices times counts, a discount, and then the total, the change, or equal shares."""

from pointsman.bench import vocabulary as words
from pointsman.bench.story import Person, Story, Unsuitable


def shopping(story: Story) -> None:
    """Prices times counts, then the total, the change, the shares or what is left to save."""
    person = story.person(first_share=0.15)
    shop = story.choose(words.SHOPS)
    story.say(
        ("{Who} [go] shopping.", "{Who} [visit] the {shop}.", "{Who} [be] at the {shop}.", "On {day} {who} [go] to the {shop}.")
        if story.rng.random() < 0.5 and not story.past
        else ("{Who} [visit] the {shop}.", "{Who} [need] things from the {shop}."),
        person,
        shop=shop,
        day=story.choose(words.DAYS),
    ) if not person.first else None
    total = 0
    for index in range(story.choose((1, 2, 2, 2, 3))):
        goods = story.choose(words.GOODS)
        if goods in story.names_taken:
            raise Unsuitable
        count, price = story.between(2, story.choose((9, 9, 40))), story.between(2, story.choose((9, 9, 60, 150)))
        story.say(
            (
                "{Who} [buy] {n} {goods} for {m} each.",
                "{Who} [buy] {n} {goods} at {m} apiece.",
                "{Who} [take] {n} {goods}, which cost {m} each.",
                "One of the {goods} costs {m}, and {who} [buy] {n}.",
            ),
            person,
            n=count,
            goods=goods,
            m=story.money(price),
        )
        cost = story.step(f"cost of the {goods}", count, "*", price)
        total = story.step("cost so far", total, "+", cost) if index else cost
    total = discount(story, total)
    shopping_end(story, person, total)


def discount(story: Story, total: int) -> int:
    kind = story.rng.random()
    if kind < 0.15:
        off = story.between(2, max(2, min(total - 2, 40)))
        story.say(("There is a coupon for {m} off.", "The seller takes {m} off the price.", "A voucher takes {m} off."), m=story.money(off))
        return story.step("cost after the coupon", total, "-", off)
    if kind < 0.3:
        percent, parts = story.choose(((10, 10), (20, 5), (50, 2), (25, 4)))
        story.say(
            ("There is a discount of {p} percent.", "Everything is {p}% off.", "The seller gives a {p} percent discount."), p=str(percent)
        )
        off = story.step("discount", total, "/", parts)
        return story.step("cost after the discount", total, "-", off)
    return total


def shopping_end(story: Story, person: Person, total: int) -> None:
    does, name = ("do", "I") if person.first else ("does", person.name)
    s = "" if person.first else "s"
    kind = story.rng.random()
    if kind < 0.35:
        if len(story.lines) < 2:
            raise Unsuitable
        story.ask_money(
            [
                (f"How much {does} {name} pay in total?", f"{person.you} pay{s} {{answer}} in total."),
                ("What is the total cost?", "The total cost is {answer}."),
                (f"How much {does} {name} spend?", f"{person.you} spend{s} {{answer}}."),
            ],
            total,
        )
    elif kind < 0.75:
        notes = [note for note in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if note > total + 1]
        if not notes:
            raise Unsuitable
        note = story.choose(notes[:2]) if story.rng.random() < 0.6 else total + story.between(2, 200)
        story.say(
            ("{Who} [pay] with {m}.", "{Who} [give] the seller {m}.", "{Who} [have] {m} to spend.", "{Her} wallet holds {m}."),
            person,
            m=story.money(note),
            Her=person.possessive.capitalize(),
        )
        value = story.step("money left", note, "-", total)
        story.ask_money(
            [
                (f"How much money {does} {name} have left?", f"{person.you} {'have' if person.first else 'has'} {{answer}} left."),
                (f"How much change {does} {name} get?", f"{person.you} get{s} {{answer}} in change."),
            ],
            value,
        )
    else:
        people, one = story.choose(words.PEOPLE).split(":")
        count = story.divisor(total)
        story.say(("{n} {people} share the cost equally.", "The cost is split equally among {n} {people}."), n=count, people=people)
        value = story.step(f"share of each {one}", total, "/", count)
        story.ask_money(
            [(f"How much does each {one} pay?", f"Each {one} pays {{answer}}."), ("How much is one share?", "One share is {answer}.")],
            value,
        )
