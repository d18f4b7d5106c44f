"""Starting and ending the engine's process.

It is started before this process imports anything slow, so that both sides load at the same time. It gets a session of its own:
Ctrl-C in a terminal goes to the HTTP process alone, which then ends both in order. It looks for modules where this process does,
whatever the working directory holds, and its standard output is this one's standard error, which is where logs belong.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from typing import IO, cast

import msgspec

from pointsman.config import EngineConfig
from pointsman.engine.processes import STANDARD_ERROR, command
from pointsman.server.wire import Launch, ServerEnd

ENGINE = "import sys; from pointsman.server.engine_process import main; sys.exit(main())"
LEAVE_SECONDS = 5.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class EngineProcess:
    """A running engine process and the socket to it.

    Args:
        config: what the engine is to run.
        log_level: how much it logs.
        program: Python source that the process runs; tests put another engine there.

    Attributes:
        ready: it has loaded its model and is well, so that it ends in order when asked to.

    Raises:
        ValueError: no socket can be made in the temporary directory.
    """

    def __init__(self, config: EngineConfig, *, log_level: str, program: str = ENGINE) -> None:
        self._config, self._log_level, self._program = config, log_level, program
        self._start()

    def _start(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="pointsman-")
        self.ready = False
        try:
            self.end = ServerEnd(self._directory)
        except ValueError:
            shutil.rmtree(self._directory)
            raise
        self._process = subprocess.Popen(
            command(self._program, sys.path), stdin=subprocess.PIPE, stdout=STANDARD_ERROR, bufsize=0, start_new_session=True
        )
        line = msgspec.json.encode(Launch(engine=self._config, directory=self._directory, log_level=self._log_level))
        with contextlib.suppress(BrokenPipeError):  # it is gone already: `wait` says how
            cast(IO[bytes], self._process.stdin).write(line + b"\n")

    def restart(self) -> None:
        """Put another process and another socket in the place of these, which are ended first."""
        self.stop()
        self._start()

    def wait(self) -> int:
        """Block until the process has ended and return its exit code; a negative one is a signal."""
        return self._process.wait()

    def stop(self) -> None:
        """End the process, between two steps or at once where it is still loading, and remove the socket."""
        cast(IO[bytes], self._process.stdin).close()
        try:
            self._process.wait(LEAVE_SECONDS if self.ready else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.end.close()
        shutil.rmtree(self._directory, ignore_errors=True)
