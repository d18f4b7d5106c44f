"""Stories about a whole and its parts: a stock used up at a rate, a recipe to be made several times, a group made of kinds."""

from pointsman.bench import vocabulary as words
from pointsman.bench.story import Story

RESOURCES = (
    ("A book has {n} pages.", "pages", "{Who} [read] {r} pages a {unit}.", "read"),
    ("A puzzle has {n} pieces.", "pieces", "{Who} [place] {r} pieces every {unit}.", "place"),
    ("A tank holds {n} litres of water.", "litres", "{r} litres flow out each {unit}.", "let out"),
    ("A road of {n} metres is to be built.", "metres", "The workers build {r} metres each {unit}.", "build"),
    ("A wall needs {n} bricks.", "bricks", "{Who} [lay] {r} bricks every {unit}.", "lay"),
    ("There are {n} letters to deliver.", "letters", "{Who} [deliver] {r} letters per {unit}.", "deliver"),
    ("A field has {n} rows to plant.", "rows", "{Who} [plant] {r} rows a {unit}.", "plant"),
    ("A list has {n} words to learn.", "words", "{Who} [learn] {r} words each {unit}.", "learn"),
    ("A machine has {n} parts to check.", "parts", "{Who} [check] {r} parts an hour.", "check"),
    ("The stock is {n} kilos of flour.", "kilos", "The bakery uses {r} kilos each {unit}.", "use"),
)


def resource(story: Story) -> None:
    """A given whole, used up at a rate; then what remains, and how long that lasts."""
    whole, things, rate_form, _ = story.choose(RESOURCES)
    unit, units = ("hour", "hours") if "an hour" in rate_form else story.choose((("day", "days"), ("week", "weeks"), ("hour", "hours")))
    person = story.person(first_share=0.15)
    rate, time = story.between(2, story.choose((9, 30, 90))), story.between(2, 9)
    later, more = story.between(2, 9), story.between(2, story.choose((9, 30)))
    total = rate * time + later * more
    story.say((whole,), n=total)
    story.say((rate_form,), person, r=rate, unit=unit)
    story.say(
        ("That goes on for {n} {units}.", "{n} {units} pass.", "After {n} {units} there is a break.", "This lasts for {n} {units}."),
        n=time,
        units=units,
    )
    done = story.step(f"{things} in {time} {units}", rate, "*", time)
    left = story.step(f"{things} left", total, "-", done)
    if story.rng.random() < 0.4:
        return story.ask(
            [
                (f"How many {things} are left?", f"{{answer}} {things} are left."),
                (f"How many {things} remain?", f"{{answer}} {things} remain."),
                ("How much is left to do?", f"{{answer}} {things} are left."),
            ],
            left,
        )
    if story.rng.random() < 0.5:
        story.say(
            ("The rest is done at {n} {things} per {unit}.", "From then on it is {n} {things} each {unit}."),
            n=more,
            things=things,
            unit=unit,
        )
        value = story.step(f"{units} needed", left, "/", more)
        return story.ask(
            [
                (f"How many more {units} does it take?", f"It takes {{answer}} more {units}."),
                (f"How many {units} does the rest take?", f"The rest takes {{answer}} {units}."),
            ],
            value,
        )
    story.say(("The rest is to be done in {n} {units}.", "There are {n} {units} for the rest."), n=later, units=units)
    value = story.step(f"{things} per {unit}", left, "/", later)
    return story.ask([(f"How many {things} is that per {unit}?", f"That is {{answer}} {things} per {unit}.")], value)


DISHES = words.listed(
    "cake pizza pie salad soup stew sandwich omelette pudding smoothie lasagne curry bracelet necklace kite lantern wreath"
)


