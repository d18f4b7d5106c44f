"""The engine's process, where those who run it ask: pauses at once, updates in a thread of their own.

Reading weights takes as long as it takes, and meanwhile the engine steps, takes requests and is asked other things. Only the change
itself, and what of it cannot be made ready beside the steps, is made by the thread that steps, which looks here in between.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from pointsman.server import controls, wire

if TYPE_CHECKING:
    from pointsman.engine.control import Control
    from pointsman.engine.engine import Engine
    from pointsman.engine.spread_weights import SpreadWeights
    from pointsman.engine.weights import Fresh, Weights

log = logging.getLogger(__name__)

LOOK_MS = 10

Update = controls.UpdateFromDisk | controls.UpdateFromTensors | controls.UpdateFromGroup


class Controller:
    """Does what is asked of one engine, and answers."""

    def __init__(self, engine: Engine, end: wire.EngineSide) -> None:
        self._engine = engine
        self._end = end
        self._made: Control | None = None
        self._work: tuple[controls.Work, Future[Fresh | None]] | None = None
        self._held: Fresh | None = None

    @property
    def _control(self) -> Control:
        from pointsman.engine.control import Control  # noqa: PLC0415 - as the engine itself, which is loaded by then

        self._made = self._made or Control(self._engine)
        return self._made

    def wait_ms(self, most: int | None) -> int | None:
        """How long an idle engine may wait for messages, of `most`."""
        return most if self._work is None else min(LOOK_MS, LOOK_MS if most is None else most)

    def take(self, message: controls.Control) -> None:
        """Do it, or begin to."""
        match message:
            case controls.Pause():
                self._answer(message, lambda: self._control.pause(message.mode))
            case controls.Continue():
                self._answer(message, self._control.resume)
            case controls.Install():
                self._install(message)
            case controls.Drop():
                self._drop(message)
            case _ if self._work is not None or self._held is not None:
                text = "an update of the weights, or a return of memory, is under way; wait for its end"
                self._end.send(self._controlled(message, text, 409))
            case controls.Release():
                self._answer(message, lambda: self._control.release_memory(message.tags))
            case controls.Resume():
                self._resume(message)
            case _:
                weights = self._engine.weights
                self._work = message, _aside(lambda: work(weights, message))

    def _install(self, message: controls.Install) -> None:
        """Put in force what is held."""
        if self._held is None:
            self._end.send(self._controlled(message, "no weights are held that could be put in force", 409))
            return
        fresh, self._held = self._held, None
        named = dataclasses.replace(fresh, update=dataclasses.replace(fresh.update, weight_version=message.weight_version))
        self._answer(message, lambda: self._control.install(named))

    def _drop(self, message: controls.Drop) -> None:
        """Forget what is held, once nothing is being read; no error where there is nothing."""
        if self._work is not None:
            self._end.send(self._controlled(message, "an update of the weights is being read; wait for its end", 409))
            return
        self._held = None
        self._answer(message, self._engine.weights.give_up)

    def _resume(self, message: controls.Resume) -> None:
        """Begin to have memory again, where that can be."""
        try:
            tags = self._control.check_resume(message.tags)
        except ValueError as error:
            self._end.send(self._controlled(message, str(error), 400))
            return
        weights = self._engine.weights
        self._work = message, _aside(lambda: weights.restore(tags))

    def look(self) -> None:
        """Put in force what has been read by now."""
        if self._work is None or not self._work[1].done():
            return
        (message, reading), self._work = self._work, None
        error = reading.exception()
        if error is not None:
            self._fail(message, error)
            return
        fresh = reading.result()
        if fresh is None or isinstance(message, controls.JoinGroup | controls.LeaveGroup):
            self._end.send(self._controlled(message))
            return
        self._engine.settle()
        try:
            fresh = self._engine.weights.complete(fresh)
        except Exception as making:  # noqa: BLE001 - as where reading fails
            self._fail(message, making)
            return
        if not isinstance(message, controls.Resume) and message.hold:
            self._held = fresh
            self._end.send(self._controlled(message))
            return
        self._answer(message, lambda: self._control.install(fresh))

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
        """Reading, or making a step of what was read, failed, and nothing was changed."""
        if isinstance(error, ValueError):
            self._end.send(self._controlled(message, str(error), 400))
            return
        text = f"this could not be done ({type(error).__name__}); everything is as it was before"
        log.error("%s", text, exc_info=error)
        self._end.send(self._controlled(message, text, 500))

    def _controlled(self, message: controls.Control, error: str | None = None, status: int = 200) -> controls.Controlled:
        engine = self._engine
        return controls.Controlled(
            number=message.number,
            error=error,
            status=status,
            paused=engine.paused,
            released=engine.weights.released,
            weight_version=engine.weight_version,
        )


def work(weights: Weights | SpreadWeights, message: controls.Work) -> Fresh | None:
    """What one asks for, as far as it can be done beside the steps. Raises ValueError where it cannot be done."""
    from pointsman.distributed import Group  # noqa: PLC0415 - torch comes with it, and is there by now

    match message:
        case controls.UpdateFromDisk():
            return weights.from_disk(message.model_path, message.update)
        case controls.UpdateFromTensors():
            return weights.from_files(message.files, message.update)
        case controls.UpdateFromGroup():
            return weights.from_group(message.announced, message.group_name, message.update)
        case controls.JoinGroup():
            weights.join_group(
                Group(
                    master_address=message.master_address,
                    master_port=message.master_port,
                    rank=message.rank,
                    world_size=message.world_size,
                    name=message.name,
                    backend=message.backend,
                    timeout=message.timeout,
                    device=weights.device,
                )
            )
        case controls.LeaveGroup():
            weights.leave_group(message.name)
    return None


def _aside(work: Callable[[], Fresh | None]) -> Future[Fresh | None]:
    """Do it in a thread that does not keep the process from ending."""
    done: Future[Fresh | None] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
            done.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return done
