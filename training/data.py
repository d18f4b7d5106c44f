"""Packs examples into rows of fixed length, in worker processes, and keeps a ring of rows on the training device."""

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer

from training.model import Batch
from training.text import MIX, TINY, Example, examples

ROW = 1024
MOST_DOCUMENTS = 24
CHUNK = 256
PROMPT, COMPLETION = 1, 2


class Row:
    """One row being filled: documents one after the other, never across rows."""

    def __init__(self):
        self.tokens, self.positions = np.zeros(ROW, np.uint16), np.zeros(ROW, np.uint16)
        self.weights = np.zeros(ROW, np.uint8)
        self.starts = np.full(MOST_DOCUMENTS, ROW, np.int16)
        self.used = self.documents = 0
        self.spans: list[tuple[int, int, int, str]] = []

    def fits(self, length: int) -> bool:
        return self.used + length <= ROW and self.documents < MOST_DOCUMENTS - 1

    def add(self, prompt: list[int], completion: list[int], category: str = "") -> None:
        begin, length = self.used, len(prompt) + len(completion)
        self.tokens[begin : begin + length] = prompt + completion
        self.positions[begin : begin + length] = np.arange(length)
        self.weights[begin : begin + len(prompt) - 1] = PROMPT
        self.weights[begin + len(prompt) - 1 : begin + length - 1] = COMPLETION
        self.starts[self.documents] = begin
        self.spans.append((begin, begin + len(prompt) - 1, begin + length - 1, category))
        self.used += length
        self.documents += 1

    def close(self) -> "Row":
        """The padding is a document of its own, so that it disturbs none."""
        if self.used < ROW:
            self.starts[self.documents] = self.used
            self.positions[self.used :] = np.arange(ROW - self.used)
        return self


def encode(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    return tokenizer.encode(example.prompt, add_special_tokens=False).ids, tokenizer.encode(
        example.completion, add_special_tokens=False
    ).ids


def rows(stream: Iterator[Example], tokenizer: Tokenizer) -> Iterator[Row]:
    """Packs a stream: each example goes into the fullest of a few open rows that holds it."""
    open_rows = [Row() for _ in range(8)]
    for example in stream:
        prompt, completion = encode(tokenizer, example)
        length = len(prompt) + len(completion)
        if length > ROW:
            continue
        fitting = [row for row in open_rows if row.fits(length)]
        if fitting:
            max(fitting, key=lambda row: row.used).add(prompt, completion, example.category)
            continue
        fullest = max(open_rows, key=lambda row: row.used)
        open_rows.remove(fullest)
        yield fullest.close()
        open_rows.append(Row())
        open_rows[-1].add(prompt, completion, example.category)
    yield from (row.close() for row in open_rows if row.used)


def work(out, seed: int, mix: dict[str, float]) -> None:
    """A worker: chunks of rows for ever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    packed = rows(examples("train", seed, mix), Tokenizer.from_file(str(TINY / "tokenizer.json")))
    while True:
        chunk = [next(packed) for _ in range(CHUNK)]
        out.put(tuple(np.stack([getattr(row, name) for row in chunk]) for name in ("tokens", "positions", "weights", "starts")))


class Feed:
    """Rows from the workers in a ring on the device; a batch is fresh rows where there are enough, else rows seen before."""

    def __init__(self, workers: int, seed: int, device: str, mix: dict[str, float] = MIX, capacity: int = 65_536):
        context = multiprocessing.get_context("fork")
        self.chunks = context.Queue(maxsize=4 * workers)
        self.processes = [
            context.Process(target=work, args=(self.chunks, seed + 1000 * (index + 1), mix), daemon=True) for index in range(workers)
        ]
        for process in self.processes:
            process.start()
        self.device, self.capacity = device, capacity
        self.ring: list[torch.Tensor] = []
        self.written = self.read = self.repeated = 0
        threading.Thread(target=self.drain, daemon=True).start()

    def drain(self) -> None:
        """Copies chunks on a stream of their own, so that they do not wait for the training step."""
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        while True:
            if self.written - self.read > self.capacity // 2:
                threading.Event().wait(0.01)
                continue
            try:
                chunk = self.chunks.get(timeout=1)
            except queue.Empty:
                continue
            arrays = [
                torch.from_numpy(array.astype(kind)) for array, kind in zip(chunk, (np.int16, np.int16, np.uint8, np.int16), strict=True)
            ]
            if not self.ring:
                self.ring = [torch.zeros(self.capacity, array.shape[1], dtype=array.dtype, device=self.device) for array in arrays]
                if stream is not None:
                    torch.cuda.synchronize()
            at = self.written % self.capacity
            with torch.cuda.stream(stream):
                for ring, array in zip(self.ring, arrays, strict=True):
                    ring[at : at + CHUNK].copy_(array.pin_memory() if stream is not None else array, non_blocking=True)
            if stream is not None:
                stream.synchronize()
            self.written += CHUNK

    def batch(self, size: int, prompt_weight: float) -> Batch:
        """A batch of `size` rows."""
        while self.written < size:
            threading.Event().wait(0.01)
        if self.written - self.read >= size:
            index = torch.arange(self.read, self.read + size, device=self.device) % self.capacity
            self.read += size
        else:
            index = torch.randint(0, min(self.written, self.capacity), (size,), device=self.device)
            self.repeated += size
        return collate([ring[index] for ring in self.ring], prompt_weight)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


def collate(fields: list[torch.Tensor], prompt_weight: float) -> Batch:
    """Flat tensors of some rows."""
    tokens, positions, weights, starts = fields
    size = tokens.shape[0]
    offsets = torch.arange(size, device=tokens.device, dtype=torch.int32)[:, None] * ROW
    cu_seqlens = torch.cat(((starts.int() + offsets).flatten(), torch.full((1,), size * ROW, device=tokens.device, dtype=torch.int32)))
    loss_weights = torch.where(weights == COMPLETION, 1.0, torch.where(weights == PROMPT, prompt_weight, 0.0))
    return Batch(tokens.long().flatten(), positions.int().flatten(), cu_seqlens, loss_weights.flatten(), ROW)
