"""Stories of other shapes: comparing, working rates, journeys and savings."""

from pointsman.bench import vocabulary as words
from pointsman.bench.story import Story, Unsuitable


def relate(story: Story, name: str, other: str, amount: int, goods: str) -> int:
    """Say how many the next person has compared with another, and solve it."""
    kind = story.choose(("more", "more", "fewer", "fewer", "times", "times", "half"))
    if kind in ("more", "fewer"):
        count = story.between(2, max(2, amount - 2))
        story.say(
            ("{name} [have] {n} {kind} {goods} than {other}.", "{name} [have] {n} {kind} than {other}."),
            name=name,
            other=other,
            n=count,
            kind=kind,
            goods=goods,
        )
        return story.step(f"{name}'s {goods}", amount, "+" if kind == "more" else "-", count)
    if kind == "half":
        story.say(
            ("{name} [have] half as many {goods} as {other}.", "{name} [have] half as many as {other}."),
            name=name,
            other=other,
            goods=goods,
        )
        return story.step(f"{name}'s {goods}", amount, "/", 2)
    times = story.between(2, 6)
    word = "twice" if times == 2 else f"{words.number_words(times)} times"
    story.say(
        ("{name} [have] {times} as many {goods} as {other}.", "{name} [have] {times} as many as {other}."),
        name=name,
        other=other,
        times=word,
        goods=goods,
    )
    return story.step(f"{name}'s {goods}", amount, "*", times)


def comparing(story: Story) -> None:
    """Two to four people, each compared with one before; then a total, a difference or a share."""
    goods = story.choose((*words.GOODS, "points", "pages", "steps", "tokens", "cards", "laps"))
    names, amounts = [story.person().name], [story.size()]
    story.say(
        ("{name} [have] {n} {goods}.", "{name} [collect] {n} {goods}.", "{name} [count] {n} {goods}."),
        name=names[0],
        n=amounts[0],
        goods=goods,
    )
    for _ in range(story.choose((1, 1, 2, 2, 3))):
        back = len(names) - 1 if story.rng.random() < 0.7 else story.between(0, len(names) - 1)
        name = story.person().name
        amounts.append(relate(story, name, names[back], amounts[back], goods))
        names.append(name)
    kind = story.rng.random()
    if kind < 0.5 or len(story.lines) < 2:
        total = amounts[0]
        for name, amount in zip(names[1:], amounts[1:], strict=True):
            total = story.step(f"together with {name}", total, "+", amount)
        story.ask(
            [
                (f"How many {goods} do they have together?", f"Together they have {{answer}} {goods}."),
                (f"How many {goods} do they have in total?", f"In total they have {{answer}} {goods}."),
            ],
            total,
        )
    elif kind < 0.8:
        more, less = (0, -1) if amounts[0] > amounts[-1] else (-1, 0)
        value = story.step("difference", amounts[more], "-", amounts[less])
        story.ask(
            [
                (
                    f"How many more {goods} does {names[more]} have than {names[less]}?",
                    f"{names[more]} has {{answer}} more {goods} than {names[less]}.",
                ),
                (f"What is the difference between {names[0]} and {names[-1]}?", f"The difference is {{answer}} {goods}."),
            ],
            value,
        )
    else:
        story.ask([(f"How many {goods} does {names[-1]} have?", f"{names[-1]} has {{answer}} {goods}.")], amounts[-1])


