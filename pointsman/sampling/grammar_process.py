"""The processes that grammars are compiled and matched in.

    engine -- control --> this process (xgrammar and the vocabulary are loaded, once)
      |                        | fork
      +------ a socket ------> one process a grammar: compiles it, then follows the texts that are bound to it

One process a grammar, because the library cannot be interrupted: what takes too long or too much memory is ended by the kernel, by a
timer and a limit that the process sets itself before each call, and nobody else has lost anything. A fork of a process that has everything
loaded takes milliseconds.

Masks go through a file that both sides have mapped, a row a lane; over the socket goes only that a row is ready. Requests are answered in
order, each with its serial number.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from resource import RLIMIT_AS, RLIMIT_CORE, getrlimit, setrlimit
from typing import BinaryIO

import msgspec
import numpy as np

from pointsman.sampling.grammar import Compiler, Matcher, Refused, Words
from pointsman.sampling.grammar_messages import (
    ANSWER,
    MASK,
    NOT_ACCEPTED,
    READY,
    SIZE,
    TOO_SLOW,
    Accept,
    Close,
    Launch,
    Limits,
    Message,
    Open,
    Task,
    Verdict,
    framed,
    num_words,
)
from pointsman.text import Tokenizer


def main(launch: Launch, control: socket.socket) -> None:
    """Fork a process for each pair of a socket and a mask file that arrives, until the engine goes."""
    tokenizer = Tokenizer.load(launch.folder)
    special = tokenizer.special_ids
    token_bytes = [b"" if token in special else tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    compiler = Compiler(token_bytes, launch.vocab_size, tokenizer.eos_ids)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the dead
    gc.collect()
    gc.freeze()
    control.sendall(READY)
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not data:
            return
        if os.fork() == 0:
            control.close()
            _be_child(compiler, launch, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _be_child(compiler: Compiler, launch: Launch, channel: int, file: int) -> None:
    """Never returns. The library's warnings are about what clients wrote, so they go nowhere; a fault of ours is still seen."""
    code = 1
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        with socket.socket(fileno=channel) as connection, contextlib.suppress(ConnectionError):
            _serve(compiler, launch, connection, file)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve(compiler: Compiler, launch: Launch, connection: socket.socket, file: int) -> None:
    """Compile a grammar and follow texts until the engine closes the socket."""
    limits = launch.limits
    setrlimit(RLIMIT_CORE, (0, 0))
    before = _address_space()
    if before:
        setrlimit(RLIMIT_AS, (before + limits.memory_bytes, getrlimit(RLIMIT_AS)[1]))
    with connection.makefile("rb") as stream:
        task = msgspec.msgpack.decode(_frame(stream) or b"", type=Task)
        words = num_words(launch.vocab_size)
        masks = np.frombuffer(mmap(file, task.num_rows * words * 4), np.int32).reshape(task.num_rows, words)
        try:
            with _processor_time(limits.compile_seconds):
                compiled = compiler.compile(task.grammar)
        except (Refused, MemoryError) as error:
            reason = str(error) if isinstance(error, Refused) else f"the {task.grammar.kind} cannot be used: it needs too much memory"
            connection.sendall(framed(msgspec.msgpack.encode(Verdict(reason))))
            return
        num_bytes = max(compiled.num_bytes, _address_space() - before)
        verdict = Verdict(None, num_bytes, compiler.crossing(task.grammar.after, compiled))
        connection.sendall(framed(msgspec.msgpack.encode(verdict)))
        texts: dict[int, _Text] = {}
        read = msgspec.msgpack.Decoder(Message)
        while frame := _frame(stream):
            message = read.decode(frame)
            if isinstance(message, Close):
                texts.pop(message.row, None)
                continue
            if isinstance(message, Open):
                texts[message.row] = _Text(compiled.matcher(message.stop_ids), limits)
            status = texts[message.row].advance(message, masks[message.row])
            connection.sendall(ANSWER.pack(message.serial, message.row, status))


class _Text:
    """A text that is being matched, and what it has cost."""

    def __init__(self, matcher: Matcher, limits: Limits) -> None:
        self._matcher, self._limits = matcher, limits
        self._allowance = limits.text_seconds

    def advance(self, message: Open | Accept, mask: Words) -> int:
        """Go on, and fill in the mask of what may follow."""
        tokens = message.tokens if isinstance(message, Open) else [message.token]
        self._allowance += self._limits.token_seconds * len(tokens)
        if self._allowance <= 0:
            return TOO_SLOW
        started = time.process_time()
        with _processor_time(self._limits.call_seconds + (self._allowance if len(tokens) > 1 else 0.0)):
            fits = not isinstance(message, Open) or self._matcher.accept_text(message.text)
            fits = fits and all(self._matcher.accept(token) for token in tokens)
            if fits:
                self._matcher.fill(mask)
        self._allowance -= time.process_time() - started
        return MASK if fits else NOT_ACCEPTED


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """The process is ended if it computes for longer than this."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _frame(stream: BinaryIO) -> bytes:
    """The next message, empty when the other side has closed."""
    head = stream.read(SIZE.size)
    return stream.read(SIZE.unpack(head)[0]) if len(head) == SIZE.size else b""


def _address_space() -> int:
    """Bytes of address space; 0 where the system does not say."""
    statistics = Path("/proc/self/statm")
    return int(statistics.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if statistics.exists() else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    main(msgspec.json.decode(sys.argv[1], type=Launch), socket.socket(fileno=int(sys.argv[2])))
