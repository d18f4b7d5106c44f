"""Replay and recording in Hugging Face's models, against the models themselves and against a mixture of experts written out here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pointsman.rl import record, replay
from pointsman.rl.routers import ROUTERS
from pointsman.routed_experts import RoutedExperts, encode
from tests.rl.batches import batch_of, logits_of, random_record, recorded
from tests.rl.families import EXPERTS, FAMILIES, build, layers_of, model_of, tokens

LENGTHS = (7, 12, 4, 9)

families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_every_family_is_tested(family):
    assert {name for name in ROUTERS if name.lower().startswith(family.lower() + "topk")}
    assert len(FAMILIES) == len(ROUTERS)


@families
def test_a_model_under_its_own_record_is_itself(family):
    model, ids = model_of(family), torch.tensor([tokens(20)])
    free = logits_of(model, ids)
    [own] = recorded(model, ids, lengths=[20])
    assert own.layers == layers_of(family)
    with replay(model, [own], lengths=[20]) as forced:
        assert torch.equal(logits_of(model, ids), free)
    assert forced.agreement == 1.0
    assert forced.num_forced == 20
    assert forced.num_free == 0


@families
def test_a_record_is_what_the_router_chose_best_first(family):
    model, ids = model_of(family), torch.tensor([tokens(20)])
    seen = []

    def note(module, args, output):
        bias = args[1] if len(args) > 1 else getattr(module, "e_score_correction_bias", 0)
        scores = output[0].softmax(-1) if family in ("Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe") else output[0].sigmoid()
        seen.append((output[2], scores + bias))

    hooks = [module.register_forward_hook(note) for module in model.modules() if type(module).__name__ in ROUTERS]
    try:
        [own] = recorded(model, ids, lengths=[20])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(own.layers)
    for layer, (chosen, scores) in enumerate(seen):
        for token in range(20):
            order = sorted(chosen[token].tolist(), key=lambda expert: -float(scores[token, expert]))
            assert own.rows_RLK[token, layer].tolist() == order


@families
def test_experts_that_no_router_would_choose_are_used_and_weights_stay_live(family):
    """Against the mixture written out: in Hugging Face's blocks the router is replaced by one that knows nothing but this."""
    model, ids = build(family), torch.tensor([tokens(15)])
    asked = random_record(15, 3, family)
    with replay(model, [asked], lengths=[15]) as forced:
        got = logits_of(model, ids)
        [used] = recorded(model, ids, lengths=[15])
    assert np.array_equal(np.sort(used.rows_RLK), np.sort(asked.rows_RLK))
    assert forced.agreement < 0.5
    for index, layer in enumerate(layers_of(family)):
        gate = model.model.layers[layer].mlp.gate
        gate.forward = written_out(gate, torch.from_numpy(asked.rows_RLK[:, index].astype(np.int64)), family)
    # the same float32 numbers, summed in another order
    torch.testing.assert_close(got, logits_of(model, ids), atol=2e-5, rtol=2e-5)


def written_out(gate, ids, family):
    """A router that is told its choice; its formulas are those of the models' papers."""

    def forward(hidden, *_bias):
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), gate.weight.float())
        if family in ("MiniMaxM2", "DeepseekV3", "Glm4Moe"):
            scores = 1 / (1 + torch.exp(-logits))
        else:
            scores = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        weights = scores.gather(1, ids)
        if family not in ("Olmoe", "Qwen2Moe"):  # their norm_topk_prob is false unless told
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights * FAMILIES[family].get("routed_scaling_factor", 1.0), ids

    return forward


@pytest.mark.parametrize("family", ["MiniMaxM2", "Qwen3Moe", "DeepseekV3"])
def test_packed_padded_and_one_by_one_are_the_same(family):
    model = model_of(family)
    sequences = [tokens(length, 1) for length in LENGTHS]
    records = [random_record(length - 1, length, family) for length in LENGTHS]
    alone = []
    for sequence, each in zip(sequences, records, strict=True):
        with replay(model, [each], lengths=[len(sequence)]) as forced:
            alone.append(logits_of(model, torch.tensor([sequence]))[0])
        assert (forced.num_forced, forced.num_free) == (len(sequence) - 1, 1)
    for side in ("left", "right"):
        ids, mask = batch_of(sequences, side)
        for batch in ({"attention_mask": mask}, {"lengths": LENGTHS, "padding_side": side, "width": ids.shape[1]}):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            with replay(model, records, **batch) as forced:
                got = logits_of(model, ids, attention_mask=mask, position_ids=positions)
            assert forced.num_forced == sum(LENGTHS) - 4
            for row, expected in enumerate(alone):
                # float32, other shapes of the same products
                torch.testing.assert_close(got[row][mask[row].bool()], expected, atol=2e-5, rtol=2e-5)
    flat, counts = (
        torch.tensor([[token for sequence in sequences for token in sequence]]),
        torch.cat([torch.arange(length) for length in LENGTHS])[None],
    )
    sums = torch.tensor([0, *LENGTHS]).cumsum(0)
    for batch in ({"cu_seqlens": sums}, {"position_ids": counts}, {"cu_seqlens": sums.tolist()}):
        with replay(model, records, **batch):
            got = logits_of(model, flat, position_ids=counts)
        torch.testing.assert_close(got[0], torch.cat(alone), atol=2e-5, rtol=2e-5)