def working(story: Story) -> None:
    """A rate times a time, more of it, then what is left or how it is packed."""
    who = story.choose((f"a {story.choose(words.MACHINES)}", f"the {story.choose(words.CROPS)}", story.person().name, story.person().name))
    goods = story.choose(words.GOODS)
    unit, units = story.choose((("day", "days"), ("hour", "hours"), ("week", "weeks"), ("minute", "minutes")))
    rate, time = story.between(2, story.choose((9, 60, 250))), story.between(2, story.choose((9, 9, 30)))
    story.say(
        ("{who} [make] {n} {goods} per {unit}.", "Every {unit} {who} [make] {n} {goods}.", "{who} [produce] {n} {goods} each {unit}."),
        who=who,
        n=rate,
        goods=goods,
        unit=unit,
    )
    story.say(("This goes on for {n} {units}.", "The work takes {n} {units}.", "That continues for {n} {units}."), n=time, units=units)
    total = story.step(f"{goods} in {time} {units}", rate, "*", time)
    if story.rng.random() < 0.5:
        rate, time = story.between(2, story.choose((9, 60, 250))), story.between(2, 9)
        story.say(
            (
                "Then the rate changes to {r} {goods} per {unit} for {n} more {units}.",
                "For another {n} {units} it is {r} {goods} per {unit}.",
                "After that come {n} {units} with {r} {goods} per {unit}.",
            ),
            r=rate,
            n=time,
            goods=goods,
            unit=unit,
            units=units,
        )
        more = story.step(f"{goods} in the next {time} {units}", rate, "*", time)
        total = story.step(f"{goods} in total", total, "+", more)
    if story.rng.random() < 0.5:
        count = story.between(2, total - 2)
        story.say(
            (
                "{n} of them are sold.",
                "{n} {goods} turn out to be faulty and are thrown away.",
                "{n} of the {goods} are given away.",
                "{n} {goods} get lost.",
            ),
            n=count,
            goods=goods,
        )
        total = story.step(f"{goods} left", total, "-", count)
    working_end(story, goods, total)


def working_end(story: Story, goods: str, total: int) -> None:
    if story.rng.random() < 0.5 or len(story.lines) < 2:
        many, one = story.choose(words.CONTAINERS).split(":")
        if many == goods:
            raise Unsuitable
        each = story.divisor(total)
        story.say(
            ("They are packed into {many} of {n}.", "Each {one} holds {n} {goods}.", "All are packed, {n} in each {one}."),
            n=each,
            many=many,
            one=one,
            goods=goods,
        )
        total = story.step(f"{many} needed", total, "/", each)
        story.ask(
            [
                (f"How many {many} are needed?", f"{{answer}} {many} are needed."),
                (f"How many {many} does that fill?", f"That fills {{answer}} {many}."),
            ],
            total,
        )
    else:
        story.ask(
            [
                (f"How many {goods} are there now?", f"There are now {{answer}} {goods}."),
                (f"How many {goods} is that in the end?", f"In the end that is {{answer}} {goods}."),
            ],
            total,
        )


def journey(story: Story) -> None:
    """Legs of a trip at given speeds; then the distance, what is left, or the hours still to go."""
    start, end = story.choose(words.TOWNS), story.choose(words.TOWNS)
    if start == end:
        raise Unsuitable
    vehicle = story.choose(words.VEHICLES)
    length = story.choose(("km", "kilometres", "miles"))
    story.say(
        ("A {vehicle} travels from {a} to {b}.", "A {vehicle} leaves {a} for {b}.", "A {vehicle} is on its way from {a} to {b}."),
        vehicle=vehicle,
        a=start,
        b=end,
    )
    total = 0
    for index in range(story.choose((1, 2, 2, 3))):
        speed, hours = story.between(8, story.choose((40, 99, 120))), story.between(2, 9)
        story.say(
            (
                "For {n} hours it goes {s} {length} per hour.",
                "It travels {n} hours at {s} {length} per hour.",
                "Then it moves at {s} {length} an hour for {n} hours.",
            ),
            n=hours,
            s=speed,
            length=length,
        )
        leg = story.step(f"{length} in {hours} hours", speed, "*", hours)
        total = story.step(f"{length} so far", total, "+", leg) if index else leg
    journey_end(story, start, end, length, total)


