"""What is asked: random texts, shared beginnings, traces, conversations of people, or a file of one's own.

`random` is what serving benchmarks are compared by: lengths are drawn evenly from `range_ratio * length`, rounded down, to `length`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from random import Random
from typing import Any, TypeVar

import msgspec

from pointsman.bench.serving.options import ServeOptions
from pointsman.bench.serving.prompts import Counter, LocalCounter, Writer, random_ids
from pointsman.bench.serving.query import Query
from pointsman.bench.serving.traces import read_azure, read_mooncake, trace_queries

SHAREGPT_FEWEST = 4
SHAREGPT_PROMPT = 1024
SHAREGPT_TOTAL = 2048


Some = TypeVar("Some")


class _Turn(msgspec.Struct):
    value: str
    speaker: str = msgspec.field(name="from", default="")


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] | None = None
    conversation: list[_Turn] | None = None


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a custom file. `timestamp` is in seconds after the start."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    output_len: int | None = None
    timestamp: float | None = None


class Source:
    """Makes queries in the form that the options ask for."""

    def __init__(self, options: ServeOptions, counter: Counter) -> None:
        self.options = options
        self.counter = counter

    def queries(self, draws: Random) -> list[Query]:
        """As many as the options say. Raises ValueError for lengths that cannot be, and for files that are not what they should be."""
        makers = {
            "random": self._random,
            "shared-prefix": self._shared_prefix,
            "azure": self._trace,
            "mooncake": self._trace,
            "sharegpt": self._sharegpt,
            "custom": self._custom,
        }
        return makers[self.options.dataset_name](draws)

    def like(self, query: Query, draws: Random) -> Query:
        """A random query of the same lengths, so that a warm-up leaves nothing in a prefix cache; a conversation is asked as it is."""
        if query.input_len is None:
            return query
        if self._sends_random_ids:
            return dataclasses.replace(query, ids=self._random_ids(query.input_len, draws))
        return self._query(self._writer.write(query.input_len, draws), query.input_len, query.output_len)

    @functools.cached_property
    def _writer(self) -> Writer:
        wrap = self.counter.wrap if self.options.use_chat_template else None
        words = Random(f"{self.options.seed}-words")
        return Writer(self.counter, words, wrap=wrap, sent_wrapped=self.options.backend != "openai-chat")

    @property
    def _sends_random_ids(self) -> bool:
        options = self.options
        local = isinstance(self.counter, LocalCounter)
        return options.dataset_name == "random" and options.tokenize_prompt and local and not options.use_chat_template

    def _random_ids(self, count: int, draws: Random) -> tuple[int, ...]:
        assert isinstance(self.counter, LocalCounter)
        return random_ids(self.counter.tokenizer, count, draws)

    def _query(self, text: str, input_len: int, output_len: int, arrival_s: float | None = None) -> Query:
        if self.options.tokenize_prompt:
            return Query(ids=tuple(self.counter.ids(text)), input_len=input_len, output_len=output_len, arrival_s=arrival_s)
        return Query(text=text, input_len=input_len, output_len=output_len, arrival_s=arrival_s)

    def _random(self, draws: Random) -> list[Query]:
        options = self.options
        most = (options.random_input_len, options.random_output_len)
        lengths = random_lengths(draws, options.most_prompts, *most, options.random_range_ratio)
        if self._sends_random_ids:
            return [Query(ids=self._random_ids(length, draws), input_len=length, output_len=output) for length, output in lengths]
        return [self._query(self._writer.write(length, draws), length, output) for length, output in lengths]

    def _shared_prefix(self, draws: Random) -> list[Query]:
        """Groups of prompts; those of a group have one long beginning."""
        options = self.options
        writer = self._writer
        prefixes = [writer.draw(options.gsp_system_prompt_len, draws) for _ in range(options.gsp_num_groups)]
        length = options.gsp_system_prompt_len + options.gsp_question_len
        queries = [
            self._query(writer.write(length, draws, prefix), length, options.gsp_output_len)
            for prefix in prefixes
            for _ in range(options.gsp_prompts_per_group)
        ]
        draws.shuffle(queries)
        return queries

    def _trace(self, draws: Random) -> list[Query]:
        options = self.options
        read = read_azure if options.dataset_name == "azure" else read_mooncake
        rows = _enough(read(options.path, options.most_prompts), options)
        scale, slowdown = options.trace_length_scale, options.trace_slowdown
        made = trace_queries(rows, self._writer, scale=scale, slowdown=slowdown, seed=options.seed)
        return [self._query(text, length, output, at) for text, length, output, at in made]

    def _sharegpt(self, draws: Random) -> list[Query]:
        """The first turn of a conversation asks; the length of the second is that of the answer."""
        options = self.options
        entries = _decode(options.path, list[_Conversation])
        draws.shuffle(entries)
        queries: list[Query] = []
        for entry in entries:
            turns = entry.conversations or entry.conversation or []
            if len(queries) == options.most_prompts:
                break
            if len(turns) < 2:
                continue
            text = turns[0].value
            if options.use_chat_template and options.backend != "openai-chat":
                text = self.counter.wrap(text)
            length, output = self.counter.count(text), options.sharegpt_output_len or self.counter.count(turns[1].value)
            if length >= SHAREGPT_FEWEST and output >= SHAREGPT_FEWEST and length <= SHAREGPT_PROMPT and length + output <= SHAREGPT_TOTAL:
                queries.append(self._query(text, length, output))
        return _enough(queries, options)

    def _custom(self, draws: Random) -> list[Query]:
        options = self.options
        queries: list[Query] = []
        for number, row in _decode_lines(options.path, _Row):
            if len(queries) == options.most_prompts:
                break
            where = f"line {number} of {options.path}"
            if (row.prompt is None) == (row.messages is None):
                raise ValueError(f"{where} must have prompt or messages, and not both")
            output = row.output_len or options.custom_output_len
            if output < 1 or (row.timestamp is not None and row.timestamp < 0):
                raise ValueError(f"{where}: output_len must be at least 1, and timestamp not negative")
            if row.messages is not None:
                query = Query(messages=row.messages, input_len=None, output_len=output, arrival_s=row.timestamp)
            else:
                assert row.prompt is not None
                sent = self.counter.wrap(row.prompt) if options.use_chat_template and options.backend != "openai-chat" else row.prompt
                query = self._query(sent, self.counter.count(sent), output, row.timestamp)
            queries.append(query)
        return _enough(queries, options)


def random_lengths(draws: Random, count: int, input_len: int, output_len: int, ratio: float) -> list[tuple[int, int]]:
    """Tokens in and out of so many requests, each drawn evenly from `ratio` of the most to the most."""
    inputs, outputs = ([draws.randint(max(int(most * ratio), 1), most) for _ in range(count)] for most in (input_len, output_len))
    return list(zip(inputs, outputs, strict=True))


def _enough(queries: list[Some], options: ServeOptions) -> list[Some]:
    """Those that a file has. Raises ValueError where more were asked for."""
    if not queries:
        raise ValueError(f"{options.path} has no requests that can be used")
    if options.num_prompts is not None and len(queries) < options.num_prompts:
        raise ValueError(f"{options.path} has {len(queries)} requests that can be used; --num-prompts is {options.num_prompts}")
    return queries


def _decode(path: str, kind: Any) -> Any:
    with open(path, "rb") as file:
        try:
            return msgspec.json.decode(file.read(), type=kind)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path} is not what it should be: {error}") from None


def _decode_lines(path: str, kind: Any) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, msgspec.json.decode(line, type=kind)
            except msgspec.MsgspecError as error:
                raise ValueError(f"line {number} of {path} is not what it should be: {error}") from None