def test_recordings_of_any_layout_are_the_same():
    model = model_of()
    sequences = [tokens(length, 2) for length in LENGTHS]
    alone = [recorded(model, torch.tensor([sequence]), lengths=[len(sequence)])[0] for sequence in sequences]
    ids, mask = batch_of(sequences, "left")
    with torch.no_grad(), record(model, attention_mask=mask) as recording:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for got, expected in zip(recording.records, alone, strict=True):
        assert np.array_equal(got.rows_RLK, expected.rows_RLK)


def test_rows_that_are_not_known_route_freely():
    model, ids = model_of(), torch.tensor([tokens(12, 3)])
    asked = random_record(6, 5, start=3, missing=((1, 3), (5, 6)))
    with replay(model, [asked], lengths=[12]) as forced:
        with torch.no_grad(), record(model, lengths=[12]) as recording:
            model(ids)
        assert (forced.num_forced, forced.num_free) == (3, 9)
    [used] = recording.records
    known = [3, 6, 7]
    assert np.array_equal(np.sort(used.rows_RLK[known]), np.sort(asked.rows_RLK[asked.known_R]))
    # the first layer of a token depends on the tokens before through attention alone, which no experts have touched there
    [free] = recorded(model, ids, lengths=[12])
    others = [position for position in range(12) if position not in known]
    assert np.array_equal(used.rows_RLK[others, 0], free.rows_RLK[others, 0])


def test_a_sequence_without_a_record_routes_freely():
    model, (ids, mask) = model_of(), batch_of([tokens(8), tokens(8, 5)])
    with replay(model, [random_record(8, 0), None], attention_mask=mask) as forced:
        got = logits_of(model, ids, attention_mask=mask)
    assert (forced.num_forced, forced.num_free) == (8, 8)
    # float32 products of other shapes: the experts get other tokens of the first sequence beside these
    torch.testing.assert_close(got[1], logits_of(model, ids, attention_mask=mask)[1], atol=2e-5, rtol=2e-5)


def test_a_replay_within_another_is_the_one_that_counts():
    model, ids = model_of(), torch.tensor([tokens(9)])
    outer, inner = random_record(9, 1), random_record(9, 2)
    with replay(model, [outer], lengths=[9]):
        expected = logits_of(model, ids)
        with replay(model, [inner], lengths=[9]):
            [used] = recorded(model, ids, lengths=[9])
        assert torch.equal(logits_of(model, ids), expected)
    assert np.array_equal(np.sort(used.rows_RLK), np.sort(inner.rows_RLK))


def test_a_wrapped_model_and_every_form_of_a_record():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, ids):
            return self.module(ids)

    model, ids, asked = Wrapper(model_of()), torch.tensor([tokens(9)]), random_record(9, 4)
    outcomes = []
    for form in (asked, json.loads(json.dumps(encode(asked))), asked.rows_RLK):
        with replay(model, [form], lengths=[9]), torch.no_grad():
            outcomes.append(model(ids).logits)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_agreement_counts_sets_by_layer():
    model, ids = model_of(), torch.tensor([tokens(10)])
    [own] = recorded(model, ids, lengths=[10])
    rows = own.rows_RLK[..., ::-1].copy()  # in another order: the same choice
    rows[:4, 0] = (own.rows_RLK[:4, 0] + 1) % EXPERTS
    changed = [set(a) != set(b) for a, b in zip(rows[:4, 0].tolist(), own.rows_RLK[:4, 0].tolist(), strict=True)]
    with replay(model, [rows], lengths=[10]) as forced:
        logits_of(model, ids)
    assert forced.layer_agreement[0] == 1 - sum(changed) / 10


def changed(**changes):
    good = random_record(9, 0)
    return RoutedExperts(**({name: getattr(good, name) for name in ("rows_RLK", "num_experts", "layers")} | changes))


def strange_router():
    model = build()
    model.model.layers[1].mlp.gate = nn.Linear(4, 4)
    return model


