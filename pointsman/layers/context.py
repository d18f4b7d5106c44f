"""What a step tells the layers: where its rows belong. Passed as an argument; nothing is ambient.

Shape suffixes: T rows (tokens) of the step, L lanes, P pages a lane may have, N model layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pointsman.kernels.reference import Span
from pointsman.layers.paged_kv import PagedKV
from pointsman.moe.capture import RouteStore

__all__ = ["Span", "StepContext"]


@dataclass(frozen=True, eq=False, kw_only=True)
class StepContext:
    """The rows of one step: flat, one sequence's consecutive tokens after another's.

    Attributes:
        positions_T: int64, each row's position in its sequence.
        slots_T: int64, where its keys, values and routing row go: page * page_size + offset.
        attention_plan: what the attention implementation's `plan` made of the row ranges (lane, start, length) that cover all rows; their
            sequences' earlier tokens are in the cache.
        page_table_LP: int64, the pages of each lane in order; entries past a lane's end are not looked at.
        kv: the cache.
        routes: where routing rows are recorded; None records nothing.
        replay_TNK: int32 or int64 expert ids to use instead of the router's choice; a row of -1 in a layer routes freely.
    """

    positions_T: Tensor
    slots_T: Tensor
    attention_plan: Any
    page_table_LP: Tensor
    kv: PagedKV
    routes: RouteStore | None = None
    replay_TNK: Tensor | None = None
