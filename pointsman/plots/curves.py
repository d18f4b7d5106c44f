"""Curves over steps: one panel under another, each with lines of its own, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pointsman.plots.canvas import Canvas, Colour
from pointsman.plots.heat import FAINT, INK, PAPER, RULE

COLOURS: tuple[Colour, ...] = ((11, 107, 98), (201, 72, 29), (92, 18, 32), (243, 185, 79), (72, 120, 207), (140, 140, 140))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 1280, 340, 150, 60, 110, 120
TITLE, LABEL, TICK = 22, 15, 13


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines in one frame.

    Attributes:
        title: what is drawn.
        lines: name to values, one a step; None and what is not finite is left out, and so is what a logarithm does not have.
        logarithmic: the scale goes by powers of ten.
        low, high: ends of the scale; None is where the values end.
    """

    title: str
    lines: dict[str, Sequence[float | None]]
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None


def curves(title: str, panels: Sequence[Panel], steps: str = "step", names: Sequence[str] | None = None) -> bytes:
    """A PNG of panels over the same steps, which have numbers or the names given. Raises ValueError where there is nothing to draw."""
    if (most := max((len(panel.lines) for panel in panels), default=0)) > len(COLOURS):
        raise ValueError(f"{most} lines in one panel; there are {len(COLOURS)} colours")
    count = max((len(values) for panel in panels for values in panel.lines.values()), default=0)
    if not count:
        raise ValueError("there are no values to draw")
    canvas = Canvas(WIDTH, TOP + len(panels) * (HEIGHT + GAP), PAPER)
    canvas.text(LEFT, 58, title, INK, TITLE, bold=True)
    for index, panel in enumerate(panels):
        top = TOP + index * (HEIGHT + GAP) + 30
        _panel(canvas, panel, top, names or [str(step) for step in range(count)], steps if index == len(panels) - 1 else "")
    return canvas.png()


@dataclass(frozen=True)
class _Frame:
    """Where a panel's values lie in the picture."""

    top: int
    low: float
    high: float
    count: int

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * step / max(self.count - 1, 1)

    def y(self, value: float) -> float:
        return self.top + HEIGHT * (1 - (value - self.low) / (self.high - self.low))


def _panel(canvas: Canvas, panel: Panel, top: int, names: Sequence[str], steps: str) -> None:
    bottom, right = top + HEIGHT, WIDTH - RIGHT
    drawn = {name: [_place(value, panel) for value in values] for name, values in panel.lines.items()}
    low, high = _range([value for values in drawn.values() for value in values if value is not None], panel)
    frame = _Frame(top, low, high, len(names))
    for value, label in _ticks(low, high, panel.logarithmic):
        canvas.lines([[(LEFT, frame.y(value)), (right, frame.y(value))]], RULE, 1.5)
        canvas.text(LEFT - 14, frame.y(value) + TICK / 2, label, FAINT, TICK, anchor="right")
    for step in range(0, len(names), max(1, math.ceil(len(names) / 16))):
        canvas.text(frame.x(step), bottom + 30, names[step], FAINT, TICK, anchor="middle")
    canvas.text((LEFT + right) / 2, bottom + 62, steps, INK, LABEL, anchor="middle")
    at = LEFT + canvas.text(LEFT, top - 18, panel.title, INK, LABEL, bold=True) + 36
    for (name, values), colour in zip(drawn.items(), COLOURS, strict=False):
        canvas.fill(at, top - 27, at + 30, top - 22, colour)
        at += 42 + canvas.text(at + 42, top - 18, name, FAINT, TICK) + 30
        canvas.lines(_strokes(values, frame), colour, 3.5)


def _strokes(values: Sequence[float | None], frame: _Frame) -> list[list[tuple[float, float]]]:
    """Lines through what is there; a gap ends one."""
    strokes: list[list[tuple[float, float]]] = [[]]
    for step, value in enumerate(values):
        if value is None:
            strokes.append([])
        else:
            strokes[-1].append((frame.x(step), frame.y(value)))
    return [stroke for stroke in strokes if stroke]


def _place(value: float | None, panel: Panel) -> float | None:
    if value is None or not math.isfinite(value) or (panel.logarithmic and value <= 0):
        return None
    return math.log10(value) if panel.logarithmic else float(value)


def _range(found: list[float], panel: Panel) -> tuple[float, float]:
    first, last = _place(panel.low, panel), _place(panel.high, panel)
    low = min(found, default=0.0) if first is None else first
    high = max(found, default=1.0) if last is None else last
    if panel.logarithmic:
        low, high = float(math.floor(low)), float(math.ceil(high))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    if logarithmic:
        step = max(1, math.ceil((high - low) / 6))
        return [(power, f"1e{power}") for power in range(math.ceil(low), math.floor(high) + 1, step)]
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    first = math.ceil(low / step - 1e-9)
    return [(index * step, f"{index * step:g}") for index in range(first, math.floor(high / step + 1e-9) + 1)]
