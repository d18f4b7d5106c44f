"""Replicas by Ray Serve: whole engines as a deployment of a Ray cluster, on one host or several.

Serve finds room for each (a GPU for each of its ranks, on one host), starts them, and puts another in the place of one that has died.
Requests do not go through its proxies and handles, which know neither tokens nor what an engine has cached, and would cost a call for
each piece of each stream: every replica connects back to this process with a token (`link`), and from there on is an engine behind a
bridge like any other, with one message for a whole step. What is sent to whom is decided by `fleet`.

On one host all of it stays on the loopback address. Between hosts the links are not encrypted, as Ray's own traffic is not unless it
was set up so.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import ray
from ray import serve
from ray.util import get_node_ip_address

from pointsman.config import EngineConfig
from pointsman.engine.places import LOOPBACK
from pointsman.engine.ray_cluster import join_cluster, keep_signals, runtime_environment
from pointsman.server.bridge import Bridge
from pointsman.server.engine_process import GRACE_SECONDS, loader, run
from pointsman.server.fleet import Fleet
from pointsman.server.launch import LOG_FORMAT
from pointsman.server.link import EngineLink, Hello
from pointsman.server.seats import Seats, replicas_failed

log = logging.getLogger(__name__)

T = TypeVar("T")
ROOM_SECONDS = 120.0
COME_SECONDS = 60.0
LOOK_SECONDS = 1.0
STOP_SECONDS = 5.0
MAX_CONSTRUCTIONS = 3


class Replica:
    """One engine, in the process that Ray Serve has given it."""

    def __init__(self, engine: bytes, address: str, port: int, token: str, app: str, log_level: str) -> None:
        logging.basicConfig(level=log_level.upper(), format=LOG_FORMAT)
        config = msgspec.json.decode(engine, type=EngineConfig)
        hello = Hello(token=token, place=f"pid {os.getpid()} on {get_node_ip_address()}")
        link = EngineLink(address, port, hello, seconds=COME_SECONDS)
        link.on_end(functools.partial(_leave, address, port, app))
        started: Future[None] = Future()
        threading.Thread(target=_drive, args=(link, config, started), name="engine", daemon=True).start()
        started.result()


def _drive(link: EngineLink, config: EngineConfig, started: Future[None]) -> None:
    """Be the engine until it ends, and end the process then: what is left of a model that has failed is good for nothing."""
    code = 1
    try:
        code = run(link, config, loader(link), ready=lambda: started.set_result(None))
    finally:
        if started.done():
            os._exit(code)
        started.set_exception(RuntimeError("the engine could not start; the server has said why"))


def _leave(address: str, port: int, app: str) -> None:
    """The server has closed the link. Where it is no more at all, nobody else takes the deployment away."""
    try:
        socket.create_connection((address, port), timeout=COME_SECONDS).close()
    except OSError:
        with contextlib.suppress(Exception):
            serve.delete(app, _blocking=False)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


async def _beside(work: Callable[[], T]) -> T:
    """Do it in a thread that does not keep this process from ending: Ray waits minutes for a cluster that does not answer."""
    loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:  # noqa: BLE001 - whoever waits for it gets it
            result, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result, error)
        threading.Event().wait()  # what Ray has started here ends when this thread does

    threading.Thread(target=run, name="ray", daemon=True).start()
    found: T = await done
    return found


class Replicas:
    """The replicas of a server.

    Args:
        config: of all; `data_parallel_size` says how many.

    Raises:
        ValueError: the configuration cannot be had with replicas.
    """

    def __init__(self, config: EngineConfig, *, log_level: str) -> None:
        if (backend := config.parallel.distributed_executor_backend) not in ("auto", "mp"):
            raise ValueError(f"distributed_executor_backend is {backend!r}; the ranks of a replica are processes of its host: use 'mp'")
        self._config, self._log_level = config, log_level
        self._number = config.parallel.data_parallel_size
        self._app = f"pointsman-{secrets.token_hex(4)}"
        self._token = secrets.token_hex(16)
        self._own_cluster = self._deployed = False
        self._seats: Seats | None = None
        self._deploying: asyncio.Task[None] | None = None

    def begin(self, make: Callable[..., Bridge]) -> Fleet:
        """Begin to start them; in the event loop.

        Args:
            make: a bridge to who sits in a seat, under a name.
        """
        self._seats = Seats(self._number, make, block=self._config.cache.page_size, token=self._token)
        self._deploying = asyncio.create_task(self._deploy(self._seats))
        return self._seats.fleet

    async def _deploy(self, seats: Seats) -> None:
        """Have Serve start them; end the server where it cannot."""
        try:
            address, needs = await _beside(self._join)
            keep_signals()
            port = await seats.listen(address)
            starting = asyncio.ensure_future(_beside(functools.partial(self._start, address, port, needs)))
            end = time.monotonic() + ROOM_SECONDS
            while seats.num_arrived < self._number and not starting.done():
                if time.monotonic() > end:
                    raise ValueError(f"{seats.num_arrived} have come in {ROOM_SECONDS:g} s; each needs {needs}, which may not be free")
                await asyncio.sleep(LOOK_SECONDS)
            await starting
        except Exception as error:  # noqa: BLE001 - whatever of Ray's it is, the server cannot do without
            text = str(error).strip().splitlines() or [type(error).__name__]
            seats.fleet.fail(f"Ray Serve could not start {self._number} replicas: {text[0]}", replicas_failed())

    def _join(self) -> tuple[str, dict[str, float]]:
        """The address at which replicas reach this process, and what each needs. Raises ValueError where the cluster has less."""
        self._own_cluster = join_cluster()
        there = ray.cluster_resources()
        ranks, device = self._config.parallel.tensor_parallel_size, self._config.kernel.device
        on_gpus = device == "cuda" or (device == "auto" and there.get("GPU", 0) > 0)
        needs = dict.fromkeys(["CPU", "GPU"] if on_gpus else ["CPU"], float(ranks))
        if any(there.get(name, 0) < self._number * each for name, each in needs.items()):
            has = {name: there.get(name, 0) for name in needs}
            raise ValueError(f"each needs {needs}; the cluster has {has} in all")
        if not on_gpus and self._config.kernel.num_threads is None:
            threads = max(int(there["CPU"]) // self._number, 1)
            self._config = replace(self._config, kernel=replace(self._config.kernel, num_threads=threads))
        one_host = sum(node["Alive"] for node in ray.nodes()) == 1
        return LOOPBACK if one_host else get_node_ip_address(), needs

    def _start(self, address: str, port: int, needs: dict[str, float]) -> None:
        one = replace(self._config, parallel=replace(self._config.parallel, data_parallel_size=1))
        options: dict[str, Any] = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "runtime_env": runtime_environment()}
        deployment = serve.deployment(
            name="replica",
            num_replicas=self._number,
            ray_actor_options=options,
            health_check_period_s=LOOK_SECONDS,
            graceful_shutdown_wait_loop_s=LOOK_SECONDS,
            graceful_shutdown_timeout_s=STOP_SECONDS,
            max_constructor_retry_count=MAX_CONSTRUCTIONS * self._number,
        )(Replica)
        app = deployment.bind(msgspec.json.encode(one), address, port, self._token, self._app, self._log_level)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        self._deployed = True
        serve.run(app, name=self._app, route_prefix=None, logging_config={"log_level": "WARNING"})

    async def stop(self) -> None:
        """End them all, and what of the cluster was started for them."""
        await _beside(self._take_away)
        if self._deploying is not None:
            self._deploying.cancel()
            await asyncio.gather(self._deploying, return_exceptions=True)
        if self._seats is not None:
            await self._seats.close()

    def _take_away(self) -> None:
        if not ray.is_initialized():
            return
        try:
            if self._deployed:
                serve.delete(self._app)
                if self._own_cluster:
                    serve.shutdown()
        except Exception:  # the server ends, whatever becomes of Ray
            log.exception("Ray Serve could not take the replicas away")
        if self._own_cluster:
            ray.shutdown()
