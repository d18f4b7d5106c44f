"""The engine's process: one thread that takes what has arrived, steps, and sends what the step added.

It waits on the socket when there is nothing to do, and looks at it between steps when there is. A request that cannot be run
is refused by itself; anything that goes wrong in a step ends the process, because what the model holds is then unknown, and the
HTTP side tells everyone why. Its standard input is a line with the configuration and then nothing, until the HTTP process ends:
that is how this one knows.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import msgspec

from pointsman.config import EngineConfig
from pointsman.request import QueueFull
from pointsman.server import wire
from pointsman.server.controller import Controller
from pointsman.server.launch import LOG_FORMAT

if TYPE_CHECKING:
    from pointsman.engine.engine import Engine

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
SIGN_SECONDS = 1.0
REPORT_SECONDS = 0.25


def load_engine(config: EngineConfig, on_lost: Callable[[Exception], None]) -> Engine:
    """The real engine. Imported here, because a failing import is a reason to report like any other."""
    from pointsman.engine.engine import Engine  # noqa: PLC0415

    return Engine(config, progress=True, on_lost=on_lost)


def main(load: Callable[[EngineConfig], Engine] | None = None) -> int:
    """Serve one HTTP process until it goes. Returns the exit code.

    Args:
        load: makes the engine; tests have another one.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = sys.stdin.fileno()
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=wire.Launch)
    logging.basicConfig(level=launch.log_level.upper(), format=LOG_FORMAT)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    end = wire.EngineEnd(launch.directory, parent)
    try:
        return run(end, launch.engine, load or loader(end))
    finally:
        end.close()
        shutil.rmtree(launch.directory, ignore_errors=True)  # the HTTP process may have been killed


def loader(end: wire.EngineSide) -> Callable[[EngineConfig], Engine]:
    """What makes the real engine, whose loss of a rank is told there."""
    return functools.partial(load_engine, on_lost=functools.partial(_lose, end))


def run(
    end: wire.EngineSide, config: EngineConfig, load: Callable[[EngineConfig], Engine], ready: Callable[[], object] = lambda: None
) -> int:
    """Load, and serve the other side until it goes or something fails, which it is told. Returns the exit code.

    Args:
        ready: called when the engine is.
    """
    try:
        engine = load(config)
    except ValueError as error:
        end.send(wire.Failed(str(error)))
        return 1
    except Exception as error:  # noqa: BLE001 - whatever it is, the HTTP side must hear of it
        return _report(end, "the engine could not start", error)
    gc.collect()
    gc.freeze()  # what the model is made of stays, and a collection that walks through it stops a step for tens of milliseconds
    end.send(wire.Ready(describe(engine)))
    ready()
    try:
        loop(engine, end)
    except EOFError:
        engine.close()
        return 0
    except Exception as error:  # noqa: BLE001 - the model's state is unknown: tell the HTTP side, and end
        return _report(end, "the engine failed", error)


class Reporter:
    """Tells the HTTP side what the engine is doing: when that has changed, and not too often.

    Attributes:
        changed: there is something to tell.
    """

    def __init__(self, engine: Engine, end: wire.EngineSide) -> None:
        self._engine = engine
        self._end = end
        self._due = 0.0
        self.changed = True

    def wait_ms(self) -> int | None:
        """How long an idle engine may wait for work before there is something to tell; None for ever."""
        return max(0, math.ceil(1000 * (self._due - time.monotonic()))) if self.changed else None

    def report(self) -> None:
        if self.changed and (now := time.monotonic()) >= self._due:
            self._due = now + REPORT_SECONDS
            self.changed = False
            self._end.send(wire.Stats(self._engine.stats()))


def loop(engine: Engine, end: wire.EngineSide) -> NoReturn:
    """Take messages, step, send; for ever. Raises EOFError when the HTTP process has gone, and what a step raises."""
    told = 0.0
    reporter, controller = Reporter(engine, end), Controller(engine, end)
    while True:
        reporter.report()
        controller.look()
        for message in end.receive(wait=not engine.has_work, most_ms=controller.wait_ms(reporter.wait_ms())):
            _take(engine, controller, end, message)
            reporter.changed = True
        if not engine.has_work:
            continue
        deltas = engine.step()
        reporter.changed = True
        if refused := {delta.rid: delta.error for delta in deltas if delta.refused}:
            for rid, reason in refused.items():
                end.send(wire.Refused(rid, reason or "", busy=False))
            deltas = [delta for delta in deltas if not delta.refused]
        if deltas or time.monotonic() - told > SIGN_SECONDS:
            end.send(wire.Deltas(deltas))
            told = time.monotonic()


def _take(engine: Engine, controller: Controller, end: wire.EngineSide, message: wire.ToEngine) -> None:
    match message:
        case wire.Submit():
            try:
                engine.add(message.request)
            except ValueError as error:
                end.send(wire.Refused(message.request.rid, str(error), isinstance(error, QueueFull)))
        case wire.Abort():
            deltas = engine.abort(message.rid)
            if message.tell:
                end.send(wire.Deltas(deltas))
        case wire.FlushCache():
            engine.flush_cache()
            end.send(wire.CacheFlushed())
        case _:
            controller.take(message)


def describe(engine: Engine) -> wire.ModelInfo:
    return wire.ModelInfo(
        name=engine.model_name,
        architecture=engine.architecture.name,
        folder=None if engine.tokenizer is None else str(engine.folder),
        context_length=engine.context_length,
        cache_tokens=engine.cache_tokens,
        vocab_size=engine.architecture.vocab_size,
        layers=engine.architecture.expert_layers,
        num_experts=engine.architecture.num_experts,
        top_k=engine.architecture.top_k,
        generation_defaults=dict(engine.generation_defaults),
    )


def _lose(end: wire.EngineSide, error: Exception) -> None:
    """A rank is lost. The thread that drives the engine raises that, unless it is stuck, in a device or in an exchange with who is gone."""
    end.interrupt(error)
    time.sleep(GRACE_SECONDS)
    try:
        end.last_words(_failed("the engine failed", error))
    finally:
        os._exit(1)


def _report(end: wire.EngineSide, what: str, error: Exception) -> int:
    log.error("%s", what, exc_info=error)
    end.send(_failed(what, error))
    return 1


def _failed(what: str, error: Exception) -> wire.Failed:
    from pointsman.engine.workers import RankLost  # noqa: PLC0415 - as the engine itself, which is loaded by then

    rank = error.rank if isinstance(error, RankLost) else None
    return wire.Failed(f"{what}: {type(error).__name__}: {error}".splitlines()[0], rank)


def _end_with_parent(parent: int) -> None:
    """End the process some seconds after its parent, if it is then still loading or stuck in a step."""
    while os.read(parent, 1):
        pass
    time.sleep(GRACE_SECONDS)
    os._exit(1)
