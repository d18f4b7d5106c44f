"""Parameters of invented tools, values for them with the words that ask for them, and results that tools return."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from pointsman.bench import toolwords
from pointsman.bench import vocabulary as words


@dataclass(frozen=True)
class Parameter:
    """A parameter of a tool: its schema, and how a request words its value."""

    name: str
    schema: dict[str, Any]
    required: bool
    phrases: tuple[str, ...]
    values: str

    @property
    def spoken(self) -> str:
        return self.name.replace("_", " ")


GENERIC = (
    "The {name} should be {value}.",
    "Use {value} as the {name}.",
    "Set the {name} to {value}.",
    "with {name} {value}",
    "with a {name} of {value}",
    "using {name} {value}",
)
FLAG_TRUE = (
    "with {name}",
    "with {name} on",
    "Set {name} to true.",
    "Turn {name} on.",
    "I want {name}.",
    "with {name} enabled",
    "{name}: yes.",
)
FLAG_FALSE = (
    "without {name}",
    "with {name} off",
    "Set {name} to false.",
    "Turn {name} off.",
    "No {name}, please.",
    "with {name} disabled",
    "{name}: no.",
)
CHOICE = (
    "The {name} should be {value}.",
    "with {name} {value}",
    "with the {value} {name}",
    "Use {value} for the {name}.",
    "in {value}",
    "{name}: {value}.",
    "Make it {value}.",
)


def draw_parameters(rng: Random) -> tuple[Parameter, ...]:
    """None to five parameters of different meanings, in random order."""
    found: dict[str, Parameter] = {}
    kinds: set[str] = set()
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 5))):
        parameter, kind = draw_parameter(rng)
        if parameter.name not in found and kind not in kinds:
            found[parameter.name] = parameter
            kinds.add(kind)
    return tuple(found.values())


def draw_parameter(rng: Random) -> tuple[Parameter, str]:
    """A parameter and a key that two parameters of one tool must not share, or a request could mean either."""
    required, draw = rng.random() < 0.65, rng.random()
    if draw < 0.5:
        names, kind, description, phrases, values = rng.choice(toolwords.IDEAS)
        return Parameter(rng.choice(names), described(rng, kind, description), required, phrases, values), exclusive(names[0], values)
    if draw < 0.65:
        name = rng.choice(toolwords.FLAG_WORDS)
        return Parameter(name, described(rng, "boolean", f"Whether to use {name.replace('_', ' ')}."), required, (), "flag"), name
    if draw < 0.8:
        name = rng.choice(tuple(toolwords.ENUMS))
        options = toolwords.ENUMS[name].split()
        options = rng.sample(options, rng.randint(2, min(5, len(options))))
        schema = described(rng, "string", f"The {name.replace('_', ' ')}.") | {"enum": options}
        return Parameter(name, schema, required, (), "enum"), "enum"
    kind = rng.choice(("integer", "integer", "number", "string"))
    noun = rng.choice(toolwords.STRING_NOUNS if kind == "string" else toolwords.EXTRA_NOUNS)
    name = rng.choice(toolwords.EXTRA_WORDS) + "_" + noun if rng.random() < 0.8 else noun
    values = {"integer": "count", "number": "decimal", "string": rng.choice(("word", "word", "code"))}[kind]
    return Parameter(name, described(rng, kind, f"The {name.replace('_', ' ')}."), required, (), values), name


def exclusive(name: str, values: str) -> str:
    """Ideas whose phrases could be taken for each other share a key."""
    if name in ("city", "item", "subject", "message", "person", "recipient", "email", "price", "amount", "weight", "temperature"):
        return {"person": "person", "recipient": "person", "price": "money", "amount": "money", "weight": "money"}.get(name, name)
    return values if values in ("date", "weekday", "code") else name


def described(rng: Random, kind: str, description: str) -> dict[str, Any]:
    return {"type": kind, "description": description} if rng.random() < 0.75 else {"type": kind}


def draw_value(rng: Random, parameter: Parameter) -> tuple[Any, str, str]:
    """The argument, and its wording: as the tail of the request, or else as a sentence of its own."""
    value: Any
    phrases: tuple[str, ...]
    if parameter.values == "flag":
        value = rng.random() < 0.6
        phrases, shown = (FLAG_TRUE if value else FLAG_FALSE), ""
    elif parameter.values == "enum":
        value = rng.choice(parameter.schema["enum"])
        phrases, shown = CHOICE, value
    else:
        value = VALUES[parameter.values](rng)
        phrases, shown = parameter.phrases, str(value)
        if isinstance(value, int) and value <= 20 and rng.random() < 0.2:
            shown = words.number_words(value)
    if phrases and "{name}" not in phrases[0] + phrases[-1] and rng.random() < 0.85:
        return value, rng.choice(phrases).format(shown), ""
    phrase = rng.choice(phrases if parameter.values in ("flag", "enum") else GENERIC).format(name=parameter.spoken, value=shown)
    if phrase[-1] == ".":
        return value, "", phrase[0].upper() + phrase[1:]
    return value, phrase, ""


def scene_parameters(rng: Random, parameters: tuple[Any, ...]) -> tuple[Parameter, ...]:
    """The parameters of a scene under one of their names."""
    drawn = []
    for names, kind, values, required in parameters:
        name = rng.choice(names)
        schema = described(rng, kind, f"The {name.replace('_', ' ')}.")
        if values not in VALUES and values != "flag" and rng.random() < 0.7:
            schema["enum"] = values.split()
        drawn.append(Parameter(name, schema, required, (), values))
    return tuple(drawn)


def draw_scene_request(rng: Random, parameters: tuple[Parameter, ...], wording: str) -> tuple[str, dict[str, Any]]:
    """The wording filled in, and the arguments it gives, in the schema's order."""
    arguments, shown = {}, []
    for index, parameter in enumerate(parameters):
        if parameter.values == "flag":
            value: Any = rng.random() < 0.5
            shown.append("on" if value else "off")
        else:
            value = VALUES[parameter.values](rng) if parameter.values in VALUES else rng.choice(parameter.values.split())
            shown.append(str(value))
        if f"{{{index}}}" in wording:
            arguments[parameter.name] = value
    text = wording.format(*shown)
    return text[0].upper() + text[1:] if not wording.startswith("{") else text, arguments


