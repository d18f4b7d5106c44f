"""FP8 with one scale a matrix, of every family: what Hugging Face computes with the exact numbers, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pointsman.cli import main
from pointsman.distributed import Mesh
from pointsman.kernels.reference import quantize_weight
from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model, rows_for
from pointsman.models.parameters import Parameters, held, weights_of
from pointsman.models.quantize import quantize_checkpoint
from pointsman.models.revision import Revision
from pointsman.models.sizes import described
from pointsman.moe.candidates import RUNNERS
from pointsman.moe.flashinfer_scalar import ScalarTrtllmRunner
from tests.models.checkpoints import Harness, Shape, dequantized, write
from tests.models.families import IDS, MODELS, build, forward, save
from tests.moe.libraries.flashinfer import VERSIONS, Emulation

# scales of several blocks of 128, and widths that are no multiple of it
SIZES = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 2, "moe_intermediate_size": 136, "intermediate_size": 260}
FAMILIES = ("qwen", "mixtral", "glm, groups")
STATIC = Shape(hidden=160, heads=4, kv_heads=2, head_dim=64, width=136, experts=4, scalar="static")
families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    found = {}
    for number, name in enumerate(FAMILIES):
        found[name] = save(build(name, **{key: size for key, size in SIZES.items() if key in MODELS[name][1]}), root / str(number))
    return found


@pytest.fixture(scope="module")
def written(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the command."""
    root = tmp_path_factory.mktemp("fp8")
    for name, folder in plain.items():
        assert main(["quantize", str(folder), str(root / name), "--per-tensor", "--json"]) == 0
    return {name: root / name for name in plain}


def test_errors_of_random_numbers_are_those_of_blocks(plain: dict[str, Path], tmp_path: Path) -> None:
    """e4m3 has one precision at every size but the smallest."""
    blocks, one = (quantize_checkpoint(plain["qwen"], tmp_path / str(b), block=b, progress=False) for b in ((128, 128), None))
    assert one.relative == pytest.approx(blocks.relative, rel=0.03) and one.bytes_after < blocks.bytes_after


@families
def test_a_matrix_is_quantized_as_one_block(name: str, plain: dict[str, Path], written: dict[str, Path]) -> None:
    before, after = (load_file(folder[name] / "model.safetensors") for folder in (plain, written))
    assert json.loads((written[name] / "config.json").read_text())["quantization_config"]["weight_block_size"] is None
    scales = {key for key in after if key.endswith("weight_scale")}
    assert scales and after.keys() == before.keys() | scales
    for key in (scale.removesuffix("_scale") for scale in scales):
        weight = quantize_weight(before[key], tuple(before[key].shape))
        assert torch.equal(after[key].view(torch.uint8), weight.data.view(torch.uint8))
        assert after[key + "_scale"].shape == () and after[key + "_scale"] == weight.scale == before[key].float().abs().max() / 448


