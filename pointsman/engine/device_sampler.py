"""Tokens drawn where their logits are, so that the next step need not wait for the host to see them.

A lane's token is drawn here if its parameters and its logits are all that it takes. Where the host has to know more it draws the token
itself from a copy of the logits, and the runner finishes such a step before it launches another. `Greedy.takes` and `Kernels.takes` are the
one place that decides which lanes go where.

Shape suffixes: R rows with logits, V vocabulary, B lanes that draw here, L lanes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.engine.batch import Draw
from pointsman.engine.candidates import sampler_choice
from pointsman.engine.device_lanes import DeviceLanes
from pointsman.engine.transfer import Array, Download, Upload
from pointsman.request import MAX_LOGPROBS, Logprob
from pointsman.sampling.lane import LaneSampling
from pointsman.sampling.sampler import NO_TOKEN, NOT_FINITE, Drawn, greedy


class Answer(NamedTuple):
    """What was drawn: int64 tokens, NO_TOKEN where a row is not finite; float64 log-probabilities and int64 ranks where they are told, and
    as many of the likeliest tokens as each lane asked for with theirs."""

    token_B: Tensor
    logprob_B: Tensor | None = None
    rank_B: Tensor | None = None
    top_BN: Tensor | None = None
    top_logprob_BN: Tensor | None = None


class Way(Protocol):
    """A way to draw on the device."""

    def takes(self, sampling: LaneSampling) -> bool:
        """Whether the lane's next token can be drawn so."""

    def parameters(self, draws: Sequence[Draw]) -> list[Array]:
        """What it needs of the lanes beside their rows, as arrays [B]."""

    def __call__(self, logits_RV: Tensor, row_B: Tensor, parameters: Sequence[Tensor], draws: Sequence[Draw]) -> Answer:
        """Draw; nothing is waited for."""


class Greedy:
    """The likeliest token, in torch: for devices without the kernels."""

    def takes(self, sampling: LaneSampling) -> bool:
        return sampling.alone and sampling.greedy and sampling.sampling.logprobs is None

    def parameters(self, draws: Sequence[Draw]) -> list[Array]:
        return []

    def __call__(self, logits_RV: Tensor, row_B: Tensor, parameters: Sequence[Tensor], draws: Sequence[Draw]) -> Answer:
        token_B, finite_B = greedy(logits_RV[row_B])
        return Answer(torch.where(finite_B, token_B, NO_TOKEN))


class Kernels:
    """`kernels.sampling`: every temperature, top-p and min-p, top-k up to a limit, and all log-probabilities that may be asked for."""

    def __init__(self) -> None:
        self._kernels: Any = importlib.import_module("pointsman.kernels.sampling")
        assert MAX_LOGPROBS <= self._kernels.MOST_TOP_K

    def takes(self, sampling: LaneSampling) -> bool:
        return sampling.alone and (sampling.greedy or sampling.sampling.top_k <= self._kernels.MOST_TOP_K)

    def make_ready(self, device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
        """Compile every kernel now, side by side, rather than when a request first asks for it."""
        zeros, ones = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.float64, device=device)
        rows = self._kernels.RowSampling(zeros, zeros.int(), ones, ones / 2, zeros.double(), zeros, zeros)
        for setting in (importlib.import_module("pointsman.kernels.ahead").rehearsal(), contextlib.nullcontext()):
            with setting:
                logits_RV = torch.zeros(1, vocab_size, dtype=dtype, device=device)
                self._kernels.draw(logits_RV, rows)
                self._kernels.draw(logits_RV, rows, nucleus=False, score=True, top_B=zeros.int() + 1, most_top=1)

    def parameters(self, draws: Sequence[Draw]) -> list[Array]:
        lanes = [draw.sampling for draw in draws]
        return [
            np.array([1 if lane.greedy else max(lane.sampling.top_k, 0) for lane in lanes], np.int32),
            np.array([1.0 if lane.greedy else lane.sampling.temperature for lane in lanes], np.float64),
            np.array([lane.sampling.top_p for lane in lanes], np.float64),
            np.array([lane.sampling.min_p for lane in lanes], np.float64),
            np.array([lane.seed % 2**64 for lane in lanes], np.uint64).view(np.int64),
            np.array([lane.num_output for lane in lanes], np.int64),
            np.array([lane.sampling.logprobs or 0 for lane in lanes], np.int32),
        ]

    def __call__(self, logits_RV: Tensor, row_B: Tensor, parameters: Sequence[Tensor], draws: Sequence[Draw]) -> Answer:
        lanes = [draw.sampling for draw in draws]
        whole = [lane for lane in lanes if not lane.greedy and lane.sampling.top_k <= 0]
        *shape, top_B = parameters
        tokens = self._kernels.draw(
            logits_RV,
            self._kernels.RowSampling(row_B, *shape),
            few=len(whole) < len(lanes),
            whole=bool(whole),
            nucleus=any(lane.sampling.top_p < 1.0 for lane in whole),
            score=any(lane.sampling.logprobs is not None for lane in lanes),
            top_B=top_B,
            most_top=min(max(lane.sampling.logprobs or 0 for lane in lanes), logits_RV.shape[1]),
        )
        return Answer(*tokens)


