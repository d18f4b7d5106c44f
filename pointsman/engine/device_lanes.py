"""What a device must remember of each lane between steps: its pages, and the token it drew last.

The host plans a step before it has seen the tokens of the one before; where such a token is fed, the device takes it from here. Pages
are sent as they are handed out, so that a step sends what has changed and not the table.

Shape suffixes: L lanes, P pages of a lane, T rows, G pages that were handed out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pointsman.engine.batch import PENDING, Ints
from pointsman.engine.transfer import Upload


class DeviceLanes:
    """The tables of the lanes on a device: `page_table_LP`, int32, and `last_token_L`, int64."""

    def __init__(self, max_lanes: int, max_pages: int, device: torch.device) -> None:
        self.page_table_LP = torch.zeros(max_lanes, max_pages, dtype=torch.int32, device=device)
        self.last_token_L = torch.zeros(max_lanes, dtype=torch.int64, device=device)
        self._upload = Upload(device)

    def grow(self, places_G: Ints, pages_G: Ints) -> None:
        """Enter pages at these places of the whole table, counted row by row."""
        if len(places_G):
            places, pages = self._upload((places_G, pages_G.astype("int32")))
            self.page_table_LP.view(-1).index_copy_(0, places, pages)

    def fill_in(self, tokens_T: Tensor, lanes_T: Tensor) -> Tensor:
        """The tokens of a step, PENDING ones as their lanes drew them."""
        return torch.where(tokens_T == PENDING, self.last_token_L[lanes_T], tokens_T)
