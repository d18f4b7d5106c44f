"""Rank 0's hold of the other ranks: it sends them orders, hears their answers, and notices when one is no more.

One thread listens to all of them. Each gives a sign every second, so one that has died, failed or stands still is known within seconds,
whatever rank 0 is doing. Then all are killed, because what they hold together is lost with one of them, and because that ends the
exchanges that rank 0 may be waiting in; whoever waits here gets an error that names the rank and how it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NoReturn, Protocol, TypeVar

from pointsman.engine.channel import Channel
from pointsman.engine.orders import Answer, Fault, Here, Join, Joined, Leave, Order, Reply, Sign, decode_reply, encode

log = logging.getLogger(__name__)

START_SECONDS = 60.0
SILENT_SECONDS = 20.0
LOOK_SECONDS = 1.0
OTHERS_SECONDS = 0.5
END_SECONDS = 2.0
CAUSE_SECONDS = 10.0
LEAVE_SECONDS = 3.0
T = TypeVar("T")


class RankLost(RuntimeError):
    """A rank has ended, failed, or stands still; the message names it and says how.

    Attributes:
        rank: which, where one is known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RankRefused(ValueError):
    """A rank cannot load its part of what was asked for; the message says why."""


class Started(Protocol):
    """Another rank as whoever started it knows it."""

    @property
    def place(self) -> str:
        """Where it runs: `pid 1234`, for people."""

    def ended(self, seconds: float) -> str | None:
        """How it has ended, waiting so long for that; None where it has not."""

    def kill(self) -> None:
        """End it at once; no error where it has ended."""


@dataclasses.dataclass(eq=False)
class Link:
    """One other rank.

    Attributes:
        heard: when it last said something, or may be taken to have.
        gone: nothing more is heard of it.
        trouble: what is wrong with it, as far as that is known without its end.
        bereft: the trouble is that another rank is gone.
        refused: the trouble is with what it was asked to load.
    """

    rank: int
    channel: Channel
    started: Started
    heard: float = dataclasses.field(default_factory=lambda: time.monotonic() + START_SECONDS - SILENT_SECONDS)
    here: Future[None] = dataclasses.field(default_factory=Future)
    joined: Future[None] = dataclasses.field(default_factory=Future)
    gone: bool = False
    trouble: str | None = None
    bereft: bool = False
    refused: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.started.place})"


class Asked:
    """An order that is answered, on its way to all."""

    def __init__(self, workers: Workers, answers: dict[int, Future[Answer]]) -> None:
        self._workers, self._answers = workers, answers

    def wait(self) -> list[tuple[int, Answer]]:
        """Rank and answer of those that could not do it. Raises RankLost where one is lost."""
        found = [(rank, self._workers.first(answer)) for rank, answer in self._answers.items()]
        return [(rank, answer) for rank, answer in found if answer.error is not None]


