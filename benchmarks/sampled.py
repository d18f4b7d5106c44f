"""Where a process's time goes, by part: its main thread is looked at every few milliseconds of CPU time.

The profilers of the standard library measure every call, which makes calls look expensive and a server slow. A look costs some
microseconds. What is seen is the innermost function whose module is one of the parts: time in C counts for who called it.
"""

from __future__ import annotations

import atexit
import json
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

SECONDS = 0.002


def sample_into(path: str, parts: Mapping[str, str]) -> None:
    """From now on count looks by part, and write the shares there when the process ends.

    Args:
        parts: a piece of `file:function` to the name of the part; the first that fits counts.
    """
    counts: Counter[str] = Counter()
    known: dict[object, str | None] = {}

    def part_of(frame: FrameType) -> str | None:
        code = frame.f_code
        if code not in known:
            place = f"{code.co_filename}:{code.co_name}"
            known[code] = next((part for piece, part in parts.items() if piece in place), None)
        return known[code]

    def look(number: int, frame: FrameType | None) -> None:
        part = None
        while frame is not None and (part := part_of(frame)) is None:
            frame = frame.f_back
        counts[part or "other"] += 1

    def write() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        total = sum(counts.values()) or 1
        Path(path).write_text(json.dumps({name: count / total for name, count in counts.most_common()}))

    signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
    atexit.register(write)
