"""Ranks as processes of this machine.

A process is connected by a pair of sockets that nobody else can reach, and has a pipe as its standard input that says nothing until its
parent has gone: that is how it knows. It is a new interpreter, not a copy of this one, and looks for modules where this one does,
whatever the working directory holds; its standard output is this one's standard error, which is where logs belong.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, cast

from pointsman.engine.channel import Channel
from pointsman.engine.orders import MAX_REPLY_BYTES
from pointsman.engine.workers import Link

STANDARD_ERROR = 2
KILL_SECONDS = 5.0
PROGRAM = "from pointsman.engine.worker_process import main; sys.exit(main({descriptor}))"


def command(program: str, path: Sequence[str]) -> list[str]:
    """The command line of a Python process that runs `program` with this module search path."""
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {list(path)!r}; {program}"]


class RankProcess:
    """A process that runs a rank. Raises OSError where the system does not start it."""

    def __init__(self, theirs: socket.socket) -> None:
        self._process = subprocess.Popen(
            command(PROGRAM.format(descriptor=theirs.fileno()), sys.path),
            stdin=subprocess.PIPE,
            stdout=STANDARD_ERROR,
            pass_fds=[theirs.fileno()],
            bufsize=0,
        )

    @property
    def place(self) -> str:
        return f"pid {self._process.pid}"

    def ended(self, seconds: float) -> str | None:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        cast(IO[bytes], self._process.stdin).close()
        return f"ended: exit code {code}" if code >= 0 else f"ended: signal {-code}, {signal.strsignal(-code)}"

    def kill(self) -> None:
        self._process.kill()
        self.ended(KILL_SECONDS)


def start_processes(ranks: Sequence[int]) -> list[Link]:
    """A process for each of these ranks. Raises OSError where the system does not start one; none is left then."""
    links: list[Link] = []
    try:
        for rank in ranks:
            ours, theirs = socket.socketpair()
            with theirs:
                links.append(Link(rank, Channel(ours, most=MAX_REPLY_BYTES), RankProcess(theirs)))
    except OSError:
        for link in links:
            link.started.kill()
            link.channel.close()
        raise
    return links
