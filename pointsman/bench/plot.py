"""Line and bar charts as SVG, without a library: a few panels side by side, axes from zero, points with labels, parts of a whole in a row.

Enough to see where a curve bends. Colours are read on white and on black; text takes the colour of its surroundings.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 46
LEGEND_LINE = 18
COLOURS = ("#4878cf", "#d1605e", "#59a14f", "#b07aa1", "#e0912f", "#499894", "#9c755f", "#8c8c8c", "#d4a6c8", "#86bcb6")
STEPS = (1, 2, 2.5, 5, 10)
MOST_TICKS = 6


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: its points in the order they are joined, each with a label or none."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes. `limit` is a horizontal line with a name, such as a budget; `logarithmic` is of the x axis, in powers of two."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    limit: tuple[str, float] | None = None
    logarithmic: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar for each row, made of parts one after the other. `limit` is a vertical line with a name, such as what there is in all."""

    title: str
    x: str
    rows: Sequence[tuple[str, Mapping[str, float]]]
    limit: tuple[str, float] | None = None


def chart(panels: Sequence[Panel | Bars]) -> str:
    """An SVG document of all panels in a row, with one legend. Raises ValueError where a panel has no point."""
    names = list(dict.fromkeys(name for panel in panels for name in _names(panel)))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    width, height = WIDTH * len(panels), HEIGHT + LEGEND_LINE * len(names) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#777">'
    ]
    for index, panel in enumerate(panels):
        parts += [f'<g transform="translate({index * WIDTH} 0)">', *_drawn(panel, colours), "</g>"]
    for index, name in enumerate(names):
        y = HEIGHT + LEGEND_LINE * index + 8
        parts.append(f'<rect x="{LEFT}" y="{y}" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(_text(LEFT + 16, y + 9, name))
    return "\n".join([*parts, "</svg>", ""])


def _drawn(panel: Panel | Bars, colours: dict[str, str]) -> list[str]:
    return _bars(panel, colours) if isinstance(panel, Bars) else _panel(panel, colours)


def _names(panel: Panel | Bars) -> list[str]:
    return [name for _, parts in panel.rows for name in parts] if isinstance(panel, Bars) else [line.name for line in panel.lines]


def ticks(most: float) -> list[float]:
    """Round numbers from zero to beyond `most`, few of them."""
    if most <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / MOST_TICKS))
    step = next(step * power for step in (*STEPS, 20) if most / (step * power) <= MOST_TICKS)
    return [round(step * index, 12) for index in range(math.ceil(most / step - 1e-9) + 1)]


def _panel(panel: Panel, colours: dict[str, str]) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    if not points:
        raise ValueError(f"there is nothing to draw in {panel.title!r}")
    limits = [] if panel.limit is None else [panel.limit[1]]
    y_ticks = ticks(max(*(y for _, y in points), *limits, 0.0))
    x_ticks = sorted({x for x, _ in points}) if panel.logarithmic else ticks(max(x for x, _ in points))

    def across(x: float) -> float:
        low, high = x_ticks[0], x_ticks[-1]
        share = (math.log2(x / low) / (math.log2(high / low) or 1.0)) if panel.logarithmic else x / high
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - y / y_ticks[-1] * (HEIGHT - TOP - BOTTOM)

    parts = [_text(WIDTH / 2, 16, panel.title, anchor="middle", size=13)]
    for y in y_ticks:
        parts.append(f'<path d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}" stroke="#999" stroke-opacity=".3"/>')
        parts.append(_text(LEFT - 6, up(y) + 4, f"{y:,g}", anchor="end"))
    parts += [_text(across(x), HEIGHT - BOTTOM + 16, f"{x:,g}", anchor="middle") for x in x_ticks]
    parts.append(_text(WIDTH / 2, HEIGHT - 10, panel.x, anchor="middle"))
    parts.append(_text(6, TOP - 10, panel.y))
    if panel.limit is not None:
        name, y = panel.limit
        parts.append(f'<path d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}" stroke="#c33" stroke-dasharray="5 4"/>')
        parts.append(_text(WIDTH - RIGHT - 2, up(y) - 4, name, anchor="end"))
    for line in panel.lines:
        parts += _line([(across(x), up(y)) for x, y in line.points], line, colours[line.name])
    return parts


def _bars(panel: Bars, colours: dict[str, str]) -> list[str]:
    if not any(parts for _, parts in panel.rows):
        raise ValueError(f"there is nothing to draw in {panel.title!r}")
    limits = [] if panel.limit is None else [panel.limit[1]]
    x_ticks = ticks(max(*(sum(parts.values()) for _, parts in panel.rows), *limits, 0.0))

    def across(x: float) -> float:
        return LEFT + x / x_ticks[-1] * (WIDTH - LEFT - RIGHT)

    drawn = [_text(WIDTH / 2, 16, panel.title, anchor="middle", size=13), _text(WIDTH / 2, HEIGHT - 10, panel.x, anchor="middle")]
    for x in x_ticks:
        drawn.append(f'<path d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#999" stroke-opacity=".3"/>')
        drawn.append(_text(across(x), HEIGHT - BOTTOM + 16, f"{x:,g}", anchor="middle"))
    room = (HEIGHT - TOP - BOTTOM) / len(panel.rows)
    for index, (name, parts) in enumerate(panel.rows):
        high, first = min(room * 0.8, 40), 0.0
        top = TOP + room * (index + 0.5) - high / 2
        for part, length in parts.items():
            width = across(first + length) - across(first)
            drawn.append(f'<rect x="{across(first):.2f}" y="{top:.1f}" width="{width:.2f}" height="{high:.1f}" fill="{colours[part]}"/>')
            first += length
        drawn.append(_text(LEFT - 6, TOP + room * (index + 0.5) + 4, name, anchor="end"))
    if panel.limit is not None:
        name, x = panel.limit
        drawn.append(f'<path d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#c33" stroke-dasharray="5 4"/>')
        drawn.append(_text(across(x) - 2, TOP - 4, name, anchor="end"))
    return drawn


def _line(places: Sequence[tuple[float, float]], line: Line, colour: str) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    for (x, y), label in zip(places, line.labels, strict=False):
        inside = x + 5 + 5 * len(label) < WIDTH  # with some five units a letter
        parts.append(_text(x + 5 if inside else x - 5, y - 5, label, anchor="start" if inside else "end", size=9))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'
