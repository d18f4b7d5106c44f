"""The process of a rank past the first: it gives signs of life, obeys orders, and ends with whoever gives them.

Little is imported before the first sign; the tensor library takes seconds. Signals that ask a process to end are left to rank 0, which
ends the others in order. When rank 0 is gone, however that came about, this process goes at once, even out of an exchange that
would never end.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time

from pointsman.engine.channel import Channel
from pointsman.engine.orders import MAX_BYTES, Fault, Here, Sign, encode

log = logging.getLogger(__name__)

SIGN_SECONDS = 1.0


def main(descriptor: int) -> int:
    """Serve the rank 0 that has the other end of this socket. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return serve(Channel(socket.socket(fileno=descriptor), most=MAX_BYTES))


def serve(channel: Channel) -> int:
    """Obey the orders that come until the last. Returns the exit code: 0 where that was an order to end."""
    threading.Thread(target=_give_signs, args=(channel,), daemon=True).start()
    try:
        # Imported only now: signs are given meanwhile. A failing import is a reason to report like any other.
        from pointsman.engine.worker import work  # noqa: PLC0415

        channel.send(encode(Here()))
        fault = work(channel)
    except EOFError:
        return 1
    except Exception as error:
        log.error("this rank failed", exc_info=error)
        fault = Fault(f"{type(error).__name__}: {error}".splitlines()[0], bereft=isinstance(error, ConnectionError))
    if fault is None:
        return 0
    try:
        channel.send(encode(fault))
    except OSError:
        pass
    return 1


def _give_signs(channel: Channel) -> None:
    sign = encode(Sign())
    while True:
        try:
            channel.send(sign)
        except OSError:
            return
        time.sleep(SIGN_SECONDS)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)
