"""Qwen3-MoE, Mixtral and GLM-4.5 against Hugging Face's models, on checkpoints that their classes have written.

Their model in float32 is the oracle: its weights are exact in bfloat16, so that the checkpoint, which is bfloat16, loses nothing, and
the float32 decoder differs from it by the order of sums alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pointsman.models.loader import load_model
from pointsman.models.quantize import quantize_checkpoint
from tests.models.checkpoints import Harness
from tests.models.families import IDS, MODELS, forward, model_of, save

names = pytest.mark.parametrize("name", MODELS)
# logits are of size 1 to 4; float32 sums over at most 64 terms and 5 layers
ORDER = 2e-5


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save(model_of(name), root / str(number)) for number, name in enumerate(MODELS)}


@names
def test_logits_differ_by_the_order_of_float32_sums_and_routing_not_at_all(name: str, folders: dict[str, Path]) -> None:
    want, _, chosen = forward(model_of(name), IDS)
    harness = Harness(load_model(folders[name]))
    torch.testing.assert_close(harness.step({0: IDS})[0], want, atol=ORDER, rtol=0)
    rows_TLK = harness.routes.gather(harness.slots(0, 0, len(IDS))).long()
    assert torch.equal(rows_TLK.sort(-1).values, torch.stack(chosen, 1).sort(-1).values)


@names
def test_chunks_and_single_tokens_are_the_whole(name: str, folders: dict[str, Path]) -> None:
    want, _, _ = forward(model_of(name), IDS)
    harness = Harness(load_model(folders[name], linear_backend="reference", moe_backend="reference"), page_size=3)
    got = [harness.step({1: IDS[:17], 2: IDS[:3]})[1], *(harness.step({1: [token]})[1] for token in IDS[17:])]
    torch.testing.assert_close(torch.cat(got), want, atol=ORDER, rtol=0)


@names
def test_bfloat16_stays_within_its_bound(name: str, folders: dict[str, Path]) -> None:
    want, _, chosen = forward(model_of(name), IDS)
    got = Harness(load_model(folders[name], dtype="bfloat16")).step({0: IDS}, replay_TNK=torch.stack(chosen, 1))[0]
    # 2^-9 per rounding, some dozen roundings a layer; the oracle's experts, as a choice that flips says nothing of rounding
    assert _distance(got, want) < 0.02


def _distance(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, relative to that of the logits."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("name", ["qwen, dense layers", "glm, groups"])
def test_experts_that_are_given_are_used_in_the_layers_that_have_any(name: str, folders: dict[str, Path]) -> None:
    decoder = load_model(folders[name])
    layers, spec = len(decoder.architecture.expert_layers), decoder.architecture.routing
    generator = torch.Generator().manual_seed(3)
    given = torch.rand(len(IDS), layers, spec.num_experts, generator=generator).argsort(-1)[..., : spec.top_k]
    harness = Harness(decoder)
    logits = harness.step({0: IDS}, replay_TNK=given)[0]
    assert torch.equal(harness.routes.gather(harness.slots(0, 0, len(IDS))).long(), given)
    assert _distance(logits, forward(model_of(name), IDS)[0]) > 0.1
    assert layers < decoder.architecture.num_layers


def test_layers_for_multi_token_prediction_are_left_in_the_file_and_kept_by_quantizing(tmp_path: Path) -> None:
    """Published GLM checkpoints have one past the last; its tensors are none of the decoder's."""
    save(model_of("glm"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    draft = {"model.layers.3.eh_proj.weight": torch.ones(32, 64, dtype=torch.bfloat16)}
    draft["model.layers.3.mlp.experts.0.up_proj.weight"] = tensors["model.layers.2.mlp.experts.0.up_proj.weight"].clone()
    save_file(tensors | draft, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.3.eh_proj.weight does not belong to this model"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    got = Harness(load_model(tmp_path / "model")).step({0: IDS})[0]
    torch.testing.assert_close(got, forward(model_of("glm"), IDS)[0], atol=ORDER, rtol=0)
    quantize_checkpoint(tmp_path / "model", tmp_path / "fp8", progress=False)
    kept = load_file(tmp_path / "fp8" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in draft.items())
    load_model(tmp_path / "fp8")
