"""Ranks as actors of a Ray cluster, on one host or several.

Ray finds room (a placement group with a bundle for each rank), starts an actor in each, and ends them with the engine. Orders do not go
through it: each actor connects back to rank 0, and from there on it is a rank like any other (`worker_process`), at the price of a
socket. Rank 0 is the engine's own process; the first bundle is on its host, and an actor that does nothing holds it.

On one host everything stays on the loopback address. Between hosts, orders and exchanges of tensors travel unencrypted, as Ray's own do:
the hosts share a network that is trusted, the same pointsman, and the checkpoint's folder under the same path.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import get_node_ip_address, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pointsman.distributed.rendezvous import listen
from pointsman.engine.channel import Channel
from pointsman.engine.orders import MAX_BYTES, MAX_REPLY_BYTES
from pointsman.engine.places import LOOPBACK, Places
from pointsman.engine.ray_cluster import join_cluster, runtime_environment
from pointsman.engine.worker_process import serve
from pointsman.engine.workers import Link, RankLost

log = logging.getLogger(__name__)

ROOM_SECONDS = 120.0
COME_SECONDS = 60.0
HELLO_SECONDS = 5.0
HELLO = struct.Struct("<32sH")
LOOK_SECONDS = 0.2


class _Seat:
    """The actor of a bundle."""

    def where(self) -> tuple[str, int, int]:
        """Its host, its process, and the number of its GPU there, or -1."""
        found = ray.get_gpu_ids()
        return get_node_ip_address(), os.getpid(), int(found[0]) if found else -1

    def serve(self, address: str, port: int, token: str, rank: int) -> int:
        """Be this rank until rank 0 says otherwise. Returns an exit code."""
        connection = socket.create_connection((address, port), timeout=COME_SECONDS)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(HELLO.pack(token.encode(), rank))
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        return serve(Channel(connection, most=MAX_BYTES))


def _end_with(connection: socket.socket) -> None:
    """End this process when the other side of a connection has gone, wherever its main thread then is."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    os._exit(1)


class _Actor:
    """A rank as Ray knows it."""

    def __init__(self, actor: Any, done: Any, host: str, pid: int) -> None:
        self._actor, self._done = actor, done
        self.place = f"pid {pid} on {host}"

    def ended(self, seconds: float) -> str | None:
        try:
            return f"ended: exit code {ray.get(self._done, timeout=seconds)}"
        except GetTimeoutError:
            return None
        except RayError as error:
            return f"ended: {type(error).__name__}"

    def kill(self) -> None:
        ray.kill(self._actor)


def start_actors(size: int, *, on_gpus: bool) -> Places:
    """An actor for each rank past the first.

    Raises:
        ValueError: the cluster has no room for as many ranks.
        RankLost: one does not come.
    """
    own = join_cluster()
    group: Any = None
    try:
        group, seats = _take_seats(size, on_gpus=on_gpus)
        found = [ray.get(seat.where.remote(), timeout=COME_SECONDS) for seat in seats]
        here = found[0][0]
        address = LOOPBACK if all(host == here for host, _, _ in found) else here
        links = _gather(seats[1:], [(host, pid) for host, pid, _ in found[1:]], address)
    except RayError as error:
        _leave(group, own)
        raise RankLost(f"Ray could not start {size} ranks: {str(error).splitlines()[0]}") from error
    except BaseException:
        _leave(group, own)
        raise
    log.info("%d ranks by Ray, on %d hosts", size, len({host for host, _, _ in found}))
    devices = [f"cuda:{found[0][2]}", *["cuda:0"] * (size - 1)] if on_gpus else ["cpu"] * size
    return Places(links=links, devices=devices, address=address, release=lambda: _leave(group, own))


def _take_seats(size: int, *, on_gpus: bool) -> tuple[Any, list[Any]]:
    """A placement group and an actor in each of its bundles, the first of which is on this host."""
    needs: dict[str, float] = {"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1}
    there = {name: ray.cluster_resources().get(name, 0) for name in needs}
    wanted = f"{size} ranks need {needs} each, the first of them on this host; the cluster has {there} in all"
    if any(there[name] < size * each for name, each in needs.items()):
        raise ValueError(wanted)
    bundles = [needs | {f"node:{get_node_ip_address()}": 0.001}, *[needs] * (size - 1)]
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(ROOM_SECONDS):
        remove_placement_group(group)
        raise ValueError(f"{wanted}, some of it in use or on hosts that it does not fit")
    seats = [
        ray.remote(_Seat)
        .options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            max_restarts=0,
            runtime_env=runtime_environment(),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        .remote()
        for index in range(size)
    ]
    return group, seats


def _gather(seats: Sequence[Any], places: Sequence[tuple[str, int]], address: str) -> list[Link]:
    """Have each seat serve a rank, and wait until all have connected. Whoever else connects is sent away."""
    token = secrets.token_hex(16)
    channels: dict[int, Channel] = {}
    with listen(address, 0) as listener:
        listener.settimeout(LOOK_SECONDS)
        port = listener.getsockname()[1]
        done = [seat.serve.remote(address, port, token, rank) for rank, seat in enumerate(seats, 1)]
        actors = [_Actor(seat, ref, *place) for seat, ref, place in zip(seats, done, places, strict=True)]
        end = time.monotonic() + COME_SECONDS
        while len(channels) < len(seats):
            for rank, actor in enumerate(actors, 1):
                if rank not in channels and ((how := actor.ended(0)) or time.monotonic() > end):
                    raise RankLost(f"rank {rank} ({actor.place}) {how or 'did not connect'}", rank)
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                known = _admit(connection, token, len(seats))
                if known is None or known in channels:
                    connection.close()
                    continue
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                channels[known] = Channel(connection, most=MAX_REPLY_BYTES)
    return [Link(rank, channels[rank], actor) for rank, actor in enumerate(actors, 1)]


def _admit(connection: socket.socket, token: str, highest: int) -> int | None:
    """The rank that whoever has connected is; None where it does not know the token."""
    connection.settimeout(HELLO_SECONDS)
    hello = b""
    try:
        while len(hello) < HELLO.size and (piece := connection.recv(HELLO.size - len(hello))):
            hello += piece
    except OSError:
        return None
    if len(hello) < HELLO.size:
        return None
    given, rank = HELLO.unpack(hello)
    if not hmac.compare_digest(given, token.encode()) or not 1 <= rank <= highest:
        return None
    connection.settimeout(None)
    return int(rank)


def _leave(group: Any, own: bool) -> None:
    """Give the room back; its actors end with that."""
    if group is not None:
        remove_placement_group(group)
    if own:
        ray.shutdown()
