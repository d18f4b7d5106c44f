"""Where a step runs.

An executor takes plans in order and answers each with a result. `Inline` runs a step in the caller's thread, when the result
is asked for: nothing overlaps, and nothing is simpler. `Threaded` runs it in a thread of its own, so that the engine plans and
delivers while the step computes; a step holds the interpreter's lock only between its kernels. `Launching` is for a step that runs
on a device: the caller's thread launches it and goes on, and only the result is waited for. `Leading` is any of these with other ranks
behind it: they are sent the plan first, and a rank that is lost ends the wait.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from pointsman.engine.candidates import executor_choice
from pointsman.engine.ending import end_without
from pointsman.engine.model_runner import ModelRunner, Pending
from pointsman.engine.orders import Run
from pointsman.engine.workers import RankLost, Workers
from pointsman.step import StepPlan, StepResult

__all__ = ["Executor", "Inline", "Launching", "Leading", "Pending", "Threaded", "choose_executor"]


class Executor(Protocol):
    """Runs plans in the order of submission; a fault of a step is raised by `submit` or by its `result()`."""

    def submit(self, plan: StepPlan) -> Pending: ...

    def close(self) -> None: ...


def choose_executor(runner: ModelRunner, *, overlap: bool) -> Executor:
    """The executor for the order of steps that is asked for."""
    ways: dict[str, type[Inline] | type[Launching] | type[Threaded]] = {"launching": Launching, "threaded": Threaded, "inline": Inline}
    return ways[executor_choice(overlap=overlap, on_device=runner.on_device).take()](runner)


class Inline:
    """Runs the step when its result is asked for."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def submit(self, plan: StepPlan) -> Pending:
        return _Deferred(self._runner, plan)

    def close(self) -> None:
        pass


class _Deferred:
    def __init__(self, runner: ModelRunner, plan: StepPlan) -> None:
        self._runner, self._plan = runner, plan

    def result(self) -> StepResult:
        return self._runner.execute(self._plan)


class Launching:
    """Launches the step on its device at once."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def submit(self, plan: StepPlan) -> Pending:
        return self._runner.launch(plan)

    def close(self) -> None:
        pass


class Threaded:
    """Runs steps one after the other in one thread."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        return self._thread.submit(self._runner.execute, plan)

    def close(self) -> None:
        self._thread.shutdown(wait=True)


class Leading:
    """Runs steps on every rank. Raises RankLost, from `submit` or the result, where one is lost."""

    def __init__(self, here: Executor, workers: Workers) -> None:
        self._here, self._workers = here, workers

    def submit(self, plan: StepPlan) -> Pending:
        self._workers.send(Run(plan))
        try:
            return _Led(self._here.submit(plan), self._workers, launched=isinstance(self._here, Launching))
        except Exception as error:
            raise self._workers.cause(error) from error

    def close(self) -> None:
        self._workers.close()  # first: a step that waits for a rank which is gone ends by that
        self._here.close()
        if isinstance(self._here, Launching) and self._workers.lost.done():
            end_without(torch.cuda.synchronize, "the device")


class _Led:
    """A step under way on all ranks."""

    def __init__(self, step: Pending, workers: Workers, *, launched: bool) -> None:
        self._step, self._workers = step, workers
        self._done = torch.cuda.current_stream().record_event() if launched else None

    def result(self) -> StepResult:
        try:
            if isinstance(self._step, Future):
                result: StepResult = self._workers.first(self._step)
                return result
            while self._done is not None and not self._done.query():
                if self._workers.lost.done():
                    self._workers.lost.result()
                time.sleep(0)
            return self._step.result()
        except RankLost:
            raise
        except Exception as error:
            raise self._workers.cause(error) from error