def word(rng: Random) -> str:
    """A word to copy: a known one or made-up syllables."""
    if rng.random() < 0.4:
        return "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(2, 4)))
    return rng.choice((*words.GOODS, *words.COLOURS, *toolwords.STRING_NOUNS, *words.CONTAINERS)).partition(":")[0]


def person(rng: Random) -> str:
    name = rng.choice(words.WOMEN + words.MEN)
    return f"{name} {word(rng).capitalize()}" if rng.random() < 0.5 else name


def code(rng: Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    digits = str(rng.randint(10, 99999))
    return rng.choice((f"{letters}-{digits}", f"{letters}{digits}", digits, f"{word(rng)}_{digits}"))


def email(rng: Random) -> str:
    name = rng.choice(words.WOMEN + words.MEN).lower()
    separator = rng.choice(("", ".", "_"))
    rest = rng.choice((word(rng), str(rng.randint(1, 99))))
    return f"{name}{separator}{rest}@{rng.choice(('example.com', 'mail.org', 'post.net', word(rng) + '.com'))}"


def date(rng: Random) -> str:
    return f"20{rng.randint(20, 35)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def sentence(rng: Random) -> str:
    return rng.choice(
        (
            "See you on {day}",
            "Please bring {n} {goods}",
            "I will be {n} minutes late",
            "The {goods} have arrived",
            "Call {name} back",
            "Happy birthday, {name}!",
            "Meet me in {town}",
            "Do not forget the {goods}",
            "{name} is waiting",
            "We need more {goods} by {day}",
            "The {word} is ready",
        )
    ).format(
        day=rng.choice(words.DAYS),
        n=rng.randint(2, 90),
        goods=rng.choice(words.GOODS),
        name=rng.choice(words.WOMEN + words.MEN),
        town=rng.choice(words.TOWNS),
        word=word(rng),
    )


def town(rng: Random) -> str:
    return rng.choice(words.TOWNS) if rng.random() < 0.8 else word(rng).capitalize()


def decimal(rng: Random) -> float | int:
    return rng.choice((rng.randint(2, 999), rng.randint(2, 99) + 0.5, rng.randint(101, 9999) / 100, rng.randint(11, 999) / 10))


VALUES: dict[str, Callable[[Random], Any]] = {
    "town": town,
    "person": person,
    "email": email,
    "date": date,
    "code": code,
    "sentence": sentence,
    "word": word,
    "decimal": decimal,
    "time": lambda rng: f"{rng.randint(6, 22):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}",
    "ticker": lambda rng: "".join(rng.choice("ABCDEFGHKLMNOPRSTUVWXYZ") for _ in range(rng.randint(2, 5))),
    "weekday": lambda rng: rng.choice(words.DAYS),
    "goods": lambda rng: word(rng) if rng.random() < 0.3 else rng.choice(words.GOODS),
    "title": lambda rng: " ".join(word(rng) for _ in range(rng.randint(1, 3))).capitalize(),
    "few": lambda rng: rng.randint(2, 12),
    "count": lambda rng: rng.choice((rng.randint(2, 20), rng.randint(2, 99), rng.randint(100, 5000))),
    "year": lambda rng: rng.randint(1950, 2030),
    "degrees": lambda rng: rng.choice((rng.randint(5, 35), rng.randint(5, 30) + 0.5)),
    "rating": lambda rng: rng.choice((2, 3, 4, 3.5, 4.5)),
}


def convert(text: str, kind: str) -> object:
    """A parameter's text as its schema type; ValueError if it is none."""
    if kind == "string":
        return text
    if kind == "boolean":
        return {"true": True, "false": False}.get(text.strip(), text)
    value = json.loads(text)
    if isinstance(value, bool) or not isinstance(value, int if kind == "integer" else (int, float)):
        raise ValueError(f"{text!r} is no {kind}")
    return value


RESULT_KEYS = words.listed(
    "temperature price total distance count balance duration rating wind humidity "
    "rooms seats delay weight stock pages size score status place owner"
)


def draw_result(rng: Random) -> tuple[str, str]:
    """What a tool returns, and the reply that reports it."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(('{"status": "ok"}', '{"success": true}', "ok", "done", '{"result": "ok"}')), "Done."
    if kind < 0.4:
        reason = rng.choice(
            (
                "not found",
                "no permission",
                "the service is down",
                "time out",
                f"{word(rng)} is unknown",
                f"no {word(rng)} left",
                f"invalid {word(rng)}",
            )
        )
        return json.dumps({"error": reason}), f"That did not work: {reason}."
    if kind < 0.55:
        text = sentence(rng)
        return text, f"The answer is: {text}"
    fields = {key: rng.choice((decimal(rng), rng.randint(2, 500), word(rng))) for key in rng.sample(RESULT_KEYS, rng.randint(1, 3))}
    return json.dumps(fields), "Here is the result: " + ", ".join(f"{key} {value}" for key, value in fields.items()) + "."
