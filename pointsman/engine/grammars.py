"""The grammars of the requests under way, and those that are kept for the next.

A request with a grammar waits in front of the scheduler until that is compiled, in another process, while everybody else goes on; so
to the scheduler it is a request like any other. A grammar is compiled once for all that ask for the same, and kept while there is
room: its process waits for the next text. One that could not be compiled is remembered for a while as well, so that asking again
costs nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from pointsman.grammar import Grammar
from pointsman.sampling.constraint import Constraint
from pointsman.sampling.grammar_client import TOO_COSTLY, Channel, Host
from pointsman.sampling.grammar_messages import Launch, Limits
from pointsman.step import LaneStart
from pointsman.text import Tokenizer

MAX_GRAMMARS = 64
MAX_COMPILING = 2
MAX_KEPT_BYTES = 1 << 30
FAILURE_SECONDS = 60.0
# The limit on processor time ends a compilation; this one ends the wait for a process that gets no processor.
PATIENCE = 4.0


@dataclass(eq=False)
class _Entry:
    """A grammar. `users`: the requests that hold it. `since`: when it began to be compiled, or was found to be of no use."""

    grammar: Grammar
    users: int = 0
    channel: Channel | None = None
    error: str | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def num_bytes(self) -> int:
        return self.channel.verdict.num_bytes if self.channel is not None and self.channel.verdict is not None else 0


class Grammars:
    """All of one engine's. One thread holds and releases them; another may be following texts by those that are held.

    Args:
        tokenizer: of the model, read from a folder.
        vocab_size: tokens that the model has logits for.
        num_lanes: most texts that are followed at once.
        limits: what one of them may cost.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, num_lanes: int, limits: Limits | None = None) -> None:
        assert tokenizer.folder is not None
        self._tokenizer = tokenizer
        self._num_lanes = num_lanes
        self._limits = limits or Limits()
        self._launch = Launch(str(tokenizer.folder), vocab_size, self._limits)
        self._host: Host | None = None
        self._entries: OrderedDict[Grammar, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def hold(self, grammar: Grammar) -> bool:
        """Hold a grammar for a request; it begins to be compiled if it is new. False if there is no room for another just now."""
        entry = self._entries.get(grammar)
        if entry is not None and not entry.users and self._is_stale(entry):
            self._drop(entry)
            entry = None
        if entry is None:
            self._make_room()
            if len(self._entries) >= MAX_GRAMMARS:
                return False
            entry = self._entries[grammar] = _Entry(grammar)
        entry.users += 1
        self._entries.move_to_end(grammar)
        return True

    def _is_stale(self, entry: _Entry) -> bool:
        """Whether to begin anew with a grammar that nobody holds: its process is gone, or it is long ago that it was of no use."""
        if entry.error is not None:
            return time.monotonic() - entry.since > FAILURE_SECONDS
        if entry.channel is not None and entry.channel.verdict is not None:
            entry.channel.probe()
        return entry.channel is not None and entry.channel.broken

    def release(self, grammar: Grammar) -> None:
        """A request does not need it any more, nor does any step in flight."""
        entry = self._entries[grammar]
        entry.users -= 1
        if not entry.users and entry.error is None and entry.channel is not None and entry.channel.broken:
            self._fail(entry, TOO_COSTLY)
        self._make_room(0)

    def ready(self, grammar: Grammar) -> bool:
        """Whether a grammar that is held can be used now. Raises ValueError if it never can."""
        entry = self._entries[grammar]
        if entry.error is not None:
            raise ValueError(entry.error)
        if entry.channel is None or entry.channel.verdict is None:
            return False
        if entry.channel.broken:  # others hold it, and find that out for themselves
            raise ValueError(TOO_COSTLY)
        return True

    def progress(self, seconds: float = 0.0) -> None:
        """Go on with what is to be compiled; wait so long for something to happen."""
        compiling = [
            entry for entry in self._entries.values() if entry.channel is not None and entry.channel.verdict is None and not entry.error
        ]
        waiting = [entry for entry in self._entries.values() if entry.channel is None and not entry.error]
        if waiting and self._host is None:
            self._start_host(waiting)
        listening: list[Host | Channel] = [entry.channel for entry in compiling if entry.channel is not None]
        if self._host is not None and not self._host.ready:
            listening.append(self._host)
        heard = wait([part.fileno() for part in listening], seconds)
        for part in listening:
            if part.fileno() in heard:
                part.hear()
        for entry in compiling:
            self._judge(entry)
        if self._host is not None and self._host.failed:
            self._lose_host(waiting)
        elif self._host is not None and self._host.ready:
            for entry in waiting[: max(MAX_COMPILING - len(compiling), 0)]:
                self._start(entry)

    def _start_host(self, waiting: Collection[_Entry]) -> None:
        try:
            self._host = Host(self._launch)
        except OSError as error:
            for entry in waiting:
                self._fail_for_now(entry, f"its process could not be started: {error}")

    def _start(self, entry: _Entry) -> None:
        assert self._host is not None
        try:
            entry.channel = self._host.start(entry.grammar, self._num_lanes)
        except OSError:
            self._lose_host([entry])
            return
        entry.since = time.monotonic()

    def _judge(self, entry: _Entry) -> None:
        """What has become of a grammar that is being compiled."""
        channel, kind = entry.channel, entry.grammar.kind
        assert channel is not None
        if channel.verdict is not None and channel.verdict.error is not None:
            self._fail(entry, channel.verdict.error)
        elif channel.verdict is None and (channel.broken or time.monotonic() - entry.since > PATIENCE * self._limits.compile_seconds):
            seconds, megabytes = self._limits.compile_seconds, self._limits.memory_bytes >> 20
            self._fail(entry, f"the {kind} is too large or too complex: it could not be compiled in {seconds:g} s and {megabytes} MiB")

    def _fail(self, entry: _Entry, error: str) -> None:
        entry.error, entry.since = error, time.monotonic()
        if entry.channel is not None:
            entry.channel.close()

    def _lose_host(self, waiting: Collection[_Entry]) -> None:
        """The process to fork from is gone. Those that wait for it are told; the next request starts another."""
        assert self._host is not None
        self._host.close()
        self._host = None
        for entry in waiting:
            self._fail_for_now(entry, "its process ended, and the log says why")

    def _fail_for_now(self, entry: _Entry, reason: str) -> None:
        self._fail(entry, f"structured output is not available: {reason}")
        entry.since = -FAILURE_SECONDS

    def _make_room(self, num_new: int = 1) -> None:
        """Drop what nobody holds, the least recently used first, until there is room."""
        idle = [entry for entry in self._entries.values() if not entry.users]
        num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        for entry in idle:
            if len(self._entries) + num_new <= MAX_GRAMMARS and num_bytes <= MAX_KEPT_BYTES:
                return
            num_bytes -= entry.num_bytes
            self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        if entry.channel is not None:
            entry.channel.close()
        del self._entries[entry.grammar]

    def constrain(self, start: LaneStart) -> Constraint | None:
        """What keeps a sequence to its grammar, which is held; None if it has none."""
        grammar = start.sampling.grammar
        if grammar is None:
            return None
        channel = self._entries[grammar].channel
        assert channel is not None
        return Constraint(start, channel, self._tokenizer.eos_ids, self._tokenizer.token_bytes)

    def close(self) -> None:
        """End all processes."""
        for entry in list(self._entries.values()):
            self._drop(entry)
        if self._host is not None:
            self._host.close()
            self._host = None
