"""The engine's end of the processes that grammars are compiled and matched in (`grammar_process`).

Nothing here waits but `Channel.mask`. The engine's thread starts a channel and hears when its grammar is ready; after that one thread, the
one that samples, follows texts on it: it says which token was taken and goes on with its own work, and by the time it wants the next mask,
a forward pass later, that is usually there.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from pointsman import program
from pointsman.grammar import Grammar
from pointsman.sampling.grammar_messages import (
    ANSWER,
    MASK,
    READY,
    SIZE,
    TOO_SLOW,
    Accept,
    Close,
    Launch,
    Message,
    Open,
    Task,
    Verdict,
    framed,
    num_words,
)

MASK_SECONDS = 30.0
TOO_COSTLY = "matching the text against its grammar takes too long, or too much memory"
_SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class ConstraintFault(Exception):
    """A text cannot be kept to its grammar; the message says why. It ends that text alone."""


class Host:
    """The process that the grammars' processes are forked from. It takes seconds to start, and none of them are spent here.

    Raises:
        OSError: the system does not start it.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        self.ready = False
        self.failed = False
        with theirs:
            try:
                self._process = _start(launch, theirs)
            except OSError:
                self._control.close()
                raise

    def fileno(self) -> int:
        return self._control.fileno()

    def hear(self) -> None:
        """Take in what it has said: that it is ready, or, by closing its end, that it is no more."""
        try:
            said = self._control.recv(1)
        except BlockingIOError:
            return
        except ConnectionError:
            said = b""
        self.ready, self.failed = said == READY, said != READY

    def start(self, grammar: Grammar, num_rows: int) -> Channel:
        """Begin to compile a grammar, to be matched on as many rows. Raises OSError if the process is no more."""
        assert self.ready
        size = num_rows * num_words(self._launch.vocab_size) * 4
        with _shared_file() as file:
            file.truncate(size)
            masks_LW = np.frombuffer(mmap.mmap(file.fileno(), size), np.int32).reshape(num_rows, -1)
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(self._control, [b"+"], [theirs.fileno(), file.fileno()])
                except OSError:
                    ours.close()
                    raise
        return Channel(Task(grammar, num_rows), ours, masks_LW)

    def close(self) -> None:
        """End it. What it has forked ends with the channels."""
        self._control.close()
        self._process.kill()
        self._process.wait()


def _start(launch: Launch, control: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        program.command("pointsman.sampling.grammar_process", msgspec.json.encode(launch).decode(), str(control.fileno())),
        env=program.environment(_SINGLE_THREADED),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[control.fileno()],
    )


def _shared_file() -> IO[bytes]:
    """A file in memory, without a name."""
    return os.fdopen(os.memfd_create("masks"), "r+b") if sys.platform == "linux" else tempfile.TemporaryFile()


class Channel:
    """One grammar's process.

    Attributes:
        verdict: what became of compiling it; None while that lasts.
        broken: the process has ended.
    """

    def __init__(self, task: Task, connection: socket.socket, masks_LW: NDArray[np.int32]) -> None:
        self._connection = connection
        self._masks_LW = masks_LW
        self._received = bytearray()
        self._lock = threading.Lock()
        self._serial = 0
        self._latest: dict[int, int] = {}
        self._statuses: dict[int, int] = {}
        self.broken = False
        self.verdict: Verdict | None = None
        connection.setblocking(False)
        self._arrivals, self._either_way = select.poll(), select.poll()
        self._arrivals.register(connection, select.POLLIN)
        self._either_way.register(connection, select.POLLIN | select.POLLOUT)
        self._send(framed(msgspec.msgpack.encode(task)))

    def fileno(self) -> int:
        return self._connection.fileno()

    def hear(self) -> None:
        """While the grammar is compiled: take in what has arrived."""
        assert self.verdict is None
        self._receive()
        if len(self._received) >= SIZE.size:
            end = SIZE.size + SIZE.unpack_from(self._received)[0]
            if len(self._received) >= end:
                self.verdict = msgspec.msgpack.decode(self._received[SIZE.size : end], type=Verdict)
                del self._received[:end]

    def probe(self) -> None:
        """While no text is followed: notice that the process is no more."""
        with self._lock:
            if not self.broken:
                self._receive()

    def open(self, row: int, text: bytes, tokens: list[int], stop_ids: list[int]) -> None:
        """A text begins on a row with this much of it; ask for the mask of its next token."""
        self._ask(row, Open(self._next(row), row, text, tokens, stop_ids))

    def accept(self, row: int, token: int) -> None:
        """The text goes on by a token; ask for the mask of the next."""
        self._ask(row, Accept(self._next(row), row, token))

    def leave(self, row: int) -> None:
        """The text on a row is over."""
        self._latest.pop(row, None)
        self._statuses.pop(row, None)
        self._ask(row, Close(row))

    def mask(self, row: int) -> NDArray[np.int32]:
        """The mask that was asked for last, of 32 tokens a word: it is good until the next is asked for. Raises ConstraintFault."""
        deadline = time.monotonic() + MASK_SECONDS
        self._sort_answers()
        while row not in self._statuses and not self.broken:
            left = deadline - time.monotonic()
            if left <= 0:
                self.broken = True
            elif self._arrivals.poll(1000 * left):
                self._receive()
                self._sort_answers()
        status = self._statuses.get(row)
        if status == MASK:
            mask: NDArray[np.int32] = self._masks_LW[row]
            return mask
        if status is None or status == TOO_SLOW:
            raise ConstraintFault(TOO_COSTLY)
        raise ConstraintFault("the text does not fit its grammar")

    def close(self) -> None:
        """End the process. No text is followed any more."""
        with self._lock:
            self.broken = True
            self._connection.close()

    def _next(self, row: int) -> int:
        self._serial = (self._serial + 1) & 0xFFFFFFFF
        self._latest[row] = self._serial
        self._statuses.pop(row, None)
        return self._serial

    def _ask(self, row: int, message: Message) -> None:
        with self._lock:
            if not self.broken:
                self._send(framed(msgspec.msgpack.encode(message)))

    def _send(self, data: bytes) -> None:
        """Send it all, and meanwhile take in answers: the other side may have to be rid of those before it reads on."""
        view = memoryview(data)
        while view and not self.broken:
            try:
                view = view[self._connection.send(view) :]
            except BlockingIOError:
                if not self._either_way.poll(1000 * MASK_SECONDS):
                    self.broken = True
                self._receive()
            except OSError:
                self.broken = True

    def _receive(self) -> None:
        """Take in what has arrived, without waiting."""
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.broken = self.broken or not data
        self._received += data

    def _sort_answers(self) -> None:
        whole = len(self._received) // ANSWER.size * ANSWER.size
        for serial, row, status in ANSWER.iter_unpack(self._received[:whole]):
            if self._latest.get(row) == serial:  # else it is about a text that is over
                self._statuses[row] = status
        del self._received[:whole]
