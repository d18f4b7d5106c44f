"""The engine's process, where those who run it ask: pauses at once, updates in a thread of their own.

Reading weights takes as long as it takes, and meanwhile the engine steps, takes requests and is asked other things. Only the change
itself is made by the thread that steps, which looks here in between.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from pointsman.server import controls, wire

if TYPE_CHECKING:
    from pointsman.engine.control import Control
    from pointsman.engine.engine import Engine
    from pointsman.engine.weights import Fresh

log = logging.getLogger(__name__)

LOOK_MS = 10


class Controller:
    """Does what is asked of one engine, and answers."""

    def __init__(self, engine: Engine, end: wire.EngineEnd) -> None:
        self._engine = engine
        self._end = end
        self._made: Control | None = None
        self._update: tuple[controls.UpdateFromDisk, Future[Fresh]] | None = None

    @property
    def _control(self) -> Control:
        from pointsman.engine.control import Control  # noqa: PLC0415 - as the engine itself, which is loaded by then

        self._made = self._made or Control(self._engine)
        return self._made

    def wait_ms(self, most: int | None) -> int | None:
        """How long an idle engine may wait for messages, of `most`."""
        return most if self._update is None else min(LOOK_MS, LOOK_MS if most is None else most)

    def take(self, message: controls.Control) -> None:
        """Do it, or begin to."""
        match message:
            case controls.Pause():
                self._answer(message, lambda: self._control.pause(message.mode))
            case controls.Continue():
                self._answer(message, self._control.resume)
            case controls.UpdateFromDisk():
                if self._update is not None:
                    self._end.send(self._controlled(message, "another update of the weights is under way; wait for its end", 409))
                    return
                weights, path, version = self._engine.weights, message.model_path, message.weight_version
                self._update = message, _aside(lambda: weights.from_disk(path, version=version))

    def look(self) -> None:
        """Put in force what has been read by now."""
        if self._update is None or not self._update[1].done():
            return
        (message, reading), self._update = self._update, None
        flush, abort = message.flush_cache, message.abort_all_requests
        error = reading.exception()
        if error is not None:
            self._fail(message, error)
        else:
            self._answer(message, lambda: self._control.install(reading.result(), flush_cache=flush, abort_all_requests=abort))

    def _answer(self, message: controls.Control, work: Callable[[], object]) -> None:
        """Do something that is quick. Only what it raises for the asker is answered; a fault of the engine is everyone's."""
        from pointsman.engine.control import Busy  # noqa: PLC0415

        try:
            work()
        except (ValueError, Busy) as error:
            self._end.send(self._controlled(message, str(error), 409 if isinstance(error, Busy) else 400))
        else:
            self._end.send(self._controlled(message))

    def _fail(self, message: controls.Control, error: BaseException) -> None:
        """Reading failed, and nothing was changed."""
        if isinstance(error, ValueError):
            self._end.send(self._controlled(message, str(error), 400))
            return
        log.error("new weights could not be read; the old ones go on serving", exc_info=error)
        text = f"the weights could not be read ({type(error).__name__}); the old ones go on serving"
        self._end.send(self._controlled(message, text, 500))

    def _controlled(self, message: controls.Control, error: str | None = None, status: int = 200) -> controls.Controlled:
        engine = self._engine
        return controls.Controlled(
            number=message.number, error=error, status=status, paused=engine.paused, weight_version=engine.weight_version
        )


def _aside(work: Callable[[], Fresh]) -> Future[Fresh]:
    """Do it in a thread that does not keep the process from ending."""
    done: Future[Fresh] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
            done.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return done
