"""Replicas as threads of the test: engines that connect to seats as those of Ray Serve do."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from pointsman.config import EngineConfig, ServerConfig, engine_config
from pointsman.server import engine_process
from pointsman.server.app import create_app
from pointsman.server.bridge import Bridge
from pointsman.server.fleet import Fleet
from pointsman.server.link import EngineLink, Hello
from pointsman.server.meter import Meter
from pointsman.server.prompts import ServedModel
from pointsman.server.seats import Seat, Seats
from tests.server.fake_engine import FakeEngine

TOKEN = "t" * 32
LIMIT = 120  # seconds after which a thread counts as hanging


class Street:
    """Seats, and who sits in them.

    Attributes:
        engines: in the order in which they have loaded.
        links: of all that have come, in their order.
    """

    def __init__(self, number: int, config: dict[str, Any], load: Callable[[EngineConfig], Any] = FakeEngine) -> None:
        self.config = engine_config(**config)
        self.load = load
        self.engines: list[Any] = []
        self.links: list[EngineLink] = []
        self._threads: list[threading.Thread] = []
        self.seats = Seats(number, self._bridge, block=self.config.cache.page_size, token=TOKEN)
        self.port = 0

    @property
    def fleet(self) -> Fleet:
        return self.seats.fleet

    def _bridge(self, seat: Seat, name: str) -> Bridge:
        load = functools.partial(ServedModel.load, reasoning_parser=None, tool_call_parser=None)
        return Bridge(seat, load, Meter(), max_requests=64, watchdog_seconds=300, name=name)

    async def come(self) -> None:
        """Another engine connects and loads; returns when it sits."""
        before = self._num_there
        link = await asyncio.to_thread(EngineLink, "127.0.0.1", self.port, Hello(token=TOKEN, place="a thread"), seconds=10)
        self.links.append(link)

        def load(config: EngineConfig) -> Any:
            self.engines.append(self.load(config))
            return self.engines[-1]

        def serve() -> None:
            try:
                engine_process.run(link, self.config, load)
            finally:
                link.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self._threads.append(thread)
        while self._num_there == before:
            await asyncio.sleep(0.01)

    @property
    def _num_there(self) -> int:
        return sum(entry["state"] not in ("loading", "failed") for entry in self.fleet.describe())

    def kill(self, number: int) -> None:
        """The connection of one is cut off, as when its process dies."""
        self.links[number]._connection.shutdown(2)

    async def end(self) -> None:
        await self.seats.close()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, LIMIT)
            assert not thread.is_alive(), "an engine has not ended"


@contextlib.asynccontextmanager
async def street(number: int, config: dict[str, Any], load: Callable[[EngineConfig], Any] = FakeEngine) -> AsyncIterator[Street]:
    """So many replicas that are ready."""
    town = Street(number, config, load)
    town.port = await town.seats.listen("127.0.0.1")
    try:
        for _ in range(number):
            await town.come()
        yield town
    finally:
        await town.end()


def client(town: Street) -> httpx.AsyncClient:
    """Of the routes over them."""
    app = create_app(town.fleet, ServerConfig(), town.config)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=30)
