"""Held-out accuracy without generating: the gold text is canonical, so greedy decoding is right if every gold token is the argmax.

That makes one forward pass a lower bound of the greedy accuracy: a completion that differs and still ends right is not counted.
"""

from collections import defaultdict
from itertools import islice

import numpy as np
import torch
from tokenizers import Tokenizer

from training.data import COMPLETION, collate, rows
from training.model import Model
from training.text import TINY, examples

MIXES = {"arithmetic": {"arithmetic": 1.0}, "tools": {"tools": 1.0}, "chat": {"chat": 1.0}}


class Heldout:
    """Held-out problems in their natural mix, packed into rows."""

    def __init__(self, device: str, count: int, seed: int = 7):
        tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        self.rows = []
        for kind, mix in MIXES.items():
            number = count // 8 if kind == "chat" else count
            self.rows += rows(islice(examples("heldout", seed, mix), number), tokenizer)
        self.device = device

    @torch.no_grad()
    def exact(self, model: Model, size: int = 32, limit: int | None = None) -> tuple[dict[str, float], torch.Tensor]:
        """The share of each category whose every token is right, and the routing loads [layers, experts]."""
        right, number = defaultdict(int), defaultdict(int)
        loads = 0
        chosen = self.rows[:: max(1, len(self.rows) // limit)] if limit else self.rows
        for at in range(0, len(chosen), size):
            part = chosen[at : at + size]
            fields = [
                torch.from_numpy(np.stack([getattr(row, name) for row in part]).astype(kind)).to(self.device)
                for name, kind in (("tokens", np.int16), ("positions", np.int16), ("weights", np.uint8), ("starts", np.int16))
            ]
            batch = collate(fields, 0.0)
            hidden, load = model(batch)
            loads = loads + load
            guess = (hidden @ model.head.bfloat16().T).argmax(-1).view(len(part), -1)
            tokens = fields[0].long()
            fine = torch.ones_like(guess, dtype=torch.bool)
            fine[:, :-1] = (guess[:, :-1] == tokens[:, 1:]) | (fields[2][:, :-1] != COMPLETION)
            for row, flags in zip(part, fine.cpu(), strict=True):
                for _, first, end, category in row.spans:
                    number[category] += 1
                    right[category] += bool(flags[first:end].all())
        return summary(right, number), loads


def summary(right: dict[str, int], number: dict[str, int]) -> dict[str, float]:
    """Shares by category and for arithmetic and tools as wholes."""
    shares = {category: round(right[category] / number[category], 4) for category in sorted(number)}
    for name, kinds in (("arithmetic", ("arithmetic", "follow-up")), ("tools", ("tools",))):
        members = [category for category in number if category.startswith(kinds)]
        if members:
            shares[name] = round(sum(right[c] for c in members) / sum(number[c] for c in members), 4)
    return shares
