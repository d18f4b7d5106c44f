"""A picture to draw on: rectangles, lines and text with smooth edges, and the PNG of it.

Shape suffixes: H rows, W columns of the picture, C red, green and blue.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from pointsman.plots import font

Colour = tuple[int, int, int]
Point = tuple[float, float]
Anchor = Literal["left", "middle", "right"]

_PNG = b"\x89PNG\r\n\x1a\n"
_WEIGHT = 0.13


class Canvas:
    """A picture of `width` by `height` pixels; x goes right, y down."""

    def __init__(self, width: int, height: int, paper: Colour) -> None:
        self._pixels_HWC = np.empty((height, width, 3), np.float32)
        self._pixels_HWC[:] = paper

    @property
    def size(self) -> tuple[int, int]:
        height, width, _ = self._pixels_HWC.shape
        return width, height

    def fill(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A rectangle, to whole pixels."""
        self._pixels_HWC[max(round(top), 0) : round(bottom), max(round(left), 0) : round(right)] = colour

    def cells(self, left: int, top: int, wide: int, high: int, colours_RCC: npt.NDArray[np.float32], gap: int) -> None:
        """A grid of rectangles of one size, `colours` [rows, columns, 3]."""
        rows, columns, _ = colours_RCC.shape
        grid = self._pixels_HWC[top : top + rows * high, left : left + columns * wide].reshape(rows, high, columns, wide, 3)
        grid[:, : high - gap, :, : wide - gap] = colours_RCC[:, None, :, None]

    def lines(self, strokes: Sequence[Sequence[Point]], colour: Colour, width: float) -> None:
        """Lines through points, and dots, all of them one shape: where they cross nothing is drawn twice."""
        points = [point for stroke in strokes for point in stroke]
        if not points:
            return
        columns, rows = zip(*points, strict=True)
        total_width, total_height = self.size
        left, right = max(int(min(columns) - width - 1), 0), min(int(max(columns) + width + 2), total_width)
        top, bottom = max(int(min(rows) - width - 1), 0), min(int(max(rows) + width + 2), total_height)
        if left >= right or top >= bottom:
            return
        covered_HW = np.zeros((bottom - top, right - left), np.float32)
        for stroke in strokes:
            for start, end in zip(stroke, stroke[1:] or stroke, strict=False):
                _cover(covered_HW, (start[0] - left, start[1] - top), (end[0] - left, end[1] - top), width)
        part_HWC = self._pixels_HWC[top:bottom, left:right]
        part_HWC += covered_HW[..., None] * (np.asarray(colour, np.float32) - part_HWC)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: Colour,
        size: float,
        *,
        anchor: Anchor = "left",
        upright: bool = False,
        bold: bool = False,
    ) -> float:
        """A line of text whose capital letters are `size` pixels high and stand on y; returns its width. `upright` reads from below."""
        drawn, width = font.strokes(text)
        scale = size / font.CAPITAL
        shift = {"left": 0.0, "middle": width / 2, "right": width}[anchor]
        placed = [[((px - shift) * scale, (py - font.CAPITAL) * scale) for px, py in stroke] for stroke in drawn]
        turned = [[(x + (py if upright else px), y + (-px if upright else py)) for px, py in stroke] for stroke in placed]
        self.lines(turned, colour, size * _WEIGHT * (1.5 if bold else 1.0))
        return width * scale

    def png(self) -> bytes:
        """The picture as a PNG of 8 bits a colour."""
        pixels_HWC = np.clip(np.rint(self._pixels_HWC), 0, 255).astype(np.uint8)
        height, width, _ = pixels_HWC.shape
        lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels_HWC.reshape(height, -1)], axis=1)
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + _chunk(b"IEND", b"")


def _cover(covered_HW: npt.NDArray[np.float32], start: Point, end: Point, width: float) -> None:
    """Raise the coverage of the pixels near a segment to the share of them that it covers."""
    left, right = int(max(min(start[0], end[0]) - width - 1, 0)), int(max(start[0], end[0]) + width + 2)
    top, bottom = int(max(min(start[1], end[1]) - width - 1, 0)), int(max(start[1], end[1]) + width + 2)
    part_HW = covered_HW[top:bottom, left:right]
    y_H1, x_1W = np.ogrid[top : top + part_HW.shape[0], left : left + part_HW.shape[1]]
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = dx * dx + dy * dy
    along_HW = np.clip(((x_1W + 0.5 - start[0]) * dx + (y_H1 + 0.5 - start[1]) * dy) / length, 0, 1) if length else np.zeros(part_HW.shape)
    distance_HW = np.hypot(x_1W + 0.5 - start[0] - along_HW * dx, y_H1 + 0.5 - start[1] - along_HW * dy)
    np.maximum(part_HW, np.clip(width / 2 + 0.5 - distance_HW, 0, 1), out=part_HW)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
