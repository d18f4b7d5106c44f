"""Several engines behind one address: a bridge to each, and what is done to all.

A request goes to the replica that `scheduler.placement` names, each prompt of a call by itself. A replica that has gone takes its own
requests with it and no others: they get an error with its name, it is sent nothing more, and when another engine has come in its place
that takes requests again.

Weights change on all replicas or on none: each makes the new ones ready and holds them, and only when all do are they put in force. One
that comes later than an update has the weights of the start; it is kept out, and said to be, until an update from disk brings all to the
same again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

import msgspec

from pointsman.request import FIRST_VERSION, ChoiceDelta, MemoryTag, Request
from pointsman.scheduler.placement import Placed, Placement
from pointsman.server import controls
from pointsman.server.bridge import Bridge
from pointsman.server.controls import Controlled
from pointsman.server.errors import ApiError
from pointsman.server.meter import ExpertLoad, Meter
from pointsman.server.prompts import ServedModel
from pointsman.server.stream import Stream

log = logging.getLogger(__name__)

REQUEST_TOKENS = 128


class _Stream(Stream):
    """Tells the fleet of what has come."""

    def __init__(self, fleet: Fleet, requests: Sequence[Request]) -> None:
        super().__init__(fleet, requests)
        self._fleet = fleet

    def put(self, delta: ChoiceDelta) -> None:
        self._fleet.heard(delta.rid)
        super().put(delta)


class Fleet:
    """All replicas' engines, as the routes see them: what `Bridge` is for one.

    Args:
        bridges: to each replica; those that are not there yet are loading.
        block: tokens by which prompts are compared, the page size of the caches.

    Attributes:
        reason: why the server has to end.
        ready: all have been there.
        gone: the server has to end.
        idle: no request runs.
    """

    def __init__(self, bridges: Sequence[Bridge], *, block: int) -> None:
        self._bridges = list(bridges)
        self._placement = Placement(block=block, request_tokens=REQUEST_TOKENS)
        self._placed: dict[str, tuple[Placed, Bridge]] = {}
        self._changing = asyncio.Lock()
        self._num_updates = 0
        self._begun: set[int] = set()
        self._has = [0] * len(self._bridges)  # the number of the update whose weights a replica has
        self.weight_version = FIRST_VERSION
        self.reason: str | None = None
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def _live(self) -> list[tuple[int, Bridge]]:
        """Those whose engine is there, whatever its weights."""
        return [(index, bridge) for index, bridge in enumerate(self._bridges) if index in self._begun and bridge.reason is None]

    @property
    def meters(self) -> dict[str | None, Meter]:
        return {str(index): bridge.meter for index, bridge in enumerate(self._bridges)}

    @property
    def load(self) -> ExpertLoad | None:
        """Of all replicas together."""
        loads = [bridge.meter.load for bridge in self._bridges if bridge.meter.load is not None]
        if not loads:
            return None
        counts = [sum(each) for each in zip(*(load.counts for load in loads), strict=True)]
        return ExpertLoad(loads[0].num_layers, loads[0].num_experts, counts)

    @property
    def halted(self) -> bool:
        return any(bridge.halted for _, bridge in self._live)

    @property
    def halted_seconds(self) -> float:
        return max(bridge.halted_seconds for bridge in self._bridges)

    @property
    def paused(self) -> bool:
        return any(bridge.paused for _, bridge in self._live)

    @property
    def released(self) -> tuple[MemoryTag, ...]:
        """What is released anywhere."""
        return tuple(dict.fromkeys(itertools.chain.from_iterable(bridge.released for _, bridge in self._live)))

    @property
    def running(self) -> int:
        return len(self._placed)

    def served(self) -> ServedModel:
        """The model. Raises ApiError while no replica serves it."""
        if self.reason is not None:
            raise ApiError(503, "all replicas have stopped", code="engine_stopped")
        for index in self._placement.replicas:
            if self._bridges[index].reason is None:
                return self._bridges[index].served()
            self.lost(index)  # it has gone just now
        if any(bridge.reason is not None for bridge in self._bridges) or self._live:
            raise ApiError(503, "no replica can take requests now", code="engine_stopped")
        raise ApiError(503, "the model is still loading", code="model_loading")

    def describe(self) -> list[dict[str, Any]]:
        """Each replica, for `/server_info`."""
        return [
            {
                "replica": index,
                "state": self._state(index, bridge),
                "running": bridge.running,
                "paused": bridge.paused,
                "released": bridge.released,
                "weight_version": bridge.weight_version,
            }
            for index, bridge in enumerate(self._bridges)
        ]

    def _state(self, index: int, bridge: Bridge) -> str:
        if bridge.reason is not None:
            return "failed"
        if index not in self._begun:
            return "loading"
        return "ready" if index in self._placement.replicas else "kept out: its weights are not those of the others"

    async def begun(self, index: int) -> None:
        """The engine of a replica is ready, with the weights of the start."""
        bridge = self._bridges[index]
        async with self._changing:
            self._has[index] = 0
            await self._catch_up(index, bridge)
            self._begun.add(index)
            self._admit(index)
        if index not in self._placement.replicas and bridge.reason is None:
            log.error(
                "%s has the weights of the start and not %r: it is sent nothing until an update from disk", bridge.name, self.weight_version
            )
        if len(self._begun) == len(self._bridges):
            self.ready.set()

    async def _catch_up(self, index: int, bridge: Bridge) -> None:
        """Have one that has just come halted as the others are."""
        others = [other for _, other in self._live]
        if any(other.paused for other in others):
            await bridge.control(controls.Pause(mode="keep"))
        if released := [tag for tag in self.released if all(tag in other.released for other in others)]:
            await bridge.control(controls.Release(tags=released))

    def lost(self, index: int) -> None:
        """The engine of a replica has gone; its requests have been told."""
        self._begun.discard(index)
        self._placement.leave(index)

    def submit(self, requests: Sequence[Request], names: Sequence[str]) -> Stream:
        """Hand requests to the replicas. Raises ApiError where none is there, or one that they should go to has too much to do."""
        self.served()
        for bridge in self._bridges:
            bridge.check_names(names)
        placed: list[tuple[Placed, Bridge]] = []
        try:
            for request in requests:
                replay = None if request.replay is None else request.replay.data  # forced experts make other prefixes
                found = self._placement.place(request.prompt_token_ids, (request.cache_salt, replay))
                assert found is not None
                placed.append((found, self._bridges[found.replica]))
            for bridge in {id(bridge): bridge for _, bridge in placed}.values():
                bridge.check_room([request for request, (_, at) in zip(requests, placed, strict=True) if at is bridge])
        except BaseException:
            for found, _ in placed:
                found.end()
            raise
        stream = _Stream(self, requests)
        for request, name, place in zip(requests, names, placed, strict=True):
            self._placed[request.rid] = place
            place[1].enter(stream, request, name)
        self.idle.clear()
        return stream

    def heard(self, rid: str) -> None:
        """Something of a request has come."""
        if (place := self._placed.get(rid)) is not None:
            place[0].computed()

    def forget(self, request: Request) -> None:
        """A request has ended."""
        if (place := self._placed.pop(request.rid, None)) is None:
            return
        place[0].end()
        place[1].forget(request)
        if not self._placed:
            self.idle.set()

    def abort(self, rid: str, *, tell: bool = False) -> None:
        """Tell its replica to stop working on a request."""
        if (place := self._placed.get(rid)) is not None:
            place[1].abort(rid, tell=tell)

    def abort_named(self, name: str | None) -> int:
        """End what is running under a client's name, or everything. Returns how many requests that were."""
        return sum(bridge.abort_named(name) for bridge in self._bridges)

    async def flush_cache(self) -> None:
        """Have all forget cached prefixes. Raises ApiError."""
        self.served()
        await self._all([(index, bridge.flush_cache()) for index, bridge in self._live])
        self._placement.forget()

    async def control(self, message: controls.Control) -> Controlled:
        """Have all replicas do something. Raises ApiError, with the replica's name, where one does not.

        Changes of weights are made by all or by none. What else one could not do the others have done; asked again, those alone do it.
        """
        match message:
            case controls.JoinGroup() | controls.LeaveGroup() | controls.UpdateFromGroup():
                text = "a process group cannot be had with --dp: a broadcast that one replica misses cannot be held back on the others; "
                raise ApiError(400, text + "use /update_weights_from_disk or /update_weights_from_tensor")
            case controls.UpdateFromDisk() | controls.UpdateFromTensors():
                if self._changing.locked():
                    raise ApiError(409, "an update of the weights is under way; wait for its end", code="not_now")
                async with self._changing:
                    return await self._update(message)
            case _:
                async with self._changing:
                    return await self._each(message)

    async def _each(self, message: controls.Control) -> Controlled:
        """A pause, its end, or memory: what a replica has done before is not asked of it again."""
        if self.reason is not None or not self._live:
            self.served()
        asked: list[tuple[int, Awaitable[Controlled]]] = []
        for index, bridge in self._live:
            own = msgspec.structs.replace(message)
            if isinstance(own, controls.Release | controls.Resume):
                wanted: list[MemoryTag] = own.tags if own.tags is not None else ["weights", "kv_cache"]
                own.tags = [tag for tag in wanted if (tag in bridge.released) == isinstance(own, controls.Resume)]
                if not own.tags:
                    continue
            asked.append((index, bridge.control(own)))
        if not asked:  # let one say what is wrong with it
            index, bridge = self._live[0]
            asked.append((index, bridge.control(message)))
        await self._all(asked)
        if isinstance(message, controls.Release):
            self._placement.forget()
        return self._now()

    async def _update(self, message: controls.UpdateFromDisk | controls.UpdateFromTensors) -> Controlled:
        """New weights on all replicas or on none. Those that are kept out come back with a whole checkpoint alone."""
        self.served()
        if not self.ready.is_set():
            raise ApiError(503, "not all replicas are ready yet; weights change on all or on none", code="model_loading")
        whole = isinstance(message, controls.UpdateFromDisk)
        among = [(index, bridge) for index, bridge in self._live if whole or index in self._placement.replicas]
        try:
            await self._all([(index, bridge.control(msgspec.structs.replace(message, hold=True))) for index, bridge in among])
        except BaseException:
            await asyncio.gather(*(bridge.control(controls.Drop()) for _, bridge in among), return_exceptions=True)
            raise
        if isinstance(message, controls.UpdateFromTensors) and not message.update.final:
            return self._now()
        version = message.update.weight_version or self._next_version()
        self._num_updates += 1
        self.weight_version = version
        if message.update.flush_cache:
            self._placement.forget()
        install = [bridge.control(controls.Install(weight_version=version)) for _, bridge in among]
        for (index, bridge), answer in zip(among, await asyncio.gather(*install, return_exceptions=True), strict=True):
            if isinstance(answer, BaseException):  # it has gone, or could not do what cannot fail: it has not these weights
                log.error("%s did not put the weights %r in force: %s", bridge.name, version, answer)
            else:
                self._has[index] = self._num_updates
        for index, _ in self._live:
            self._admit(index)
        return self._now()

    def _admit(self, index: int) -> None:
        """Let a replica take requests where it has the weights of all, and none otherwise."""
        bridge = self._bridges[index]
        has = bridge.reason is None and bridge.model is not None and self._has[index] == self._num_updates
        if not has:
            self._placement.leave(index)
        elif index not in self._placement.replicas:
            self._placement.join(index, bridge.served().info.cache_tokens)

    def _next_version(self) -> str:
        """As an engine names an update that brings no name."""
        current = self.weight_version
        return str(int(current) + 1 if current.isdecimal() and current.isascii() else self._num_updates + 1)

    def _now(self) -> Controlled:
        return Controlled(paused=self.paused, released=self.released, weight_version=self.weight_version)

    async def _all(self, asked: Sequence[tuple[int, Awaitable[Any]]]) -> None:
        """Wait until each has answered, and raise what the first that could not said, with its name."""
        answers = await asyncio.gather(*(one for _, one in asked), return_exceptions=True)
        for (index, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, ApiError):
                raise ApiError(answer.status, f"{self._bridges[index].name}: {answer}", code=answer.code)
            if isinstance(answer, BaseException):
                raise answer

    def fail(self, reason: str, error: ApiError) -> None:
        """It is all over: end every stream with this error."""
        if self.reason is not None:
            return
        self.reason = reason
        for bridge in self._bridges:
            bridge.fail(reason, error)
        self.gone.set()


Backend = Bridge | Fleet
"""Who runs the requests: one engine, or several."""
