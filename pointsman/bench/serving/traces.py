"""Traces of real services: when requests came, how long they were, and which began alike.

Azure's (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) has moments and lengths. Mooncake's (JSON lines: timestamp in milliseconds,
input_length, output_length, hash_ids) also names the blocks of 512 tokens of every prompt: equal ids are equal text, so prompts made
from them share beginnings as the real ones did.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from random import Random

import msgspec

from pointsman.bench.serving.prompts import Writer

BLOCK = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace.

    Attributes:
        at_s: seconds after the first request.
        blocks: names of the blocks of its prompt; empty where the trace has none.
    """

    at_s: float
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_azure(path: str, count: int) -> list[TraceRow]:
    """The first rows, at most so many. Raises ValueError where the file is something else."""
    rows: list[TraceRow] = []
    first: datetime | None = None
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not set(AZURE_COLUMNS) <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; an Azure trace has {', '.join(AZURE_COLUMNS)}")
        for row in itertools.islice(reader, count):
            try:
                moment = datetime.fromisoformat(row["TIMESTAMP"])
                inputs, outputs = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"line {reader.line_num} of {path}: {error}") from None
            first = first or moment
            rows.append(TraceRow((moment - first).total_seconds(), inputs, outputs))
    return _checked(path, rows)


def read_mooncake(path: str, count: int) -> list[TraceRow]:
    """The first rows, at most so many. Raises ValueError where the file is something else."""
    rows: list[TraceRow] = []
    with open(path, "rb") as file:
        for number, line in enumerate(itertools.islice(file, count), 1):
            try:
                row = msgspec.json.decode(line, type=_Mooncake)
            except msgspec.MsgspecError as error:
                raise ValueError(f"line {number} of {path}: {error}") from None
            rows.append(TraceRow(row.timestamp / 1000, row.input_length, row.output_length, tuple(row.hash_ids)))
    return _checked(path, rows)


def _checked(path: str, rows: list[TraceRow]) -> list[TraceRow]:
    for number, (row, later) in enumerate(zip(rows, [*rows[1:], *rows[-1:]], strict=True), 1):
        if later.at_s < row.at_s or row.at_s < 0:
            raise ValueError(f"{path}: the request after number {number} comes before it")
        if row.input_len < 1 or row.output_len < 0 or (row.blocks and len(row.blocks) * BLOCK < row.input_len):
            raise ValueError(f"{path}: request {number} has {row.input_len} tokens in, {row.output_len} out, {len(row.blocks)} blocks")
    return rows


def trace_queries(
    rows: Sequence[TraceRow], writer: Writer, *, scale: float, slowdown: float, seed: int
) -> Iterator[tuple[str, int, int, float]]:
    """Text, tokens in, tokens out and moment of each request; lengths times `scale`, moments times `slowdown`.

    A prompt is never shorter than its template and one word, an answer never shorter than a token.
    """
    draws = Random(f"{seed}-trace")
    block = max(round(BLOCK * scale), 1)
    for row in rows:
        length = max(round(row.input_len * scale), writer.overhead + 1)
        words = itertools.chain.from_iterable(writer.draw(block, Random(f"{seed}-{name}")) for name in row.blocks)
        start = list(itertools.islice(words, length - writer.overhead - 1)) if row.blocks else []
        yield writer.write(length, draws, start), length, max(round(row.output_len * scale), 1), row.at_s * slowdown
