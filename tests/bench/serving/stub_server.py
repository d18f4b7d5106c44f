"""A server that answers as it is told: for each path a list of answers, each a list of (seconds to wait, bytes to send)."""

import asyncio
import contextlib
import json
import threading
from dataclasses import dataclass, field


def json_answer(content, status="200 OK"):
    body = json.dumps(content).encode()
    return [(0, b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)) + body)]


def stream_answer(events, wait=0.0, end=b"0\r\n\r\n"):
    """An event stream in chunks; every event is JSON, or bytes as they are."""
    pieces = [(0, b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")]
    for event in events:
        data = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
        pieces.append((wait, b"%x\r\n%s\r\n" % (len(data), data)))
    return [*pieces, (0, end)]


def text_stream(texts, usage=None, wait=0.0):
    """Completions: a chunk for each text, the usage, the end."""
    events = [{"choices": [{"text": text, "finish_reason": None}]} for text in texts]
    events.append({"choices": [{"text": "", "finish_reason": "length"}]})
    if usage is not None:
        events.append({"choices": [], "usage": usage})
    return stream_answer([*events, b"data: [DONE]\n\n"], wait)


@dataclass
class StubServer:
    """`answers` by path: a list of answers, or a function from the request's JSON to one. Each request is kept in `asked`."""

    answers: dict
    asked: list = field(default_factory=list)
    port: int = 0
    running: int = 0
    most: int = 0

    async def _serve(self, reader, writer):
        try:
            while True:
                await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ", 2)[1]
        length = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")), 0)
        body = json.loads(await reader.readexactly(length)) if length else None
        self.asked.append((path, body, head))
        answer = self.answers.get(path, json_answer({"error": {"message": f"no {path}"}}, "404 Not Found"))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for wait, data in answer(body) if callable(answer) else answer:
                if wait:
                    await asyncio.sleep(wait)
                if data is None:
                    raise ConnectionAbortedError("told to hang up")
                writer.write(data)
                await writer.drain()
        finally:
            self.running -= 1

    async def run(self, ready, stop):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        async with server:
            await asyncio.to_thread(stop.wait)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the next turn of the loop


@contextlib.contextmanager
def running(answers):
    """A StubServer in a thread of its own."""
    stub = StubServer(answers)
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(stub.run(ready, stop)))
    thread.start()
    ready.wait()
    try:
        yield stub
    finally:
        stop.set()
        thread.join()
