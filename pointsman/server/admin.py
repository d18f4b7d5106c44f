"""The routes for those who run the server: pausing, changing the weights, freeing memory. The fields are in `operations`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pointsman.server import bounds, controls, reading
from pointsman.server.errors import ApiError
from pointsman.server.fleet import Backend
from pointsman.server.openapi import Route
from pointsman.server.operations import (
    NO_EFFECT,
    ContinueRequest,
    DestroyGroupRequest,
    InitGroupRequest,
    MemoryRequest,
    Part,
    PauseRequest,
    UpdateFields,
    UpdateFromDiskRequest,
    UpdateFromDistributedRequest,
    UpdateFromTensorRequest,
)
from pointsman.server.responses import BodyReader, json_response
from pointsman.update import Update

BINARY = "application/octet-stream"
FILES = "serialized_named_tensors"
UPDATE_SECONDS = 600.0
_TRUTHS: dict[str, Any] = {"true": True, "false": False}

Handler = Callable[[Request], Awaitable[Response]]


class Admin:
    """The handlers, over one engine."""

    def __init__(self, bridge: Backend, bodies: BodyReader) -> None:
        self._bridge = bridge
        self._bodies = bodies
        self._updates = BodyReader(bounds.MAX_UPDATE_BYTES, UPDATE_SECONDS)

    def table(self) -> dict[Route, Handler]:
        """Every route and who answers it."""
        pause = Route("/pause_generation", "Let no step run", PauseRequest, "Controlled", admin=True, optional=True)
        resume = Route("/continue_generation", "Let steps run again", ContinueRequest, "Controlled", admin=True, optional=True)
        release = Route("/release_memory_occupation", "Free memory for a time", MemoryRequest, "Controlled", admin=True, optional=True)
        restore = Route("/resume_memory_occupation", "Have memory again", MemoryRequest, "Controlled", admin=True, optional=True)
        disk = Route("/update_weights_from_disk", "Replace the weights by a checkpoint's", UpdateFromDiskRequest, "Controlled", admin=True)
        tensors = Route(
            "/update_weights_from_tensor", "Replace weights by tensors", UpdateFromTensorRequest, "Controlled", admin=True, binary=True
        )
        group = Route(
            "/update_weights_from_distributed",
            "Replace weights by tensors of a process group",
            UpdateFromDistributedRequest,
            "Controlled",
            admin=True,
        )
        join = Route("/init_weights_update_group", "Join a process group", InitGroupRequest, "Controlled", admin=True)
        leave = Route("/destroy_weights_update_group", "Leave a process group", DestroyGroupRequest, "Controlled", admin=True)
        return {
            tensors: self._from_tensors,
            group: self._handler(group, _from_group),
            join: self._handler(join, _join),
            leave: self._handler(leave, lambda form: controls.LeaveGroup(name=form.group_name)),
            pause: self._handler(pause, lambda form: controls.Pause(mode=form.mode)),
            resume: self._handler(resume, lambda form: controls.Continue()),
            release: self._handler(release, lambda form: controls.Release(tags=form.tags)),
            restore: self._handler(restore, lambda form: controls.Resume(tags=form.tags)),
            disk: self._handler(disk, _from_disk),
            Route("/weight_version", "What the weights in force are called", None, "WeightVersion"): self._weight_version,
        }

    def _handler(self, route: Route, message: Callable[[Any], controls.Control]) -> Handler:
        """Reads the body, has the engine do it, and says how that went."""
        form = route.form
        assert form is not None

        async def handle(http: Request) -> Response:
            body = await self._bodies.read(http, optional=route.optional)
            given = reading.convert(reading.decode(body) if body else {}, form, NO_EFFECT[form])
            return _controlled(await self._bridge.control(message(given)))

        return handle

    async def _from_tensors(self, http: Request) -> Response:
        """Safetensors in base64 among the fields, or as they are, with the other fields in the query."""
        self._bridge.served()
        if http.headers.get("content-type", "").split(";")[0].strip().lower() == BINARY:
            given = {name: _TRUTHS.get(value, value) for name, value in http.query_params.items() if name != FILES}
            form = reading.convert(given, Part, NO_EFFECT[UpdateFromTensorRequest])
            files = [await self._updates.read(http, media=BINARY)]
        else:
            body = await self._updates.read(http)
            form, files = await asyncio.to_thread(_decoded, body)
        return _controlled(await self._bridge.control(controls.UpdateFromTensors(files=files, update=_update(form))))

    async def _weight_version(self, http: Request) -> Response:
        self._bridge.served()
        return json_response({"weight_version": self._bridge.weight_version})


def _from_disk(form: UpdateFromDiskRequest) -> controls.Control:
    return controls.UpdateFromDisk(model_path=form.model_path, update=_update(form))


def _controlled(answer: controls.Controlled) -> Response:
    state = {"paused": answer.paused, "released": answer.released, "weight_version": answer.weight_version}
    return json_response({"success": True, **state})


def _decoded(body: bytes) -> tuple[UpdateFromTensorRequest, list[bytes]]:
    form = reading.convert(reading.decode(body), UpdateFromTensorRequest, NO_EFFECT[UpdateFromTensorRequest])
    texts = form.serialized_named_tensors
    try:
        return form, [base64.b64decode(text, validate=True) for text in ([texts] if isinstance(texts, str) else texts)]
    except ValueError as error:
        raise ApiError(400, f"{FILES} is not base64: {error}; it must be safetensors files in base64", param=FILES) from None


def _update(form: UpdateFields) -> Update:
    """What of it the fields tell; one from disk comes in no parts."""
    return Update(**{field.name: getattr(form, field.name) for field in fields(Update) if field.name in form.__struct_fields__})


def _from_group(form: UpdateFromDistributedRequest) -> controls.Control:
    lengths = {name: len(getattr(form, name)) for name in ("names", "dtypes", "shapes")}
    if len(set(lengths.values())) > 1:
        spelt = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ApiError(400, f"{spelt} entries; there must be one of each for every tensor", param="names")
    dtypes = [dtype.removeprefix("torch.") for dtype in form.dtypes]
    announced = list(zip(form.names, dtypes, map(tuple, form.shapes), strict=True))
    return controls.UpdateFromGroup(group_name=form.group_name, announced=announced, update=_update(form))


def _join(form: InitGroupRequest) -> controls.Control:
    if form.rank_offset >= form.world_size:
        raise ApiError(400, f"rank_offset is {form.rank_offset}; it must be below world_size, {form.world_size}", param="rank_offset")
    return controls.JoinGroup(
        master_address=form.master_address,
        master_port=form.master_port,
        rank=form.rank_offset,
        world_size=form.world_size,
        name=form.group_name,
        backend=form.backend,
        timeout=form.timeout,
    )
