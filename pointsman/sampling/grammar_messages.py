"""What the engine and the processes of grammars say to each other.

Messages are msgpack with a schema, each behind its length. Answers while a text is matched are a fixed few bytes: a serial number, the
row, and what came of it.
"""

from __future__ import annotations

import struct

import msgspec

from pointsman.grammar import Grammar

SIZE = struct.Struct("<I")
ANSWER = struct.Struct("<IIB3x")
MASK, TOO_SLOW, NOT_ACCEPTED = range(3)
READY = b"+"


def num_words(vocab_size: int) -> int:
    """Words of 32 bits in a mask with a bit for each token."""
    return -(-vocab_size // 32)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a grammar may cost.

    Attributes:
        compile_seconds: of processor time, to compile it.
        call_seconds: of processor time, for one call of the library while a text is matched.
        text_seconds, token_seconds: a text may cost so much processor time, and so much more for each of its tokens.
        memory_bytes: address space beyond what the process has when it starts.
    """

    compile_seconds: float = 10.0
    call_seconds: float = 1.0
    text_seconds: float = 0.5
    token_seconds: float = 0.005
    memory_bytes: int = 1 << 30


class Launch(msgspec.Struct, frozen=True):
    """How this process is started: a JSON argument."""

    folder: str
    vocab_size: int
    limits: Limits


class Task(msgspec.Struct, frozen=True):
    """The first message to a grammar's process: what to compile, and how many rows the mask file has."""

    grammar: Grammar
    num_rows: int


class Verdict(msgspec.Struct, frozen=True):
    """The answer to it. `crossing`: tokens with all of the grammar's `after` in them, and behind it what does not fit."""

    error: str | None = None
    num_bytes: int = 0
    crossing: list[int] = []


class Open(msgspec.Struct, frozen=True, tag=0, array_like=True):
    """A text begins on a row, or comes back to it: with some text, then with tokens. Answered by its mask, as `Accept` is."""

    serial: int
    row: int
    text: bytes
    tokens: list[int]
    stop_ids: list[int]


class Accept(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """The text on a row goes on by a token."""

    serial: int
    row: int
    token: int


class Close(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """The text on a row is over. Not answered."""

    row: int


Message = Open | Accept | Close


def framed(data: bytes) -> bytes:
    return SIZE.pack(len(data)) + data
