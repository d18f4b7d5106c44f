"""A font of strokes: each letter is a few lines on a grid, so it can be drawn at any size with smooth edges.

A stroke is written as points "xy", x from the left, y down from the top of a capital letter (0) to the line it stands on (6); tails
reach 8. A stroke of one point is a dot.
"""

from __future__ import annotations

CAPITAL = 6.0
GAP = 1.8

_STROKES = {
    " ": "",
    "0": "10 20 31 35 26 16 05 01 10",
    "1": "02 20 26",
    "2": "01 10 30 41 42 06 46",
    "3": "01 10 30 41 42 33 13,33 44 45 36 16 05",
    "4": "36 30 04 44",
    "5": "40 00 03 12 32 43 45 36 16 05",
    "6": "41 30 10 01 05 16 36 45 44 33 13 04",
    "7": "00 40 16",
    "8": "10 30 41 42 33 13 02 01 10,13 33 44 45 36 16 05 04 13",
    "9": "05 16 36 45 41 30 10 01 02 13 33 42",
    "A": "06 20 46,14 34",
    "B": "00 06 36 45 44 33 03,33 42 41 30 00",
    "C": "41 30 10 01 05 16 36 45",
    "D": "00 06 26 44 42 20 00",
    "E": "40 00 06 46,03 33",
    "F": "40 00 06,03 33",
    "G": "41 30 10 01 05 16 36 45 43 23",
    "H": "00 06,40 46,03 43",
    "I": "00 20,10 16,06 26",
    "J": "30 35 26 16 05",
    "K": "00 06,40 03 46",
    "L": "00 06 46",
    "M": "06 00 23 40 46",
    "N": "06 00 46 40",
    "O": "10 30 41 45 36 16 05 01 10",
    "P": "06 00 30 41 42 33 03",
    "Q": "10 30 41 45 36 16 05 01 10,34 46",
    "R": "06 00 30 41 42 33 03,23 46",
    "S": "41 30 10 01 02 13 33 44 45 36 16 05",
    "T": "00 40,20 26",
    "U": "00 05 16 36 45 40",
    "V": "00 26 40",
    "W": "00 16 22 36 40",
    "X": "00 46,40 06",
    "Y": "00 23 40,23 26",
    "Z": "00 40 06 46",
    "a": "03 12 22 33 36,34 14 05 16 26 35",
    "b": "00 06,03 12 22 33 35 26 16 05",
    "c": "33 22 12 03 05 16 26 35",
    "d": "30 36,33 22 12 03 05 16 26 35",
    "e": "04 34 33 22 12 03 05 16 26 35",
    "f": "30 20 11 16,02 22",
    "g": "32 37 28 18 07,33 22 12 03 05 16 26 35",
    "h": "00 06,03 12 22 33 36",
    "i": "02 06,00",
    "j": "12 17 08,10",
    "k": "00 06,32 04 36",
    "l": "00 06",
    "m": "02 06,03 12 23 26,23 32 43 46",
    "n": "02 06,03 12 22 33 36",
    "o": "12 22 33 35 26 16 05 03 12",
    "p": "02 08,03 12 22 33 35 26 16 05",
    "q": "32 38,33 22 12 03 05 16 26 35",
    "r": "02 06,04 12 22",
    "s": "33 22 12 03 14 24 35 26 16 05",
    "t": "10 15 26,02 22",
    "u": "02 05 16 26 35,32 36",
    "v": "02 26 42",
    "w": "02 16 23 36 42",
    "x": "02 36,32 06",
    "y": "02 16,32 08",
    "z": "02 32 06 36",
    ".": "06",
    ",": "16 07",
    ":": "03,06",
    "-": "04 24",
    "+": "04 44,22 26",
    "=": "03 43,05 45",
    "/": "07 30",
    "%": "06 40,00 10 11 01 00,35 45 46 36 35",
    "(": "20 11 15 26",
    ")": "00 11 15 06",
    "[": "20 00 06 26",
    "]": "00 20 26 06",
    "_": "07 47",
    "|": "00 08",
    "*": "13 31,11 33,02 42",
    "'": "00 01",
    "×": "03 36,33 06",
    "?": "01 10 30 41 42 23 24,26",
}
Stroke = tuple[tuple[float, float], ...]


def _read(text: str) -> tuple[Stroke, ...]:
    return tuple(tuple((float(point[0]), float(point[1])) for point in stroke.split()) for stroke in text.split(",") if stroke)


GLYPHS = {letter: _read(text) for letter, text in _STROKES.items()}


def strokes(text: str) -> tuple[list[Stroke], float]:
    """The strokes of a line of text on the grid, and its width there; what the font lacks is drawn as a question mark."""
    drawn: list[Stroke] = []
    at = 0.0
    for letter in text:
        glyph = GLYPHS.get(letter, GLYPHS["?"])
        drawn += [tuple((at + x, y) for x, y in stroke) for stroke in glyph]
        at += max((x for stroke in glyph for x, _ in stroke), default=1.0) + GAP
    return drawn, max(at - GAP, 0.0)
