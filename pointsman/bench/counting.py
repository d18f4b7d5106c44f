"""More story shapes: seats and tickets, ages, times, animals, and plain arithmetic; and sentences that only distract."""

from pointsman.bench import vocabulary as words
from pointsman.bench.story import Story, Unsuitable


def seats(story: Story) -> None:
    """Rows of seats in sections, some taken, tickets sold."""
    venue = story.choose(words.VENUES)
    thing, taken = story.choose((("seats", "taken"), ("chairs", "occupied"), ("places", "reserved"), ("lockers", "in use")))
    rows, each = story.between(2, story.choose((9, 40))), story.between(3, story.choose((9, 40)))
    story.say(
        (
            "A {venue} has {n} rows with {k} {thing} in each row.",
            "In a {venue} there are {n} rows of {k} {thing}.",
            "There are {k} {thing} in each of the {n} rows of a {venue}.",
        ),
        venue=venue,
        n=rows,
        k=each,
        thing=thing,
    )
    total = story.step(f"{thing} in the rows", rows, "*", each)
    if story.rng.random() < 0.4:
        extra = story.between(2, story.choose((20, 200)))
        story.say(
            ("The balcony has {n} more {thing}.", "At the back there are {n} more {thing}.", "Another {n} {thing} are added."),
            n=extra,
            thing=thing,
        )
        total = story.step(f"all {thing}", total, "+", extra)
    for _ in range(story.choose((1, 1, 2))):
        count = story.between(2, total - 2)
        story.say(
            ("{n} of the {thing} are {taken}.", "{n} {thing} are {taken} by {people}.", "{n} {thing} are broken."),
            n=count,
            thing=thing,
            taken=taken,
            people=story.choose(words.PEOPLE).split(":")[0],
        )
        total = story.step(f"{thing} left", total, "-", count)
    if story.rng.random() < 0.6:
        return story.ask(
            [
                (f"How many {thing} are free?", f"{{answer}} {thing} are free."),
                (f"How many {thing} can still be used?", f"{{answer}} {thing} can still be used."),
            ],
            total,
        )
    price = story.between(2, story.choose((9, 9, 40)))
    story.say(("A ticket for one of the free {thing} costs {m}.", "Each of the others is sold for {m}."), thing=thing, m=story.money(price))
    value = story.step("money from the tickets", total, "*", price)
    return story.ask_money(
        [
            ("How much money do the others bring in?", "They bring in {answer}."),
            ("How much is that if all the rest are sold?", "If all the rest are sold, that is {answer}."),
        ],
        value,
    )


def ages(story: Story) -> None:
    """Ages compared, and some years later."""
    person = story.person()
    age, times = story.between(4, 30), story.between(2, 4)
    relative = story.choose(("mother", "father", "aunt", "uncle", "teacher", "grandmother", "neighbour"))
    word = "twice" if times == 2 else f"{words.number_words(times)} times"
    story.past = False
    story.say(("{Who} is {n} years old.", "{Who} is {n}."), person, n=age)
    story.say(
        ("{Her} {relative} is {times} as old.", "{name}'s {relative} is {times} as old as {name}."),
        person,
        times=word,
        relative=relative,
        Her=person.possessive.capitalize(),
        name=person.name,
    )
    other = story.step(f"age of the {relative}", age, "*", times)
    if story.rng.random() < 0.5:
        younger = story.between(2, min(20, other - 3))
        name = story.person().name
        story.say(("{name} is {n} years younger than the {relative}.",), name=name, n=younger, relative=relative)
        other = story.step(f"age of {name}", other, "-", younger)
    else:
        name = f"the {relative}"
    kind = story.rng.random()
    if kind < 0.5:
        years = story.between(2, 30)
        value = story.step(f"age in {years} years", other, "+", years)
        return story.ask([(f"How old will {name} be in {years} years?", f"In {years} years {name} will be {{answer}} years old.")], value)
    value = story.step("ages together", age, "+", other)
    return story.ask(
        [
            (f"How old are {person.name} and {name} together?", "Together they are {answer} years old."),
            (f"What is the sum of the ages of {person.name} and {name}?", "The sum of their ages is {answer}."),
        ],
        value,
    )


TASKS = words.listed(
    "reading,homework,piano practice,training,the walk to school,breakfast,cooking,drawing,gardening,chess,language lessons,cleaning", ","
)


def times(story: Story) -> None:
    """Minutes spent on this and that, over several days."""
    person = story.person(first_share=0.15)
    tasks = list(TASKS)
    story.rng.shuffle(tasks)
    total = 0
    for index, task in enumerate(tasks[: story.between(2, 3)]):
        minutes = story.between(5, story.choose((30, 95)))
        forms = ("{Who} [spend] {n} minutes on {task}.", "{task} [take] {n} minutes.", "Then {who} [spend] {n} minutes on {task}.")
        story.say(forms if index else forms[:2], person, n=minutes, task=task)
        total = story.step(f"minutes with {task}", total, "+", minutes) if index else minutes
    if story.rng.random() < 0.6:
        days = story.between(2, 9)
        story.say(("{Who} [do] this on {n} days.", "It [be] the same on {n} days."), person, n=days)
        total = story.step(f"minutes in {days} days", total, "*", days)
    if story.rng.random() < 0.4 or len(story.lines) < 2:
        goal = total + story.between(2, 200)
        story.say(("The plan for the week [be] {n} minutes.", "{Who} [plan] {n} minutes in all."), person, n=goal)
        value = story.step("minutes missing", goal, "-", total)
        return story.ask(
            [
                ("How many minutes are missing?", "{answer} minutes are missing."),
                ("How many more minutes are needed?", "{answer} more minutes are needed."),
            ],
            value,
        )
    return story.ask(
        [
            ("How many minutes is that in total?", "That is {answer} minutes in total."),
            ("What is the total number of minutes?", "The total is {answer} minutes."),
        ],
        total,
    )


