"""The heat map of a model's experts: a row a layer, a column an expert, the colour how often it was used.

The scale is the same in every picture, so that two can be compared: paper is unused, the first colour an even share, the darkest three
times that and more. Beside each layer stands its busiest expert, as a multiple of an even share.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pointsman.plots.canvas import Canvas, Colour

PAPER: Colour = (255, 255, 255)
INK: Colour = (31, 36, 40)
FAINT: Colour = (95, 101, 107)
RULE: Colour = (220, 216, 204)
RAMP: tuple[Colour, ...] = ((241, 239, 232), (243, 185, 79), (201, 72, 29), (92, 18, 32))  # 0, 1, 2 and 3 even shares
HOTTEST = len(RAMP) - 1

MAP_WIDTH = 1536
LEFT, TOP, BARS, MARGIN = 110, 150, 280, 32
SCALE = 480
TITLE, LABEL, TICK = 22, 15, 13


def ramp(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Colours [..., 3] of multiples of an even share."""
    at = np.clip(shares, 0, HOTTEST)
    steps = np.arange(len(RAMP))
    return np.stack([np.interp(at, steps, [colour[channel] for colour in RAMP]) for channel in range(3)], axis=-1).astype(np.float32)


def heat_map(shares_LE: npt.NDArray[np.float64], layers: Sequence[int], title: str, subtitle: str) -> bytes:
    """A PNG of how often experts were used, in multiples of an even share of their layer."""
    num_layers, num_experts = shares_LE.shape
    wide = max(MAP_WIDTH // num_experts, 2)
    high = int(min(max(720 // num_layers, 10), 64, max(wide * 1.2, 14)))
    right, bottom = LEFT + wide * num_experts, TOP + high * num_layers
    canvas = Canvas(right + BARS + MARGIN, bottom + 150, PAPER)
    canvas.text(LEFT, 62, title, INK, TITLE, bold=True)
    canvas.text(LEFT, 102, subtitle, FAINT, LABEL)
    canvas.cells(LEFT, TOP, wide, high, ramp(shares_LE), 1 if min(wide, high) > 4 else 0)
    for row in range(0, num_layers, max(1, -(-22 // high))):
        canvas.text(LEFT - 14, TOP + (row + 0.5) * high + TICK / 2, str(layers[row]), FAINT, TICK, anchor="right")
    for column in range(0, num_experts, _step(46 / wide)):
        canvas.text(LEFT + (column + 0.5) * wide, bottom + 30, str(column), FAINT, TICK, anchor="middle")
    canvas.text(36, (TOP + bottom) / 2, "layer", INK, LABEL, anchor="middle", upright=True)
    canvas.text((LEFT + right) / 2, bottom + 66, "expert", INK, LABEL, anchor="middle")
    _bars(canvas, shares_LE.max(axis=1), right + 36, high)
    _scale(canvas, LEFT, bottom + 100)
    return canvas.png()


def _bars(canvas: Canvas, busiest_L: npt.NDArray[np.float64], left: int, high: int) -> None:
    """The busiest expert of each layer: a bar, and its length in words where there is room."""
    length, most = BARS - 36 - 80, max(float(busiest_L.max()), 1.0)
    canvas.text(left, TOP - 18, "busiest, of an even share", FAINT, TICK)
    for row, value in enumerate(busiest_L):
        top = TOP + row * high
        canvas.fill(left, top + high * 0.2, left + length * value / most, top + high * 0.8, RULE)
        if row % max(1, -(-22 // high)) == 0:
            canvas.text(left + length + 70, top + high / 2 + TICK / 2, f"{value:.2f}×", FAINT, TICK, anchor="right")


def _scale(canvas: Canvas, left: int, top: int) -> None:
    steps = np.linspace(0, HOTTEST, SCALE)
    canvas.cells(left, top, 1, 18, ramp(steps)[None], 0)
    for value, label in ((0, "unused"), (1, "even share"), (2, "2×"), (HOTTEST, f"{HOTTEST}× and more")):
        x = left + SCALE * value / HOTTEST
        canvas.lines([[(x, top + 18), (x, top + 24)]], FAINT, 1.5)
        canvas.text(x, top + 42, label, FAINT, TICK - 2, anchor="middle" if 0 < value < HOTTEST else "left")


def _step(least: float) -> int:
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128, 1 << 30) if step >= least)
