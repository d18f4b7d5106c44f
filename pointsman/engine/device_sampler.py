"""Tokens drawn where their logits are, so that the next step need not wait for the host to see them.

A lane's token is drawn here if its parameters and its logits are all that it takes. Where the host has to know more
(`LaneSampling.needs_host`: edited logits, a grammar, log-probabilities to tell) it draws the token itself from a copy of the logits,
and the runner finishes such a step before it launches another. This is the one place that decides.

Shape suffixes: R rows with logits, V vocabulary, B lanes that draw here, L lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pointsman.engine.device_lanes import DeviceLanes
from pointsman.engine.transfer import Download, Upload
from pointsman.sampling.lane import LaneSampling
from pointsman.sampling.sampler import NO_TOKEN, NOT_FINITE, Drawn, greedy


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to be drawn: for which lane, from which row of the logits."""

    lane: int
    row: int
    sampling: LaneSampling


class Drawing:
    """Tokens that are being drawn, and with them the end of their step. `indices`: which of the step's draws they are, ascending."""

    def __init__(self, indices: list[int], tokens_and_finite: Tensor) -> None:
        self.indices = indices
        self._download = Download(tokens_and_finite)

    def drawn(self) -> Drawn:
        """The tokens; waits until the step is through, also where it draws none here."""
        tokens, finite = self._download.array().tolist()
        errors = {index: NOT_FINITE for index, flag in enumerate(finite) if not flag}
        return Drawn([NO_TOKEN if index in errors else token for index, token in enumerate(tokens)], None, errors)


class DeviceSampler:
    """Draws for the lanes whose tables are on a device."""

    def __init__(self, lanes: DeviceLanes, device: torch.device) -> None:
        self._lanes = lanes
        self._upload = Upload(device)

    @torch.inference_mode()
    def draw(self, logits_RV: Tensor, draws: Sequence[Draw]) -> Drawing:
        """Draw the tokens that can be drawn here, and tell their lanes that they have drawn."""
        indices = [index for index, draw in enumerate(draws) if not draw.sampling.needs_host]
        here = [draws[index] for index in indices]
        if not here:
            return Drawing([], logits_RV.new_empty((2, 0), dtype=torch.int64))
        rows_B, lanes_B = self._upload((_int64([draw.row for draw in here]), _int64([draw.lane for draw in here])))
        tokens_B, finite_B = greedy(logits_RV[rows_B])
        self._lanes.last_token_L.index_copy_(0, lanes_B, tokens_B)
        for draw in here:
            draw.sampling.count()
        return Drawing(indices, torch.stack((tokens_B, finite_B.long())))


def _int64(numbers: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(numbers, np.int64)