ANIMALS = (("cows", 4), ("sheep", 4), ("goats", 4), ("horses", 4), ("chickens", 2), ("ducks", 2), ("geese", 2), ("turkeys", 2))


def legs(story: Story) -> None:
    """Animals on a farm, counted by head, by leg or by meal."""
    first, second = story.choose(ANIMALS), story.choose(ANIMALS)
    if first == second:
        raise Unsuitable
    pens, each, others = story.between(2, 9), story.between(2, 30), story.between(3, 99)
    story.say(
        ("A farm has {n} pens with {k} {a} in each and {m} {b}.", "On a farm there are {n} pens of {k} {a} and also {m} {b}."),
        n=pens,
        k=each,
        m=others,
        a=first[0],
        b=second[0],
    )
    count = story.step(f"{first[0]}", pens, "*", each)
    kind = story.rng.random()
    if kind < 0.4:
        total = story.step("animals", count, "+", others)
        meal = story.between(2, 9)
        story.say(("Each animal eats {k} kilos of food a day.", "Every animal needs {k} kilos of food each day."), k=meal)
        value = story.step("kilos of food", total, "*", meal)
        return story.ask(
            [
                ("How many kilos of food are needed each day?", "{answer} kilos of food are needed each day."),
                ("How many kilos do the animals eat in a day?", "The animals eat {answer} kilos in a day."),
            ],
            value,
        )
    if kind < 0.7:
        one = story.step(f"legs of the {first[0]}", count, "*", first[1])
        two = story.step(f"legs of the {second[0]}", others, "*", second[1])
        value = story.step("legs", one, "+", two)
        return story.ask([("How many legs do the animals have in all?", "The animals have {answer} legs in all.")], value)
    total = story.step("animals", count, "+", others)
    sold = story.between(2, total - 2)
    story.say(("{n} of the animals are sold.", "The farmer sells {n} animals."), n=sold)
    value = story.step("animals left", total, "-", sold)
    return story.ask(
        [
            ("How many animals are left?", "{answer} animals are left."),
            ("How many animals does the farm have now?", "The farm now has {answer} animals."),
        ],
        value,
    )


def plain(story: Story) -> None:
    """Arithmetic without a story, one or two operations."""
    operator = story.choose("++--**/")
    if operator == "*":
        left, right = story.between(2, story.choose((9, 99, 999))), story.between(2, story.choose((9, 9, 60)))
    elif operator == "/":
        right = story.choose((2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30, 40, 50, 60))
        left = right * story.between(2, story.choose((20, 150, 900)))
    else:
        left = story.size() if story.rng.random() < 0.7 else story.between(1000, 6000)
        right = story.between(2, left - 1) if operator == "-" else story.size()
    symbol = story.choose(
        {"*": ("*", "x", "×", "times"), "/": ("/", "÷", "divided by"), "+": ("+", "+", "plus"), "-": ("-", "-", "minus")}[operator]
    )
    shown, reply = f"{left} {symbol} {right}", f"{left} {operator} {right} = {{answer}}"
    value = story.step("result", left, operator, right)
    if story.rng.random() < 0.3:
        second, count = story.choose("+-"), story.between(2, max(2, min(500, value - 2)))
        shown += f" {'plus' if len(symbol) > 1 and second == '+' else 'minus' if len(symbol) > 1 else second} {count}"
        reply = reply.replace(" = ", f" {second} {count} = ")
        value = story.step("then", value, second, count)
    story.ask(
        [
            (f"What is {shown}?", reply),
            (f"Calculate {shown}.", reply),
            (f"{shown} = ?", reply),
            (f"How much is {shown}?", reply),
            (f"Compute {shown}", reply),
            (shown, reply),
        ],
        value,
    )


def distraction(story: Story) -> str:
    """A sentence with a number that the solution does not use, about nobody and nothing in the story."""
    name, goods = story.choose(words.WOMEN + words.MEN), story.choose(words.GOODS)
    told = " ".join([*story.sentences, story.question])
    if name in told or goods in told:
        raise Unsuitable
    return story.fill(
        story.choose(
            (
                "{name} is {n} years old.",
                "The {shop} opened {n} years ago.",
                "{name} has {n} {goods}.",
                "It is {n} degrees outside.",
                "There are {n} {people} nearby.",
                "The bus ride takes {n} minutes.",
                "{name} lives at number {n}.",
                "The {shop} closes at {h} o'clock.",
                "A {colour} bag costs ${n}.",
                "Last year {name} read {n} books.",
                "It is the {h}th of the month.",
                "It is a sunny {day}.",
                "Everybody is in a good mood.",
                "{name} likes {colour} {goods} best.",
                "The {shop} is {h} kilometres away.",
            )
        ),
        name=name,
        n=story.between(3, 99),
        h=str(story.between(4, 19)),
        shop=story.choose(words.SHOPS),
        goods=goods,
        people=story.choose(words.PEOPLE).split(":")[0],
        colour=story.choose(words.COLOURS),
        day=story.choose(words.DAYS),
    )
