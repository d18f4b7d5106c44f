"""Batches and records of the small models, and what a model makes of them."""

from __future__ import annotations

import numpy as np
import torch

from pointsman.rl import record
from pointsman.routed_experts import RoutedExperts
from tests.rl.families import EXPERTS, FAMILIES, layers_of


def batch_of(sequences, side="right"):
    """Token ids and mask of a padded batch."""
    width = max(map(len, sequences)) + 1
    ids, mask = torch.zeros(len(sequences), width, dtype=torch.long), torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        first = 0 if side == "right" else width - len(sequence)
        ids[row, first : first + len(sequence)] = torch.tensor(sequence)
        mask[row, first : first + len(sequence)] = 1
    return ids, mask


def random_record(length, seed, family="MiniMaxM2", **changes):
    """A record of experts that no router would choose, best first or not."""
    random = np.random.default_rng(seed)
    layers = layers_of(family)
    top_k = FAMILIES[family]["num_experts_per_tok"]
    rows = random.random((length, len(layers), EXPERTS)).argsort(axis=-1)[..., :top_k].astype(np.uint8)
    return RoutedExperts(rows_RLK=rows, num_experts=EXPERTS, layers=layers, **changes)


def recorded(model, ids, **batch):
    with torch.no_grad(), record(model, **batch) as recording:
        model(ids)
    return recording.records


@torch.no_grad()
def logits_of(model, ids, **more):
    return model(ids, use_cache=False, **more).logits
