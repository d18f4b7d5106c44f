"""What a device must remember of each lane between steps: its pages, and the token it drew last.

The host plans a step before it has seen the tokens of the one before; where such a token is fed, the device takes it from here. Pages
are sent as they are handed out, so that a step sends what has changed and not the table.

Shape suffixes: L lanes, P pages of a lane, T rows, G pages that were handed out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pointsman.engine.transfer import Upload
from pointsman.step import PENDING

Growth = tuple[int, int, tuple[int, ...]]
"""A lane, where in its table the pages come, and the pages."""


class DeviceLanes:
    """The tables of the lanes on a device: `page_table_LP`, int32, and `last_token_L`, int64."""

    def __init__(self, max_lanes: int, max_pages: int, device: torch.device) -> None:
        self.page_table_LP = torch.zeros(max_lanes, max_pages, dtype=torch.int32, device=device)
        self.last_token_L = torch.zeros(max_lanes, dtype=torch.int64, device=device)
        self._upload = Upload(device)

    def grow(self, growths: Sequence[Growth]) -> None:
        """Append pages to the tables."""
        if not growths:
            return
        max_pages = self.page_table_LP.shape[1]
        places = [np.arange(len(pages)) + (lane * max_pages + first) for lane, first, pages in growths]
        pages = [np.array(pages, np.int32) for _, _, pages in growths]
        places_G, pages_G = self._upload((np.concatenate(places), np.concatenate(pages)))
        self.page_table_LP.view(-1).index_copy_(0, places_G, pages_G)

    def fill_in(self, tokens_T: Tensor, lanes_T: Tensor) -> Tensor:
        """The tokens of a step, PENDING ones as their lanes drew them."""
        return torch.where(tokens_T == PENDING, self.last_token_L[lanes_T], tokens_T)