class Workers:
    """The ranks past the first, of one engine.

    Args:
        on_lost: called in a thread of ours when one is lost, with the error that everybody gets.
        release: called when all have ended on `close`.

    Attributes:
        lost: has that error as its exception, once one is lost.
    """

    def __init__(
        self, links: Sequence[Link], on_lost: Callable[[Exception], None] | None = None, *, release: Callable[[], None] | None = None
    ) -> None:
        self._links = list(links)
        self._release = release
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._answers: dict[tuple[int, int], Future[Answer]] = {}
        self._sending = threading.Lock()
        self._closing = False
        self.lost: Future[NoReturn] = Future()
        self._watching = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watching.start()

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self._links)

    def meet(self, orders: Sequence[Join]) -> None:
        """Wait until all have started, and tell each what it is to be. Raises RankLost."""
        for link in self._links:
            self.first(link.here)
        for link, order in zip(self._links, orders, strict=True):
            self._send([link], order)

    def wait_joined(self) -> None:
        """Wait until all have loaded. Raises RankLost, and RankRefused where one cannot load what it is told to."""
        for link in self._links:
            self.first(link.joined)

    def send(self, order: Order) -> None:
        """Send it to all. Raises RankLost where one is gone."""
        self._send(self._links, order)

    def ask(self, make: Callable[[int], Order]) -> Asked:
        """Send an order that is answered, made with its number."""
        number = next(self._numbers)
        answers: dict[int, Future[Answer]] = {link.rank: Future() for link in self._links}
        self._answers |= {(rank, number): answer for rank, answer in answers.items()}
        self.send(make(number))
        return Asked(self, answers)

    def _send(self, links: Sequence[Link], order: Order) -> None:
        data = encode(order)
        try:
            with self._sending:  # all get orders in one order
                for link in links:
                    link.channel.send(data)
        except OSError as error:
            raise self.cause(error) from error

    def first(self, future: Future[T]) -> T:
        """Its result, or the error of a rank that is lost before."""
        either: tuple[Future[Any], ...] = (future, self.lost)
        wait(either, return_when=FIRST_COMPLETED)
        return future.result() if future.done() else self.lost.result()

    def cause(self, error: Exception) -> BaseException:
        """The loss of a rank where that is why something failed here, else the error itself."""
        wait((self.lost,), CAUSE_SECONDS)
        return (self.lost.exception() or error) if self.lost.done() else error

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link.channel, selectors.EVENT_READ, link)
            before = time.monotonic()
            while not any(link.gone for link in self._links):
                self._listen(selector, LOOK_SECONDS)
                if self._closing:
                    return
                before = self._look(before)
            end = time.monotonic() + OTHERS_SECONDS  # whoever fails for another's sake may be heard first
            while selector.get_map() and (left := end - time.monotonic()) > 0:
                self._listen(selector, left)
        self._lose()

    def _look(self, before: float) -> float:
        """Who has been silent too long, unless it was this process that slept."""
        now = time.monotonic()
        for link in self._links:
            if now - before > 2 * LOOK_SECONDS:
                link.heard = max(link.heard, now)
            if now - link.heard > SILENT_SECONDS:
                link.gone, link.trouble = True, "gave no sign of life for too long"
        return now

    def _listen(self, selector: selectors.BaseSelector, seconds: float) -> None:
        for key, _ in selector.select(seconds):
            link: Link = key.data
            try:
                for data in link.channel.arrived():
                    self._take(link, decode_reply(data))
            except EOFError:
                link.gone = True
            except ValueError as error:
                link.gone, link.trouble = True, f"was cut off: {error}"
            if link.gone:
                selector.unregister(link.channel)

    def _take(self, link: Link, reply: Reply) -> None:
        link.heard = time.monotonic()
        match reply:
            case Here():
                link.here.set_result(None)
            case Joined():
                link.joined.set_result(None)
            case Answer():
                if (answer := self._answers.pop((link.rank, reply.number), None)) is None:
                    raise ValueError(f"an answer to order {reply.number}, which it was not asked")
                answer.set_result(reply)
            case Fault():
                link.trouble, link.refused, link.bereft = f"failed: {reply.reason}", reply.refused, reply.bereft
            case Sign():
                pass

    def _lose(self) -> None:
        """End all of them, and tell everybody who waits which was the first to go and how."""
        gone = [link for link in self._links if link.gone]
        first = min(gone, key=lambda link: (link.bereft, link.trouble is not None))
        how = first.trouble or first.started.ended(END_SECONDS) or "closed its connection"
        for link in self._links:
            link.started.kill()
        error = RankRefused(first.trouble) if first.refused else RankLost(f"{first.name} {how}", first.rank)
        self.lost.set_exception(error)
        if self._on_lost is not None and not self._closing:
            self._on_lost(error)

    def close(self) -> None:
        """End them, in order where they are well."""
        self._closing = True
        with contextlib.suppress(OSError, RankLost):
            if not self.lost.done():
                self.send(Leave())
        end = time.monotonic() + LEAVE_SECONDS
        for link in self._links:
            if link.started.ended(max(end - time.monotonic(), 0.0)) is None:
                link.started.kill()
        self._watching.join()
        for link in self._links:
            link.channel.close()
        if self._release is not None:
            self._release()
