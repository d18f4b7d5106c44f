"""This process in a Ray cluster: what ranks (`ray`) and replicas (`server.replicas`) need of one alike. It loads no tensor library."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray


def join_cluster() -> bool:
    """Be part of the cluster that RAY_ADDRESS or this host has, else of one of our own. Returns whether it was not so before."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _own_signals():
        ray.init(logging_level=logging.WARNING, include_dashboard=False, configure_logging=False)
    return True


def runtime_environment() -> dict[str, Any]:
    """What actors are given, so that they look for modules where this process does."""
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}


def keep_signals() -> None:
    """Have SIGINT and SIGTERM go where they went before Ray, joined in another thread, took them. For the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.getsignal(number))


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself; who drives an engine has a say in that."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