def journey_end(story: Story, start: str, end: str, length: str, total: int) -> None:
    kind = story.rng.random()
    if kind < 0.35 and len(story.lines) > 1:
        return story.ask(
            [
                (f"How many {length} does it travel in total?", f"It travels {{answer}} {length} in total."),
                ("How long is the whole trip?", f"The whole trip is {{answer}} {length} long."),
            ],
            total,
        )
    hours, speed = story.between(2, 9), story.between(8, 99)
    rest = hours * speed
    story.say(
        (
            "The whole trip is {n} {length} long.",
            "From {a} to {b} it is {n} {length}.",
            "The distance between {a} and {b} is {n} {length}.",
        ),
        n=total + rest,
        length=length,
        a=start,
        b=end,
    )
    left = story.step(f"{length} left", total + rest, "-", total)
    if kind < 0.65:
        return story.ask(
            [
                (f"How many {length} are left?", f"{{answer}} {length} are left."),
                (f"How far is it still to {end}?", f"It is still {{answer}} {length} to {end}."),
            ],
            left,
        )
    speed = story.divisor(left, 2, 9) if story.rng.random() < 0.3 else hours
    story.say(
        (
            "The rest is done in {n} equal stages.",
            "It splits the rest into {n} equal parts.",
            "The rest takes {n} hours at a steady speed.",
        ),
        n=speed,
    )
    value = story.step(f"{length} in each part", left, "/", speed)
    return story.ask(
        [
            (f"How many {length} is each part?", f"Each part is {{answer}} {length}."),
            (f"How many {length} does each one cover?", f"Each one covers {{answer}} {length}."),
        ],
        value,
    )


def saving(story: Story) -> None:
    """Wages or pocket money, spending, and a wish with a price."""
    person = story.person(first_share=0.15)
    does, name = ("do", "I") if person.first else ("does", person.name)
    start = story.between(5, story.choose((60, 400)))
    wage, weeks = story.between(2, story.choose((9, 40, 99))), story.between(2, 9)
    story.say(
        ("{Who} [have] {m} in {her} money box.", "{Who} already [have] {m}.", "{Who} [start] with {m}."), person, m=story.money(start)
    )
    unit, units = story.choose((("week", "weeks"), ("hour", "hours"), ("day", "days")))
    story.say(
        (
            "{Who} [earn] {m} per {unit} for {n} {units}.",
            "{Who} [save] {m} every {unit} for {n} {units}.",
            "For {n} {units} {who} [put] aside {m} each {unit}.",
        ),
        person,
        m=story.money(wage),
        n=weeks,
        unit=unit,
        units=units,
    )
    earned = story.step(f"money from {weeks} {units}", wage, "*", weeks)
    total = story.step("money so far", start, "+", earned)
    if story.rng.random() < 0.5:
        spent = story.between(2, total - 2)
        story.say(
            ("{Who} [spend] {m} on {goods}.", "Then {who} [pay] {m} for {goods}.", "{Her} {goods} [cost] {m}."),
            person,
            m=story.money(spent),
            goods=story.choose(words.GOODS),
            Her=person.possessive.capitalize(),
        )
        total = story.step("money after spending", total, "-", spent)
    if story.rng.random() < 0.35:
        return story.ask_money(
            [(f"How much money {does} {name} have now?", f"{person.you} now {'have' if person.first else 'has'} {{answer}}.")], total
        )
    wish = story.choose(words.WISHES)
    more, each = story.between(2, 9), story.between(2, story.choose((9, 40)))
    story.say(
        ("A {wish} costs {m}.", "{Who} [want] a {wish} for {m}.", "The {wish} in the shop costs {m}."),
        person,
        wish=wish,
        m=story.money(total + more * each),
    )
    missing = story.step("money missing", total + more * each, "-", total)
    if story.rng.random() < 0.5:
        return story.ask_money(
            [
                (
                    f"How much more money {does} {name} need for the {wish}?",
                    f"{person.you} need{'' if person.first else 's'} {{answer}} more for the {wish}.",
                )
            ],
            missing,
        )
    story.say(("From now on {who} [save] {m} per {unit}.", "{Who} can save {m} each {unit}."), person, m=story.money(each), unit=unit)
    value = story.step(f"{units} needed", missing, "/", each)
    return story.ask(
        [
            (f"How many more {units} does it take?", f"It takes {{answer}} more {units}."),
            (f"In how many {units} is there enough money for the {wish}?", f"There is enough money for the {wish} in {{answer}} {units}."),
        ],
        value,
    )
