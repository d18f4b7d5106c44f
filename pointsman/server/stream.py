"""What the engine adds to the requests behind one HTTP request.

What arrives is put here at once and taken when the client's turn comes, all that is there in one go. So a slow reader costs fewer and
larger writes, never a longer queue of small ones; one that is too far behind is given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from pointsman.request import ChoiceDelta, FinishReason, Request
from pointsman.server.errors import ApiError

log = logging.getLogger(__name__)

MAX_BACKLOG = 1 << 18
SHORTEST_WAIT = 0.1


class Owner(Protocol):
    """What a stream needs of whoever runs its requests."""

    @property
    def weight_version(self) -> str: ...
    @property
    def halted_seconds(self) -> float: ...
    def forget(self, request: Request) -> None: ...
    def abort(self, rid: str, *, tell: bool = False) -> None: ...


class Stream:
    """Lists of deltas: all that have arrived since the last one, until every choice has ended. Closing it earlier aborts the rest.

    Iterating raises ApiError where the engine refuses or fails.
    """

    def __init__(self, owner: Owner, requests: Sequence[Request]) -> None:
        self._owner = owner
        self._requests = {request.rid: request for request in requests}
        self._left = {request.rid: set(range(request.sampling.n)) for request in requests}
        self._arrived: list[ChoiceDelta] = []
        self._backlog = 0
        self._error: ApiError | None = None
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def fail_after(self, seconds: float, error: ApiError) -> None:
        """End it with this error where it has not ended by then. Time in which the engine is paused does not count."""
        paused = self._owner.halted_seconds

        def due() -> None:
            if (more := self._owner.halted_seconds - paused) > 0:
                self.fail_after(max(more, SHORTEST_WAIT), error)
            else:
                self.fail(error)

        self._timer = asyncio.get_running_loop().call_later(seconds, due)

    def put(self, delta: ChoiceDelta) -> None:
        if delta.refused:
            self.fail(ApiError(400, delta.error or "the request was refused"))
            return
        if delta.finish_reason is FinishReason.ERROR:
            log.error("the engine gave up on %s: %s", delta.rid, delta.error)
            self.fail(ApiError(500, "the engine could not finish this request"))
            return
        if delta.finish_reason is not None:
            self._left[delta.rid].discard(delta.index)
            if not self._left[delta.rid]:
                self._end(delta.rid)
        self._backlog += 1 + sum(map(len, delta.logprobs or ()))
        if self._backlog > MAX_BACKLOG:
            self.fail(ApiError(400, "the client reads too slowly", code="slow_client"))
            return
        self._arrived.append(delta)
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End it with an error; what has arrived is dropped."""
        self._error = self._error or error
        self._arrived.clear()
        self.close()
        self._news.set()

    def abort(self, rid: str) -> None:
        """End every choice of a request that has not ended, as aborted; at once, unless the engine has something to add."""
        if rid not in self._left:
            return
        if self._requests[rid].sampling.return_routed_experts or self._requests[rid].replay is not None:
            self._owner.abort(rid, tell=True)
        else:
            self._owner.abort(rid)
            for index in sorted(self._left[rid]):
                version = self._owner.weight_version
                self.put(ChoiceDelta(rid=rid, index=index, finish_reason=FinishReason.ABORT, weight_version=version))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        if not self._arrived and self._error is None:
            if not self._left:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        arrived, self._arrived, self._backlog = self._arrived, [], 0
        return arrived

    def close(self) -> None:
        """Abort what has not ended; harmless after the end and when called twice."""
        if self._timer is not None:
            self._timer.cancel()
        for rid in list(self._left):
            self._owner.abort(rid)
            self._end(rid)

    def _end(self, rid: str) -> None:
        del self._left[rid]
        self._owner.forget(self._requests[rid])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