@families
def test_it_computes_what_hugging_face_does_with_the_exact_numbers(
    name: str, plain: dict[str, Path], written: dict[str, Path], tmp_path: Path
) -> None:
    """In float32 but for the order of sums; with FP8 activations within what e4m3 rounds, as block FP8 does."""
    exact = dequantized(load_file(written[name] / "model.safetensors"), None)
    save_file(exact, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((plain[name] / "config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager").eval()
    want, _, chosen = forward(theirs, IDS)
    replay = torch.stack(chosen, 1)
    # logits are of size 1 to 4; sums over at most 260 terms
    torch.testing.assert_close(Harness(load_model(written[name])).step({0: IDS}, replay_TNK=replay)[0], want, atol=5e-5, rtol=0)
    w8a8 = load_model(written[name], quantization="fp8", linear_backend="reference", moe_backend="reference")
    distance = (Harness(w8a8).step({0: IDS}, replay_TNK=replay)[0] - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0 < float(distance) < 0.08


def in_their_words(folder: Path, target: Path) -> Path:
    """The same checkpoint as transformers writes it."""
    names = {".weight_scale": ".weight_scale_inv", ".input_scale": ".activation_scale"}
    tensors = load_file(folder / "model.safetensors")
    for ours, theirs in names.items():
        tensors = {key.removesuffix(ours) + theirs if key.endswith(ours) else key: tensor for key, tensor in tensors.items()}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    write(target, config, tensors)
    return target


@families
def test_their_words_are_read_as_transformers_reads_them(name: str, written: dict[str, Path], tmp_path: Path) -> None:
    folder = in_their_words(written[name], tmp_path / "theirs")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    parameters, ours = load_model(folder).parameters, load_model(written[name]).parameters
    for number, layer in enumerate(parameters.layers):
        at = f"model.layers.{number}."
        joined = torch.cat([found[f"{at}self_attn.{part}_proj.weight"] for part in "qkv"])
        assert torch.equal(layer.qkv.dequantize(torch.bfloat16), joined)
        if layer.experts is not None:
            assert torch.equal(layer.experts.gate_up.dequantize(torch.bfloat16), found[f"{at}mlp.experts.gate_up_proj"])
            assert torch.equal(layer.experts.down.dequantize(torch.bfloat16), found[f"{at}mlp.experts.down_proj"])
        for key, weight in weights_of(layer).items():
            assert torch.equal(weight.scale, weights_of(ours.layers[number])[key].scale)


def test_joined_matrices_keep_their_own_scales(tmp_path: Path) -> None:
    """q, k and v; gate and up: nothing is quantized again for having been joined."""
    tensors, parameters = STATIC.tensors(3), load_model(STATIC.write(tmp_path, seed=3)).parameters
    for number, layer in enumerate(parameters.layers):
        at, seen = f"model.layers.{number}.self_attn.", set()
        for part, (name, rows) in enumerate(zip("qkv", layer.qkv.parts, strict=True)):
            first = sum(-(-height // 128) for height in layer.qkv.parts[:part])
            scale, want = layer.qkv.scale[first : first + -(-rows // 128)], tensors[f"{at}{name}_proj.weight_scale"]
            assert (scale == want).all() and layer.qkv.input_scale[part] == tensors[f"{at}{name}_proj.input_scale"]
            seen.add(float(want))
        assert len(seen) == 3
        for expert in range(STATIC.experts):
            at, both = f"model.layers.{number}.block_sparse_moe.experts.{expert}.", layer.experts.gate_up[expert]
            gate, up = both.scale.chunk(2)
            assert (
                (gate == tensors[at + "w1.weight_scale"]).all() and (up == tensors[at + "w3.weight_scale"]).all() and gate[0, 0] != up[0, 0]
            )
            assert both.input_scale.tolist() == [float(tensors[f"{at}{name}.input_scale"]) for name in ("w1", "w3")]
            assert torch.equal(both.data[:136].view(torch.uint8), tensors[at + "w1.weight"].view(torch.uint8))


@pytest.mark.parametrize("layout", [(1, 1, 0), (2, 1, 1), (2, 2, 0), (2, 2, 1)])
def test_what_is_held_is_what_was_planned(layout: tuple[int, int, int], tmp_path: Path) -> None:
    tp, ep, rank = layout
    decoder = load_model(STATIC.write(tmp_path), mesh=Mesh(tp=tp, ep=ep, rank=rank), progress=False)
    sizes = held(decoder.parameters)
    assert {kind: sizes[kind] for kind in ("attention", "experts")} == {
        kind: described(decoder.shard)[kind] for kind in ("attention", "experts")
    }
    made = load_model(tmp_path, load_format="dummy", mesh=Mesh(tp=tp, ep=ep, rank=rank), progress=False)
    assert all((weight.input_scale > 0).all() for layer in made.parameters.layers for weight in weights_of(layer).values())


def test_it_says_what_becomes_of_the_scales(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO):
        load_model(STATIC.write(tmp_path))
    assert "Its scales of activations are not used" in caplog.text
    assert main(["explain", str(tmp_path / "config.json"), "--device", "cpu", "--json"]) == 0
    assert any("exactly that of each of its 128x128 blocks" in note for note in json.loads(capsys.readouterr().out)["notes"])


WHOLE = Shape(heads=4, kv_heads=2, head_dim=32, rotary_dim=16, hidden=256, width=128, experts=8, scalar="static")


def test_the_kernel_for_one_scale_is_given_the_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loaded with up before gate, as over weights in the usual order; near the reference; and after an update of some."""
    emulation = Emulation(VERSIONS[-1], exact=True).install(monkeypatch)
    monkeypatch.setitem(RUNNERS, "flashinfer_trtllm", lambda *what: None)
    names = {"dtype": "bfloat16", "linear_backend": "reference", "progress": False}
    decoder = load_model(WHOLE.write(tmp_path / "old"), moe_backend="flashinfer_trtllm", **names)
    plain = load_model(tmp_path / "old", moe_backend="reference", **names)
    other = Decoder(plain.shard, plain.parameters, dataclasses.replace(decoder.backends, moe=ScalarTrtllmRunner()), decoder.dtype)
    ids = [5, 9, 33, 21, 60, 2]
    got, want = Harness(decoder).step({0: ids})[0], Harness(plain).step({0: ids})[0]
    assert torch.equal(got, Harness(other).step({0: ids})[0]) and {name for name, _ in emulation.calls} == {
        "trtllm_fp8_per_tensor_scale_moe"
    }
    # scales of activations that are drawn at random: coarser than the reference's by up to some bits
    assert 0.01 < float((got - want).float().norm() / want.float().norm()) < 0.15
    some = {name: tensor for name, tensor in WHOLE.tensors(7).items() if ".experts.3.w1" in name or ".experts.5." in name}
    revision = Revision(decoder.shard, rows_for(decoder.backends.moe, decoder.architecture))
    revision.add(some)
    updated = Decoder(decoder.shard, revision.apply(decoder.parameters, torch.device("cpu")), decoder.backends, decoder.dtype)
    write(tmp_path / "new", WHOLE.config(), WHOLE.tensors() | some)
    fresh = load_model(tmp_path / "new", moe_backend="flashinfer_trtllm", **names)
    assert torch.equal(Harness(updated).step({0: ids})[0], Harness(fresh).step({0: ids})[0])
    assert not torch.equal(Harness(updated).step({0: ids})[0], got)


def test_explain_counts_the_weights_that_stand_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RUNNERS, "flashinfer_trtllm", lambda *what: None)
    WHOLE.write(tmp_path)
    words = ["explain", str(tmp_path / "config.json"), "--device", "b200", "--json", "--moe-runner-backend"]
    assert main([*words, "flashinfer_trtllm"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["weights_again"] == {"experts as flashinfer_trtllm reads them": 2 * 8 * 3 * 256 * 128}
    assert any("Its scales of activations are the experts' in flashinfer_trtllm" in note for note in found["notes"])
    assert main([*words, "triton"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["memory"]["weights_again"] and any("activations are not used" in note for note in found["notes"])


AT = "model.layers.0.self_attn.q_proj."


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _with(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(AT + "weight_scale"), "q_proj.weight_scale is missing"),
        (_without(AT + "input_scale"), "q_proj.input_scale is missing"),
        (_with(AT + "weight_scale", torch.ones(256, 1)), r"q_proj.weight_scale is \[256, 1\] where one number \(\[\] or \[1\]\) belongs"),
        (_with(AT + "weight_scale", torch.ones(2, 2)), r"q_proj.weight_scale is \[2, 2\] where one number"),
        (_with(AT + "weight_scale", torch.tensor(float("nan"))), "q_proj.weight_scale has numbers that are NaN"),
        (_with(AT + "weight_scale", torch.ones((), dtype=torch.float64)), "q_proj.weight_scale is F64 where F32 or BF16 belongs"),
        (_with(AT + "input_scale", torch.zeros(())), "q_proj.input_scale is no positive finite number"),
        (_with(AT + "input_scale", torch.tensor(-1.0)), "q_proj.input_scale is no positive finite number"),
        (_with(AT + "input_scale", torch.tensor([float("inf")])), "q_proj.input_scale is no positive finite number"),
        (_with(AT + "weight_scale_inv", torch.ones(())), "q_proj.weight_scale is in model.safetensors as .* and as .*q_proj.weight_scale"),
        (_with(AT + "weight", torch.ones(256, 160, dtype=torch.bfloat16)), "q_proj.weight is BF16 where F8_E4M3 belongs"),
        (_with("model.layers.0.self_attn.k_scale", torch.ones(())), "self_attn.k_scale does not belong to this model"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    tensors = STATIC.tensors()
    change(tensors)
    write(tmp_path, STATIC.config(), tensors)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_scales_of_activations_must_be_announced(tmp_path: Path) -> None:
    config = STATIC.config()
    config["quantization_config"]["activation_scheme"] = "dynamic"
    write(tmp_path, config, STATIC.tensors())
    with pytest.raises(ValueError, match="input_scale does not belong to this model"):
        load_model(tmp_path)


def test_a_list_of_one_number_is_a_number(tmp_path: Path) -> None:
    tensors = {name: tensor.reshape(1) if tensor.dim() == 0 else tensor for name, tensor in STATIC.tensors().items()}
    write(tmp_path / "lists", STATIC.config(), tensors)
    want, got = (load_model(folder).parameters for folder in (STATIC.write(tmp_path / "numbers"), tmp_path / "lists"))
    assert same(got, want)


def same(one: Parameters, other: Parameters) -> bool:
    """All quantized weights, with their scales."""
    pairs = [
        (left, weights_of(there)[name])
        for here, there in zip(one.layers, other.layers, strict=True)
        for name, left in weights_of(here).items()
    ]
    return all(
        torch.equal(left.data.view(torch.uint8), right.data.view(torch.uint8))
        and torch.equal(left.scale, right.scale)
        and torch.equal(left.input_scale, right.input_scale)
        for left, right in pairs
    )


@pytest.mark.parametrize("layout", [(1, 1, 0), (2, 2, 1), (4, 2, 1)])
def test_a_revision_is_what_a_checkpoint_would_have_been(layout: tuple[int, int, int], tmp_path: Path) -> None:
    """By either spelling; quantized on arrival, with the scales of activations that were there; and of all, where nothing was."""
    shape = Shape(hidden=160, heads=8, kv_heads=4, head_dim=64, width=300, experts=4, scalar="static")
    old, new, (tp, ep, rank) = shape.tensors(0), shape.tensors(1), layout
    decoder = load_model(shape.write(tmp_path / "old"), mesh=Mesh(tp=tp, ep=ep, rank=rank), progress=False)
    rows = rows_for(decoder.backends.moe, decoder.architecture)
    part = {name: tensor for name, tensor in new.items() if "k_proj" in name or "experts.2.w3" in name}
    raw = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    numbers = torch.randn(160, 300, generator=torch.Generator().manual_seed(5))
    weight = quantize_weight(numbers, (160, 300))
    write(tmp_path / "new", shape.config(), old | part | {raw: weight.data, raw + "_scale": weight.scale.reshape(())})
    want = load_model(tmp_path / "new", mesh=Mesh(tp=tp, ep=ep, rank=rank), progress=False).parameters

    revision = Revision(decoder.shard, rows)
    revision.add(
        {name.replace(".weight_scale", ".weight_scale_inv"): tensor for name, tensor in part.items()} | {raw: numbers}, quantize=True
    )
    assert same(revision.apply(decoder.parameters, torch.device("cpu")), want)
    assert revision.check(raw + "_scale", (1,), "F32") == torch.float32
    everything = Revision(decoder.shard, rows)
    everything.add({name: tensor for name, tensor in (old | part).items() if name != raw + "_scale"} | {raw: numbers}, quantize=True)
    assert same(everything.apply(None, torch.device("cpu")), want)


def test_a_revision_is_refused_as_a_checkpoint_is(tmp_path: Path) -> None:
    decoder = load_model(STATIC.write(tmp_path))
    tensors = STATIC.tensors(1)
    for given, message in (
        ({AT + "weight": tensors[AT + "weight"]}, "q_proj.weight came without .*q_proj.weight_scale"),
        ({AT + "weight_scale": torch.ones(())}, "q_proj.weight_scale came without .*q_proj.weight"),
        ({AT + "weight_scale": torch.ones(3)}, r"\[3\] where one number"),
        ({AT + "input_scale": torch.tensor(0.0)}, "no positive finite number"),
        ({AT + "input_scale": torch.tensor(1.0), AT + "activation_scale": torch.tensor(1.0)}, "has come already"),
    ):
        with pytest.raises(ValueError, match=message):
            revision = Revision(decoder.shard)
            revision.add(given)
            revision.apply(decoder.parameters, torch.device("cpu"))
    alone = Revision(decoder.shard)
    alone.add({AT + "input_scale": torch.tensor(0.25)})
    changed = alone.apply(decoder.parameters, torch.device("cpu"))
    assert changed.layers[0].qkv.input_scale[0] == 0.25 != decoder.parameters.layers[0].qkv.input_scale[0]
