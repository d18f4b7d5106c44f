"""Pictures, read back by a decoder of PNG that is written out here."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from pointsman.plots import font, heat
from pointsman.plots.canvas import Canvas
from pointsman.plots.curves import COLOURS, Panel, curves

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def decode(data):
    """The pixels [H, W, 3] of a PNG without filters, its chunks checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed, kinds = 8, b"", []
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        if kind == b"IHDR":
            width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", body)
            assert (depth, colour, rest) == (8, 2, [0, 0, 0])
        if kind == b"IDAT":
            packed += body
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 3 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_rectangles_are_where_they_are_said_to_be():
    canvas = Canvas(30, 20, WHITE)
    canvas.fill(3, 4, 10, 8, (1, 2, 3))
    expected = np.full((20, 30, 3), 255, np.uint8)
    expected[4:8, 3:10] = (1, 2, 3)
    assert np.array_equal(decode(canvas.png()), expected)


def test_a_grid_has_its_colours_and_its_gaps():
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 3))
    canvas = Canvas(40, 30, WHITE)
    canvas.cells(5, 6, 7, 5, colours.astype(np.float32), 1)
    pixels = decode(canvas.png())
    for row in range(3):
        for column in range(4):
            cell = pixels[6 + 5 * row : 11 + 5 * row, 5 + 7 * column : 12 + 7 * column]
            assert (cell[:4, :6] == colours[row, column]).all()
            assert (cell[4:] == 255).all()
            assert (cell[:, 6:] == 255).all()


def test_a_line_covers_what_lies_near_it():
    canvas = Canvas(60, 40, WHITE)
    start, end, width = np.array([8.5, 6.0]), np.array([50.0, 31.0]), 3.0
    canvas.lines([[tuple(start), tuple(end)]], BLACK, width)
    pixels = decode(canvas.png())
    for y in range(40):
        for x in range(60):
            point = np.array([x + 0.5, y + 0.5])
            along = np.clip((point - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
            share = np.clip(width / 2 + 0.5 - np.linalg.norm(point - start - along * (end - start)), 0, 1)
            assert np.abs(pixels[y, x] - 255 * (1 - share)).max() <= 1


def test_what_lies_outside_is_not_drawn():
    canvas = Canvas(10, 10, WHITE)
    canvas.lines([[(-50, -50), (-20, -30)], [(90, 3)]], BLACK, 2)
    canvas.text(-500, 5, "far", BLACK, 6)
    canvas.fill(-5, -5, 2, 2, BLACK)
    pixels = decode(canvas.png())
    assert (pixels[:2, :2] == 0).all()
    assert (pixels.sum(axis=-1) < 765).sum() == 4


@pytest.mark.parametrize("anchor", ["left", "middle", "right"])
def test_text_stands_where_it_is_said_to(anchor):
    canvas = Canvas(400, 60, WHITE)
    width = canvas.text(200, 40, "Hill", BLACK, 18, anchor=anchor)
    rows, columns = np.nonzero((decode(canvas.png()) < 128).any(axis=-1))
    left = {"left": 200, "middle": 200 - width / 2, "right": 200 - width}[anchor]
    assert abs(columns.min() - left) <= 2
    assert abs(columns.max() - (left + width)) <= 2
    assert abs(rows.max() - 40) <= 2
    assert abs(rows.min() - 22) <= 2


def test_every_letter_is_another_one():
    drawn = {}
    for letter in font.GLYPHS:
        canvas = Canvas(40, 50, WHITE)
        canvas.text(8, 34, letter, BLACK, 24)
        drawn[decode(canvas.png()).tobytes()] = letter
    assert set(drawn.values()) == set(font.GLYPHS)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    assert set(letters) <= set(font.GLYPHS)
    assert font.strokes("é") == font.strokes("?")


def test_the_map_has_the_colours_of_its_values():
    shares = np.array([[0.0, 1.0, 2.0, 3.0], [5.0, 0.5, 1.5, 0.25], [1, 1, 1, 1]])
    pixels = decode(heat.heat_map(shares, (0, 1, 7), "title", "subtitle"))
    wide = heat.MAP_WIDTH // 4
    high = next(size for size in range(8, 100) if (pixels[heat.TOP + size - 1, heat.LEFT + 5] == 255).all())
    for row in range(3):
        for column in range(4):
            value = min(shares[row, column], 3)
            low = min(int(value), 2)
            colour = [a + (b - a) * (value - low) for a, b in zip(heat.RAMP[low], heat.RAMP[low + 1], strict=True)]
            found = pixels[heat.TOP + high * row + 3, heat.LEFT + wide * column + 3]
            assert np.abs(found - np.array(colour)).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (200, 2), (62, 256)])
def test_maps_of_any_size_are_drawn(shape):
    pixels = decode(heat.heat_map(np.ones(shape), range(shape[0]), "t", "s"))
    assert pixels.shape[0] < 2400
    assert pixels.shape[1] < 2400


def test_curves_go_through_their_values():
    panel = Panel(title="reward", lines={"a": [0.0, 1.0, None, 0.5, float("nan")], "b": [1.0]}, low=0, high=1)
    pixels = decode(curves("title", [panel, Panel(title="kl", lines={"c": [1e-3, 0.0, 1e-1]}, logarithmic=True)]))
    found = (np.abs(pixels.astype(int) - COLOURS[0]).max(axis=-1) <= 1).nonzero()
    assert len(found[0]) > 100
    with pytest.raises(ValueError, match="no values"):
        curves("title", [Panel(title="reward", lines={"a": []})])


def test_equal_values_have_a_scale():
    decode(curves("title", [Panel(title="flat", lines={"a": [2.0, 2.0]}), Panel(title="none", lines={"a": [None]}, logarithmic=True)]))
