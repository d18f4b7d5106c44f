"""Gradients under a replay, against a mixture of experts written out here; layers that are computed again for them; what is left behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pointsman.rl import record, replay
from pointsman.rl.routers import ROUTERS
from tests.rl.batches import logits_of, random_record, recorded
from tests.rl.families import build, checkpointing, tokens


class WrittenOut(nn.Module):
    """MiniMax-M2's mixture of experts, token by token, with experts that are given."""

    def __init__(self, block, ids):
        super().__init__()
        self.gate, self.experts, self.ids = block.gate, block.experts, ids

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = []
        for token, chosen in zip(flat, self.ids, strict=True):
            scores = torch.sigmoid(self.gate.weight @ token)[chosen]
            parts = []
            for expert in chosen:
                gate, up = (self.experts.gate_up_proj[expert] @ token).chunk(2)
                parts.append(self.experts.down_proj[expert] @ (F.silu(gate) * up))
            out.append((torch.stack(parts) * (scores / scores.sum())[:, None]).sum(0))
        return torch.stack(out).view_as(hidden)


def hooks_of(model):
    return [hook for module in model.modules() if type(module).__name__ in ROUTERS for hook in module._forward_hooks]


def loss_of(model, ids, **more):
    logits = model(ids, use_cache=False, **more).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_the_mixture_written_out():
    model, ids = build(), torch.tensor([tokens(11)])
    twin = copy.deepcopy(model)
    asked = random_record(11, 1)
    with replay(model, [asked], lengths=[11]):
        loss_of(model, ids).backward()
    for layer, block in enumerate(twin.model.layers):
        block.mlp = WrittenOut(block.mlp, torch.from_numpy(asked.rows_RLK[:, layer].astype(np.int64)))
    loss_of(twin, ids).backward()
    theirs = gradients(twin)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4)
    for layer in range(3):
        assert float(model.model.layers[layer].mlp.gate.weight.grad.abs().sum()) > 1e-3


def test_own_gradients_are_kept_where_the_choice_is_the_same():
    model, ids = build(), torch.tensor([tokens(13)])
    loss_of(model, ids).backward()
    free = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    with replay(model, recorded(model, ids, lengths=[13]), lengths=[13]):
        loss_of(model, ids).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, free[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after the block"])
def test_checkpointed_layers_are_computed_again_under_the_same_record(reentrant, inside):
    ids, asked = torch.tensor([tokens(14, 4)]), random_record(14, 8)
    plain = build().train()
    with replay(plain, [asked], lengths=[14]):
        loss_of(plain, ids).backward()
    model = checkpointing(build().train(), use_reentrant=reentrant)
    with replay(model, [asked], lengths=[14]) as forced:
        loss = loss_of(model, ids)
        agreement = forced.agreement
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert forced.agreement == agreement
    theirs = gradients(plain)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, theirs[name]), name
    assert hooks_of(model) == []


def test_two_checkpointed_passes_go_backward_together_each_under_its_own_record():
    batches = [(torch.tensor([tokens(length, 6)]), random_record(length, length)) for length in (9, 13)]
    model, plain = checkpointing(build().train()), build().train()
    losses = []
    for ids, asked in batches:
        with replay(plain, [asked], lengths=[ids.shape[1]]):
            loss_of(plain, ids).backward()
        with replay(model, [asked], lengths=[ids.shape[1]]):
            losses.append(loss_of(model, ids))
    free_ids = torch.tensor([tokens(13, 7)])
    loss_of(plain, free_ids).backward()
    losses.append(loss_of(model, free_ids))
    with replay(model, [random_record(9, 99)], lengths=[9]):
        sum(losses).backward()
    theirs = gradients(plain)
    for name, gradient in gradients(model).items():
        # gradients of three passes, added in another order
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4)


def test_nothing_is_left_behind_even_after_an_error():
    model, ids = checkpointing(build()), torch.tensor([tokens(9)])
    before = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    free = logits_of(model, ids)
    with pytest.raises(ValueError, match=r"routes 9 tokens; the layout has 12 positions"), replay(model, [None], lengths=[12]):
        model(ids)
    with replay(model, [random_record(9, 1)], lengths=[9]), record(model, lengths=[9]):
        model(ids)
    assert torch.equal(logits_of(model, ids), free)
    assert hooks_of(model) == []
    assert [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()] == before
