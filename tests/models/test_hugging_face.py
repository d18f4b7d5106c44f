"""The decoder against Hugging Face's MiniMaxM2ForCausalLM on random checkpoints of many shapes.

Two oracles. `exact` is their model in float32 with every weight dequantized exactly: against it the float32 decoder differs by
the order of sums alone. `published` is their own way of loading our files: it reads names, scales and blocks independently of us,
and rounds dequantized weights to bfloat16.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model
from tests.models.checkpoints import Harness, Shape, dequantized

SHAPES = {
    "plain": Shape(),
    "one layer, one expert": Shape(layers=1, experts=1, top_k=1),
    "three layers, seven experts, top 3": Shape(layers=3, experts=7, top_k=3),
    "five layers, no groups of heads": Shape(layers=5, heads=3, kv_heads=3, head_dim=8, rotary_dim=4),
    "eight heads on one": Shape(heads=8, kv_heads=1, experts=16, top_k=8),
    "all experts chosen": Shape(heads=6, kv_heads=2, experts=4, top_k=4, rotary_dim=16),
    "smallest rotary": Shape(hidden=40, heads=5, kv_heads=5, head_dim=24, rotary_dim=2, experts=9, top_k=5, width=20),
    "fp8 square": Shape(hidden=128, heads=4, kv_heads=2, head_dim=32, width=128, experts=5, top_k=2, block=(128, 128)),
    "fp8 small blocks": Shape(layers=3, hidden=64, heads=8, kv_heads=2, head_dim=16, width=32, experts=6, top_k=4, block=(16, 32)),
    "fp8 tall ragged blocks": Shape(hidden=48, heads=5, kv_heads=1, head_dim=16, width=40, experts=4, top_k=1, block=(32, 20)),
    "fp8 blocks larger than all": Shape(
        hidden=40, heads=4, kv_heads=4, head_dim=8, rotary_dim=4, width=24, experts=8, top_k=6, block=(128, 128)
    ),
    "fp8 one scale": Shape(hidden=256, heads=4, kv_heads=2, head_dim=64, width=192, experts=5, top_k=2, scalar="dynamic"),
    "fp8 one scale, ragged, static": Shape(layers=3, hidden=136, heads=5, kv_heads=1, width=40, experts=4, top_k=2, scalar="static"),
}
FP8_SHAPES = [name for name, shape in SHAPES.items() if shape.fp8]
SQUARE = ("plain", "three layers, seven experts, top 3", "fp8 square", "fp8 small blocks")
TOKENS = 64


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each shape, every other one in shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: shape.write(root / str(number), seed=number, shards=1 + number % 2 * 2) for number, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.fixture(scope="session")
def exact(folders: dict[str, Path]) -> dict[str, MiniMaxM2ForCausalLM]:
    return {name: exact_model(SHAPES[name], number) for number, name in enumerate(folders)}


def exact_model(shape: Shape, seed: int) -> MiniMaxM2ForCausalLM:
    config = {
        key: value for key, value in shape.config().items() if key not in ("quantization_config", "torch_dtype", "auto_map", "use_mtp")
    }
    hugging = MiniMaxM2Config(**config, bos_token_id=None, eos_token_id=None, experts_implementation="eager")  # any width
    model = MiniMaxM2ForCausalLM(hugging).eval()
    weights = dequantized(shape.tensors(seed), shape.block)
    state = {}
    for name in list(model.state_dict()):
        published = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            at = published.removesuffix("gate_up_proj")
            state[name] = torch.stack([torch.cat([weights[f"{at}{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(shape.experts)])
        elif name.endswith("experts.down_proj"):
            at = published.removesuffix("down_proj")
            state[name] = torch.stack([weights[f"{at}{e}.w2.weight"] for e in range(shape.experts)])
        else:
            state[name] = weights[published]
    model.load_state_dict(state)
    return model


@functools.cache
def _prompt(vocab: int, length: int = 11) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def _teacher(model: MiniMaxM2ForCausalLM, prompt: list[int]) -> list[int]:
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=TOKENS, do_sample=False)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def _forward(model: MiniMaxM2ForCausalLM, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    out = model(torch.tensor([ids]), output_router_logits=True)
    return out.logits[0], [logits.view(len(ids), -1) for logits in out.router_logits]


def _ids(shape: Shape, length: int = 40) -> list[int]:
    return _prompt(shape.vocab, length)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_the_same_over_64_steps(name: str, folders: dict[str, Path], exact: dict[str, MiniMaxM2ForCausalLM]) -> None:
    prompt = _prompt(SHAPES[name].vocab)
    teacher = _teacher(exact[name], prompt)
    assert len(set(teacher)) > 3, "a model that repeats itself shows nothing"
    decoder = load_model(folders[name], linear_backend="cpu", moe_backend="cpu")
    assert Harness(decoder, seed=len(name)).greedy(1, prompt, TOKENS) == teacher


@pytest.mark.parametrize("name", SHAPES)
def test_logits_differ_by_the_order_of_float32_sums(name: str, folders: dict[str, Path], exact: dict[str, MiniMaxM2ForCausalLM]) -> None:
    ids = _ids(SHAPES[name])
    want, _ = _forward(exact[name], ids)
    got = Harness(load_model(folders[name])).step({0: ids})[0]
    # logits are of size 1 to 4; float32 sums over at most 128 terms and 5 layers
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_routing_is_theirs_wherever_the_margin_is_above_rounding(
    name: str, folders: dict[str, Path], exact: dict[str, MiniMaxM2ForCausalLM]
) -> None:
    shape, ids = SHAPES[name], _ids(SHAPES[name])
    _, router_logits = _forward(exact[name], ids)
    harness = Harness(load_model(folders[name]))
    harness.step({2: ids})
    ours_TNK = harness.routes.gather(harness.slots(2, 0, len(ids))).long()
    checked = 0
    for layer, logits in enumerate(router_logits):
        bias = exact[name].model.layers[layer].mlp.e_score_correction_bias
        choice = logits.sigmoid() + bias
        best = choice.sort(dim=-1, descending=True)
        margins = best.values[:, : shape.top_k] - torch.cat((best.values, torch.full((len(ids), 1), -9.0)), 1)[:, 1 : shape.top_k + 1]
        clear = (margins > 1e-4).all(-1)
        assert torch.equal(ours_TNK[clear, layer], best.indices[clear, : shape.top_k])
        checked += int(clear.sum())
    assert checked > 0.95 * len(ids) * shape.layers


@pytest.mark.parametrize("name", FP8_SHAPES)
def test_w8a8_stays_within_its_bound_of_the_dequantized_model(
    name: str, folders: dict[str, Path], exact: dict[str, MiniMaxM2ForCausalLM]
) -> None:
    ids = _ids(SHAPES[name])
    want, _ = _forward(exact[name], ids)
    got = _with_their_experts(load_model(folders[name], linear_backend="reference", moe_backend="reference"), exact[name], ids)
    # an e4m3 activation carries 2^-4 of relative rounding at most, about 2.5 % root mean square, at every product of every layer
    assert _distance(got, want) < 0.08
    w8a16 = _with_their_experts(load_model(folders[name]), exact[name], ids)
    assert _distance(w8a16, want) < 2e-6


def _with_their_experts(decoder: Decoder, model: MiniMaxM2ForCausalLM, ids: list[int]) -> Tensor:
    """Logits under the oracle's choice of experts: a choice that flips at a near tie says nothing about a product's rounding."""
    _, router_logits = _forward(model, ids)
    top_k = decoder.architecture.top_k
    biases = [layer.mlp.e_score_correction_bias for layer in model.model.layers]
    choices = [(logits.sigmoid() + bias).topk(top_k).indices for logits, bias in zip(router_logits, biases, strict=True)]
    return Harness(decoder).step({0: ids}, replay_TNK=torch.stack(choices, 1))[0]


def _distance(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, relative to that of the logits."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("name", SQUARE)
def test_their_own_loading_of_our_files_agrees(name: str, folders: dict[str, Path]) -> None:
    theirs = MiniMaxM2ForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16).float().eval()
    tensors = SHAPES[name].tensors(list(SHAPES).index(name))
    for layer, block in enumerate(theirs.model.layers):
        # they round the bias (and here the gate) to bfloat16 on loading, which is not what the checkpoint says
        at = f"model.layers.{layer}.block_sparse_moe."
        block.mlp.e_score_correction_bias.copy_(tensors[at + "e_score_correction_bias"])
        block.mlp.gate.weight.data.copy_(tensors[at + "gate.weight"])
    ids = _ids(SHAPES[name])
    want, _ = _forward(theirs, ids)
    got = _with_their_experts(load_model(folders[name]), theirs, ids)
    # bfloat16 rounds each dequantized weight by 2^-9 at most; plain weights are exact in it
    assert _distance(got, want) < (8e-3 if SHAPES[name].block else 2e-6)


@pytest.mark.parametrize("name", ["plain", "fp8 square"])
def test_bfloat16_stays_within_its_bound(name: str, folders: dict[str, Path], exact: dict[str, MiniMaxM2ForCausalLM]) -> None:
    ids = _ids(SHAPES[name])
    want, _ = _forward(exact[name], ids)
    got = _with_their_experts(load_model(folders[name], dtype="bfloat16"), exact[name], ids)
    # 2^-9 per rounding, some ten roundings a layer
    assert _distance(got, want) < 0.016


def _any_shape(seed: int) -> Shape:
    pick = random.Random(seed)
    kv_heads, head_dim, experts = pick.randint(1, 4), pick.choice([4, 8, 10, 16, 24]), pick.randint(1, 20)
    return Shape(
        layers=pick.randint(1, 4),
        hidden=pick.randint(9, 70),
        kv_heads=kv_heads,
        heads=kv_heads * pick.randint(1, 8),
        head_dim=head_dim,
        rotary_dim=2 * pick.randint(1, head_dim // 2),
        experts=experts,
        top_k=pick.randint(1, min(8, experts)),
        width=pick.randint(5, 50),
        vocab=pick.randint(30, 200),
        block=pick.choice([None, (128, 128), (pick.randint(1, 40), pick.randint(1, 40))]),
    )


@pytest.mark.parametrize("seed", range(16))
def test_any_shape_in_any_chunks(seed: int, tmp_path: Path) -> None:
    shape = _any_shape(seed)
    model, decoder = exact_model(shape, seed), load_model(shape.write(tmp_path, seed=seed))
    ids, cut = _ids(shape), 1 + 2 * seed
    harness = Harness(decoder, page_size=1 + seed % 7, seed=seed)
    got = torch.cat([harness.step({3: ids[:cut]})[3], harness.step({3: ids[cut:]})[3]])
    torch.testing.assert_close(got, _forward(model, ids)[0], atol=2e-5, rtol=0)


def test_a_checkpoint_they_saved_is_read(tmp_path: Path, exact: dict[str, MiniMaxM2ForCausalLM]) -> None:
    model = exact["three layers, seven experts, top 3"]
    model.save_pretrained(tmp_path)
    ids = _ids(SHAPES["three layers, seven experts, top 3"])
    want, _ = _forward(model, ids)
    torch.testing.assert_close(Harness(load_model(tmp_path)).step({0: ids})[0], want, atol=2e-5, rtol=0)
