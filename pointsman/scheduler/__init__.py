"""Which tokens run in the next step: the queue, the pages, the lanes. Integers and lists only, and no clock."""

from __future__ import annotations

from pointsman.scheduler.scheduler import Scheduler
from pointsman.scheduler.sequence import Advance, Sequence

__all__ = ["Advance", "Scheduler", "Sequence"]
