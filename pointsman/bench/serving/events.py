"""Server-sent events out of bytes that may be cut anywhere.

As the HTML standard has them: a line ends with LF, CR or CRLF, `data` lines of an event are joined by LF, an empty line ends it, a
line that begins with a colon is a comment. Only the data matters to a client of models; `event`, `id` and `retry` are passed over.
"""

from __future__ import annotations

MAX_EVENT = 1 << 28


class EventReader:
    """Give it bytes as they come; it gives back the data of every event that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._skip_line_feed = False
        self._at_start = True

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that end in this piece. Raises ValueError for one that is larger than MAX_EVENT bytes."""
        if self._skip_line_feed and piece:
            piece = piece.removeprefix(b"\n")
            self._skip_line_feed = False
        if not piece:
            return []
        lines = (self._rest + piece).splitlines(keepends=True)
        self._rest = b""
        if not lines[-1].endswith((b"\n", b"\r")):
            self._rest = lines.pop()
            if len(self._rest) > MAX_EVENT:
                raise ValueError(f"an event has more than {MAX_EVENT} bytes")
        elif lines[-1].endswith(b"\r"):
            self._skip_line_feed = True  # the other half of a CRLF may come next
        ended = []
        for line in lines:
            content = line.rstrip(b"\r\n")
            if self._at_start:
                content = content.removeprefix(b"\xef\xbb\xbf")
                self._at_start = False
            if content:
                self._take(content)
            elif self._data:
                ended.append(b"\n".join(self._data))
                self._data.clear()
        return ended

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
