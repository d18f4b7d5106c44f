"""The places of a server's replicas, whoever sits in them: engines that connect to this process, and others that follow them.

Who starts the engines is no affair of this module (`replicas` has Ray Serve do it). One that connects takes a free seat; the seat's bridge
begins, or begins anew, and when the engine has gone the seat is free for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable

from pointsman.server.bridge import Bridge
from pointsman.server.errors import ApiError
from pointsman.server.fleet import Fleet
from pointsman.server.lifetime import Restarts, first
from pointsman.server.link import Hello, ServerLink, accept

log = logging.getLogger(__name__)


class Seat:
    """The place of one replica: the process of a bridge.

    Attributes:
        place: where who sits in it runs, for people.
    """

    def __init__(self) -> None:
        self._link: ServerLink | None = None
        self._gone = threading.Event()
        self.place = ""

    @property
    def end(self) -> ServerLink:
        assert self._link is not None, "nobody has come yet"
        return self._link

    def take(self, hello: Hello, link: ServerLink) -> None:
        self._link, self.place, self._gone = link, hello.place, threading.Event()

    def leave(self) -> None:
        """Who sits in it has gone, or is to go: that its link ends tells it so."""
        if self._link is not None:
            self._link.abort()
        self._gone.set()

    def wait(self) -> int:
        self._gone.wait()
        return 0


class Seats:
    """All of them.

    Args:
        number: how many.
        make: a bridge to who sits in a seat, under a name.
        block: tokens by which prompts are compared.
        token: without which nobody is let in.

    Attributes:
        fleet: their engines together.
        num_arrived: how many have connected so far.
    """

    def __init__(self, number: int, make: Callable[..., Bridge], *, block: int, token: str) -> None:
        self._seats = [Seat() for _ in range(number)]
        self._bridges = [make(seat, name=f"replica {index}") for index, seat in enumerate(self._seats)]
        self.fleet = Fleet(self._bridges, block=block)
        self._token = token
        self._arrived: asyncio.Queue[tuple[Hello, ServerLink, asyncio.Event]] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self._tasks = [asyncio.create_task(self._keep(index)) for index in range(number)]
        self.num_arrived = 0

    async def listen(self, address: str) -> int:
        """Let engines in at this address; the port."""
        listener = socket.create_server((address, 0))
        self._server = await accept(listener, self._token, self._arrive)
        return int(listener.getsockname()[1])

    def _arrive(self, hello: Hello, link: ServerLink) -> Callable[[], Awaitable[None]]:
        """An engine has connected; what is to be done when it has gone."""
        ended = asyncio.Event()
        self.num_arrived += 1
        self._arrived.put_nowait((hello, link, ended))

        async def end() -> None:
            ended.set()

        return end

    async def _keep(self, index: int) -> None:
        """See one seat through its engines, one after the other, until there is to be no other."""
        restarts, fleet, seat, bridge = Restarts(), self.fleet, self._seats[index], self._bridges[index]
        while True:
            hello, link, ended = await self._arrived.get()
            seat.take(hello, link)
            if bridge.reason is None:
                bridge.start()
            else:
                bridge.revive()
            losing = asyncio.create_task(_fail_after(ended, bridge))
            await first(bridge.ready, bridge.gone)
            if bridge.ready.is_set():
                log.info("%s is ready (%s)", bridge.name, seat.place)
                with contextlib.suppress(ApiError):  # it has gone again
                    await fleet.begun(index)
            await bridge.gone.wait()
            losing.cancel()
            fleet.lost(index)
            seat.leave()
            if fleet.reason is not None:
                return
            reason = f"{bridge.name} ({seat.place}): {bridge.reason}"
            if not restarts.allowed(was_ready=bridge.ready.is_set()):
                fleet.fail(reason, replicas_failed())
                return
            log.error("%s; another takes its place", reason)

    async def close(self) -> None:
        """Send them all away."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        for seat in self._seats:
            seat.leave()


async def _fail_after(ended: asyncio.Event, bridge: Bridge) -> None:
    """Tell whoever waits for an engine that its link has ended, whatever the one who keeps its seat is waiting for."""
    await ended.wait()
    bridge.fail("its process ended without saying why", ApiError(500, f"{bridge.name} failed", code="engine_failed"))


def replicas_failed() -> ApiError:
    return ApiError(500, "the replicas failed", code="engine_failed")