def recipe(story: Story) -> None:
    """So many of one thing for each of another, some at hand, some to buy."""
    goods, dish = story.choose(words.GOODS), story.choose(DISHES)
    person = story.person(first_share=0.15)
    each, count = story.between(2, story.choose((9, 24))), story.between(2, story.choose((9, 30)))
    story.say(
        (
            "One {dish} needs {n} {goods}.",
            "It takes {n} {goods} to make a {dish}.",
            "Each {dish} is made of {n} {goods}.",
            "For one {dish}, {who} [need] {n} {goods}.",
        ),
        person,
        n=each,
        goods=goods,
        dish=dish,
    )
    plural = dish[:-1] + "ies" if dish.endswith("ry") else dish + ("es" if dish.endswith(("sh", "ch")) else "s")
    story.say(
        ("{Who} [make] {n} {dishes}.", "{Who} [want] to make {n} {dishes}.", "There are {n} {dishes} to make."),
        person,
        n=count,
        dishes=plural,
    )
    total = story.step(f"{goods} for the {plural}", count, "*", each)
    if story.rng.random() < 0.75:
        have = story.between(2, total - 2)
        story.say(
            ("{Who} already [have] {n} {goods}.", "There are {n} {goods} in the kitchen.", "{n} {goods} are already there."),
            person,
            n=have,
            goods=goods,
        )
        total = story.step(f"{goods} missing", total, "-", have)
    if story.rng.random() < 0.5 or len(story.lines) < 2:
        price = story.between(2, story.choose((9, 30)))
        story.say(
            ("{goods} cost {m} each.", "The price of the {goods} is {m} apiece.", "One of the {goods} costs {m}."),
            goods=goods,
            m=story.money(price),
        )
        value = story.step(f"price of the {goods}", total, "*", price)
        return story.ask_money(
            [
                (f"How much do the {goods} cost that must be bought?", f"The {goods} cost {{answer}}."),
                (f"What is the price of all {goods} to buy?", "The price is {answer}."),
            ],
            value,
        )
    return story.ask(
        [
            (f"How many more {goods} are needed?", f"{{answer}} more {goods} are needed."),
            (f"How many {goods} must be bought?", f"{{answer}} {goods} must be bought."),
        ],
        total,
    )


GROUPS = (
    ("school", "students", ("girls", "boys")),
    ("team", "players", ("beginners", "experts")),
    ("company", "workers", ("women", "men")),
    ("club", "members", ("adults", "children")),
    ("zoo", "animals", ("birds", "fish", "snakes")),
    ("garden", "flowers", ("roses", "tulips", "daisies")),
    ("library", "books", ("novels", "comics", "atlases")),
    ("car park", "vehicles", ("cars", "vans", "motorbikes")),
    ("box", "balls", ("red balls", "blue balls", "green balls")),
    ("choir", "singers", ("altos", "tenors", "basses")),
)


def group(story: Story) -> None:
    """A whole made of kinds: one kind is missing, some come or go, the whole is divided."""
    place, things, kinds = story.choose(GROUPS)
    parts = [story.between(4, story.choose((30, 99, 400))) for _ in kinds]
    total = sum(parts)
    if story.rng.random() < 0.5:
        story.say(("A {place} has {n} {things}.", "There are {n} {things} in a {place}."), place=place, n=total, things=things)
        left = total
        for kind, part in zip(kinds[:-1], parts[:-1], strict=True):
            story.say(("{n} of them are {kind}.", "{n} are {kind}.", "There are {n} {kind}."), n=part, kind=kind)
            left = story.step(f"{things} without the {kind}", left, "-", part)
        story.say(("The others are {kind}.", "All the rest are {kind}."), kind=kinds[-1])
        value, name = left, kinds[-1]
    else:
        listed = ", ".join(f"{story.number(part)} {kind}" for kind, part in zip(kinds[:-1], parts[:-1], strict=True))
        story.say(
            ("A {place} has {listed} and {n} {kind}.", "In a {place} there are {listed} and {n} {kind}."),
            place=place,
            listed=listed,
            n=parts[-1],
            kind=kinds[-1],
        )
        value, name = parts[0], things
        for kind, part in zip(kinds[1:], parts[1:], strict=True):
            value = story.step(f"{things} with the {kind}", value, "+", part)
    if story.rng.random() < 0.6 or len(story.lines) < 2:
        come = story.rng.random() < 0.5
        count = story.between(2, story.choose((20, 90))) if come else story.between(2, value - 2)
        story.say(
            ("Then {n} more {name} come.", "{n} new {name} are added.")
            if come
            else ("Then {n} of the {name} leave.", "{n} {name} are taken away."),
            n=count,
            name=name,
        )
        value = story.step(f"{name} then", value, "+" if come else "-", count)
    if story.rng.random() < 0.4:
        count = story.divisor(value)
        story.say(("The {name} are put into {n} equal groups.", "Somebody divides the {name} into {n} equal groups."), n=count, name=name)
        value = story.step(f"{name} in a group", value, "/", count)
        return story.ask(
            [
                (f"How many {name} are in each group?", f"There are {{answer}} {name} in each group."),
                ("How big is each group?", f"Each group has {{answer}} {name}."),
            ],
            value,
        )
    return story.ask(
        [
            (f"How many {name} are there now?", f"There are now {{answer}} {name}."),
            (f"How many {name} is that?", f"That is {{answer}} {name}."),
            (f"What is the number of {name}?", f"The number of {name} is {{answer}}."),
        ],
        value,
    )
