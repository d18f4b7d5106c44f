"""When requests are sent: at once, at random with a given rate, or at a rate that grows.

Gaps are drawn from a gamma distribution with the mean of the rate. Its shape is the burstiness: 1 is a Poisson process, less comes in
bursts, more is steadier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """Requests a second.

    Attributes:
        rate: infinity sends all at once.
        end_rate: what the rate has become at the last request; None keeps it.
        exponential: the rate grows by a constant factor a request, not by a constant step.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    end_rate: float | None = None
    exponential: bool = False

    def rate_at(self, progress: float) -> float:
        """The rate when this share of the requests, 0 to 1, has been sent."""
        if self.end_rate is None:
            return self.rate
        if self.exponential:
            return float(self.rate * (self.end_rate / self.rate) ** progress)
        return self.rate + (self.end_rate - self.rate) * progress

    def offsets_s(self, count: int, draws: Random) -> list[float]:
        """The moment of each request in seconds after the start; the first is sent at once."""
        moments, now = [], 0.0
        for index in range(count):
            moments.append(now)
            rate = self.rate_at(index / max(count - 1, 1))
            if math.isfinite(rate):
                now += draws.gammavariate(self.burstiness, 1 / (rate * self.burstiness))
        return moments