class Drawing:
    """Tokens that are being drawn, and with them the end of their step. `indices`: which of the step's draws they are, ascending."""

    def __init__(self, indices: list[int], draws: Sequence[Draw], answer: Answer) -> None:
        self.indices = indices
        self._draws = draws
        parts = [answer.token_B[None]]
        if answer.logprob_B is not None and answer.rank_B is not None:
            parts += [answer.logprob_B.view(torch.int64)[None], answer.rank_B[None]]
        if answer.top_BN is not None and answer.top_logprob_BN is not None:
            parts += [answer.top_BN.T, answer.top_logprob_BN.view(torch.int64).T]
        self._download = Download(torch.cat(parts))

    def drawn(self) -> Drawn:
        """The tokens; waits until the step is through, also where it draws none here."""
        token_B, *told = self._download.array()
        tokens: list[int] = token_B.tolist()
        errors = {index: NOT_FINITE for index, token in enumerate(tokens) if token == NO_TOKEN}
        if not told:
            return Drawn(tokens, {}, errors)
        logprobs, ranks, most = told[0].view(np.float64).tolist(), told[1].tolist(), len(told) // 2 - 1
        entries: dict[int, dict[int, Logprob]] = {}
        for index, (token, draw) in enumerate(zip(tokens, self._draws, strict=True)):
            if token != NO_TOKEN and draw.sampling.sampling.logprobs is not None:
                entry = entries[index] = {token: Logprob(logprobs[index], ranks[index])}
                num = min(draw.sampling.sampling.logprobs, most)
                top = [(-float(told[2 + most + at][index : index + 1].view(np.float64)[0]), int(told[2 + at][index])) for at in range(num)]
                for rank, (minus_logprob, likely) in enumerate(sorted(top), 1):
                    entry.setdefault(likely, Logprob(-minus_logprob, rank))
        return Drawn(tokens, entries, errors)


class DeviceSampler:
    """Draws for the lanes whose tables are on a device; ranks past the first take what the first has drawn."""

    def __init__(self, lanes: DeviceLanes, device: torch.device, way: Way, mesh: Mesh) -> None:
        self._lanes, self._way, self._mesh = lanes, way, mesh
        self._upload = Upload(device)

    @torch.inference_mode()
    def draw(self, logits_RV: Tensor, draws: Sequence[Draw]) -> Drawing:
        """Draw the tokens that can be drawn here, and tell their lanes that they have drawn."""
        indices = [index for index, draw in enumerate(draws) if self._way.takes(draw.sampling)]
        here = [draws[index] for index in indices]
        if not here:
            return Drawing([], [], Answer(logits_RV.new_empty(0, dtype=torch.int64)))
        lanes = _int64([draw.lane for draw in here])
        if self._mesh.rank == 0:
            lane_B, row_B, *parameters = self._upload([lanes, _int64([draw.row for draw in here]), *self._way.parameters(here)])
            answer = self._way(logits_RV, row_B, parameters, here)
        else:
            (lane_B,) = self._upload([lanes])
            answer = Answer(torch.empty_like(lane_B))
        self._mesh.broadcast(answer.token_B)
        self._lanes.last_token_L.index_copy_(0, lane_B, answer.token_B.clamp(min=0))  # a lane with an error runs on until the host knows
        for draw in here:
            draw.sampling.count()
        return Drawing(indices, here, answer)


def _int64(numbers: list[int]) -> Array:
    return np.array(numbers, np.int64)


def choose_way(device: torch.device, vocab_size: int, dtype: torch.dtype) -> Way:
    """How tokens are drawn on a device from logits of this dtype."""
    if sampler_choice(device.type).take() == "torch":
        return Greedy()
    way = Kernels()
    way.make_ready(device, vocab_size, dtype)
    return way
