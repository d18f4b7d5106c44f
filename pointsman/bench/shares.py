"""Shares, and how well they are known."""

from __future__ import annotations

import math

Z_95 = 1.959964


def wilson(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of a share, by Wilson's score; 95 % with the usual z."""
    share = hits / total
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    middle, scale = share + z * z / (2 * total), 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
