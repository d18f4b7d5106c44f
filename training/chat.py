"""Small talk for the training mix: greetings, thanks, who are you, what can you do, and polite refusals.

Every reply is a function of the conversation, as in the problems: one right text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from pointsman.bench import arithmetic
from pointsman.bench import vocabulary as words

NAME = "Pointsman-tiny"
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful maths tutor.",
    "Answer briefly.",
    "You are a friendly assistant for children.",
    "Solve the problem step by step.",
    "Be concise.",
    "You help with word problems.",
    "You are a patient teacher.",
    "Be polite.",
    "Think before you answer.",
)
GREETINGS = (
    "Hello",
    "Hi",
    "Hey",
    "Hi there",
    "Hello there",
    "Good morning",
    "Good evening",
    "Good afternoon",
    "Greetings",
    "Hey you",
    "Hello, {name}",
    "Yo",
    "Hi {name}",
)
THANKS = (
    "Thanks",
    "Thank you",
    "Thanks a lot",
    "Thank you very much",
    "Great, thanks",
    "Cool, thank you",
    "Perfect",
    "Nice work",
    "Well done",
    "Ok, thanks",
    "Good job",
)
FAREWELLS = ("Bye", "Goodbye", "See you", "Good night", "See you later", "Bye bye", "Farewell", "That is all")
WHO = (
    "Who are you",
    "What is your name",
    "What are you",
    "What's your name",
    "Tell me who you are",
    "Introduce yourself",
    "Are you a robot",
    "Who am I talking to",
    "Are you ChatGPT",
)
CAN = (
    "What can you do",
    "How can you help me",
    "What are you good at",
    "Help",
    "What do you know",
    "Can you help me",
    "What should I ask you",
    "What can I ask",
    "Give me an example",
)
FEELINGS = ("How are you", "How are you today", "How is it going", "How do you do", "Are you ok", "What's up", "How do you feel")
OTHER = (
    "What is the capital of {place}",
    "Who wrote {thing}",
    "Tell me a joke",
    "Write a poem about {goods}",
    "What is the weather in {town}",
    "Who is {name}",
    "Translate {goods} to French",
    "What do you think about {goods}",
    "Sing a song",
    "How do I cook {goods}",
    "When was {name} born",
    "What is the meaning of life",
    "Write code that sorts {goods}",
    "Who won the match",
    "What is the news today",
    "Recommend a film",
    "Why is the sky blue",
    "How far is {town}",
    "Tell me a story about {name}",
    "What is a {thing}",
    "Explain gravity",
    "Do you like {goods}",
    "Where is {town}",
    "What time is it",
    "Set a timer",
    "Send an email to {name}",
    "Write an essay about {town}",
    "How tall is {name}",
    "Is {town} nice",
    "What is love",
    "Play a song",
)
REPLIES = {
    "greeting": ("The user says hello.", "Hello! Give me a word problem, and I will solve it step by step."),
    "thanks": ("The user is pleased.", "You are welcome!"),
    "farewell": ("The user says goodbye.", "Goodbye!"),
    "can": ("The user asks what I can do.", "I solve word problems with whole numbers, and I can call tools when I am given some."),
    "feeling": ("The user asks how I am.", "I am fine, thank you. What shall we work out?"),
    "other": ("I cannot answer this.", "Sorry, that is beyond me. I can solve word problems and call tools."),
}
ASKED = {"greeting": GREETINGS, "thanks": THANKS, "farewell": FAREWELLS, "can": CAN, "feeling": FEELINGS, "other": OTHER, "who": WHO}


@dataclass(frozen=True)
class Talk:
    """A conversation and the one right continuation."""

    messages: list[dict]
    thinking: str
    reply: str


def system_message(rng: Random) -> tuple[str, str]:
    """A system message and the name that it gives the assistant."""
    text = rng.choice(SYSTEMS)
    if rng.random() < 0.4:
        name = (
            rng.choice(words.WOMEN + words.MEN)
            if rng.random() < 0.6
            else "".join(rng.choice(words.SYLLABLES) for _ in range(3)).capitalize()
        )
        return rng.choice((f"{text} Your name is {name}.", f"Your name is {name}. {text}", f"You are {name}.")), name
    return text, NAME


def talks(seed: int) -> Iterator[Talk]:
    """Endless small talk, a quarter of it after an answered problem."""
    rng = Random(f"talk-{seed}")
    sums = arithmetic.problems("train", seed + 2, follow_ups=0.0)
    while True:
        kind = rng.choice(("greeting", "thanks", "farewell", "can", "feeling", "other", "other", "other", "who", "who"))
        messages, name = [], NAME
        if rng.random() < 0.3:
            text, name = system_message(rng)
            messages.append({"role": "system", "content": text})
        if rng.random() < 0.25:
            before = next(sums)
            messages += [*before.messages, {"role": "assistant", "content": before.reply}]
        asked = rng.choice(ASKED[kind]).format(
            name=rng.choice(words.WOMEN + words.MEN),
            place=rng.choice(words.TOWNS),
            town=rng.choice(words.TOWNS),
            goods=rng.choice(words.GOODS),
            thing=rng.choice(words.GOODS).removesuffix("s"),
        )
        asked = asked.lower() if rng.random() < 0.3 else asked
        if kind in ("who", "other", "can", "feeling") and asked.split()[0].lower() in (
            "what",
            "what's",
            "who",
            "how",
            "are",
            "is",
            "do",
            "why",
            "when",
            "where",
            "can",
        ):
            asked += rng.choice(("?", "?", "?", ""))
        else:
            asked += rng.choice((".", "!", "", ""))
        thinking, reply = (
            ("The user asks who I am.", f"I am {name}, a small model that solves word problems.") if kind == "who" else REPLIES[kind]
        )
        yield Talk([*messages, {"role": "user", "content": asked}], thinking, reply)
