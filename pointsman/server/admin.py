"""The routes for those who run the server: pausing, and changing the weights. The fields are in `operations`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pointsman.server import controls, reading
from pointsman.server.bridge import Bridge
from pointsman.server.openapi import Route
from pointsman.server.operations import NO_EFFECT, ContinueRequest, PauseRequest, UpdateFromDiskRequest
from pointsman.server.responses import BodyReader, json_response

Handler = Callable[[Request], Awaitable[Response]]


class Admin:
    """The handlers, over one engine."""

    def __init__(self, bridge: Bridge, bodies: BodyReader) -> None:
        self._bridge = bridge
        self._bodies = bodies

    def table(self) -> dict[Route, Handler]:
        """Every route and who answers it."""
        pause = Route("/pause_generation", "Let no step run", PauseRequest, "Controlled", admin=True, optional=True)
        resume = Route("/continue_generation", "Let steps run again", ContinueRequest, "Controlled", admin=True, optional=True)
        disk = Route("/update_weights_from_disk", "Replace the weights by a checkpoint's", UpdateFromDiskRequest, "Controlled", admin=True)
        return {
            pause: self._handler(pause, lambda form: controls.Pause(mode=form.mode)),
            resume: self._handler(resume, lambda form: controls.Continue()),
            disk: self._handler(disk, _from_disk),
            Route("/weight_version", "What the weights in force are called", None, "WeightVersion"): self._weight_version,
        }

    def _handler(self, route: Route, message: Callable[[Any], controls.Control]) -> Handler:
        """Reads the body, has the engine do it, and says how that went."""
        form = route.form
        assert form is not None

        async def handle(http: Request) -> Response:
            body = await self._bodies.read(http, optional=route.optional)
            fields = reading.convert(reading.decode(body) if body else {}, form, NO_EFFECT[form])
            return _controlled(await self._bridge.control(message(fields)))

        return handle

    async def _weight_version(self, http: Request) -> Response:
        self._bridge.served()
        return json_response({"weight_version": self._bridge.weight_version})


def _from_disk(form: UpdateFromDiskRequest) -> controls.Control:
    return controls.UpdateFromDisk(
        model_path=form.model_path,
        flush_cache=form.flush_cache,
        abort_all_requests=form.abort_all_requests,
        weight_version=form.weight_version,
    )


def _controlled(answer: controls.Controlled) -> Response:
    return json_response({"success": True, "paused": answer.paused, "weight_version": answer.weight_version})