REFUSED = {
    "longer than its sequence": (lambda: replay(model_of(), [random_record(10, 0)], lengths=[9]), "record 0 has rows up to position 10"),
    "starts too late": (lambda: replay(model_of(), [random_record(9, 0, start=1)], lengths=[9]), "position 10; its sequence has 9"),
    "not as many": (lambda: replay(model_of(), [None], lengths=[3, 4]), "1 records for 2 sequences"),
    "other layers": (lambda: replay(model_of(), [changed(layers=(1, 2, 3))], lengths=[9]), r"layers \[1, 2, 3\]; the model has .*0, 1, 2"),
    "other experts": (lambda: replay(model_of(), [changed(num_experts=16)], lengths=[9]), "3 of 16 experts; the model 3 of 8"),
    "other top-k": (
        lambda: replay(model_of(), [changed(rows_RLK=random_record(9, 0).rows_RLK[..., :2])], lengths=[9]),
        "2 of 8 experts; the model 3 of 8",
    ),
    "an expert twice": (lambda: replay(model_of(), [changed(rows_RLK=np.zeros((2, 3, 3), np.uint8))], lengths=[9]), "record 0: .*twice"),
    "no expert": (lambda: replay(model_of(), [np.full((2, 3, 3), 9, np.uint8)], lengths=[9]), "record 0: data has the expert 9"),
    "damaged": (lambda: replay(model_of(), [encode(random_record(9, 0)) | {"crc32": 1}], lengths=[9]), "record 0: crc32"),
    "text": (lambda: replay(model_of(), ["record"], lengths=[9]), "record 0: the record is 'record'"),
    "no layout": (lambda: replay(model_of(), [None]), "nothing given"),
    "two layouts": (lambda: replay(model_of(), [None], lengths=[3], cu_seqlens=[0, 3]), "lengths and cu_seqlens given"),
    "a width for a mask": (lambda: record(model_of(), attention_mask=[[1]], width=3), "width given with attention_mask"),
    "a hole in the mask": (lambda: record(model_of(), attention_mask=[[1, 0, 1]]), "sequence 0 .* ones in a row"),
    "an empty sequence": (lambda: record(model_of(), attention_mask=[[0, 0]]), "ones in a row"),
    "another mask": (lambda: record(model_of(), attention_mask=[[2, 2]]), "ones in a row"),
    "a mask of fractions": (lambda: record(model_of(), attention_mask=[[1.0, 1.0]]), "float32 .*integers of 2"),
    "a flat mask": (lambda: record(model_of(), attention_mask=[1, 1]), "integers of 2 dimensions"),
    "a length of 0": (lambda: record(model_of(), lengths=[3, 0]), "each 1 or more"),
    "a narrow batch": (lambda: record(model_of(), lengths=[3], width=2), "width is 2"),
    "a side": (lambda: record(model_of(), lengths=[3], padding_side="top"), "top"),
    "sums that fall": (lambda: record(model_of(), cu_seqlens=[0, 5, 5]), "ascend"),
    "sums from 1": (lambda: record(model_of(), cu_seqlens=[1, 5]), "from 0"),
    "positions of a padded batch": (lambda: record(model_of(), position_ids=[0, 1, 1, 1]), "count 0, 1"),
    "positions from 1": (lambda: record(model_of(), position_ids=[1, 2]), "first must be 0"),
    "positions of two rows": (lambda: record(model_of(), position_ids=[[0, 1], [0, 1]]), "1 dimensions"),
    "an unknown router": (lambda: record(strange_router(), lengths=[3]), r"layers\.1\.mlp\.gate \(Linear\); there are MiniMaxM2TopKRouter"),
    "no router": (lambda: record(nn.Linear(2, 2), lengths=[3]), "Linear has no router"),
    "a router in no layer": (lambda: record(nn.ModuleList([model_of().model.layers[0]]), lengths=[3]), "is in no layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name):
    call, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        call()


def test_a_misspelt_layout_is_refused():
    with pytest.raises(TypeError, match="length is no part of a layout; there are attention_mask"):
        replay(model_of(), [None], length=[3])


def test_a_router_that_returns_something_else_is_refused():
    model = build()
    gate = model.model.layers[0].mlp.gate
    gate.forward = lambda hidden, bias: F.linear(hidden.reshape(-1, 32), gate.weight)
    with pytest.raises(ValueError, match=r"gate \(MiniMaxM2TopKRouter\) returned \[\[5, 8\]\]"), record(model, lengths=[5]):
        model(torch.tensor([tokens(5)]))


def test_what_has_not_run_tells_nothing():
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = record(model_of(), lengths=[3]).records
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = replay(model_of(), [random_record(3, 0)], lengths=[3]).agreement
    with pytest.raises(RuntimeError, match="no record has a row"):
        _ = replay(model_of(), [None], lengths=[3]).agreement
