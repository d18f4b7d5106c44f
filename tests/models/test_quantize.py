"""Quantized checkpoints: what Hugging Face dequantizes is what we do, and both are what a loop over blocks gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pointsman.cli import main
from pointsman.kernels.reference import quantize_weight
from pointsman.models.loader import load_model
from pointsman.models.quantize import quantize_checkpoint
from tests.models.checkpoints import Harness, Shape, dequantized
from tests.models.families import IDS, MODELS, build, forward, save

BLOCK = (128, 128)
# several blocks, and ragged ones
SIZES = {"hidden_size": 160, "head_dim": 64, "num_hidden_layers": 2}
CASES = {
    "qwen": SIZES | {"moe_intermediate_size": 136},
    "mixtral": SIZES | {"intermediate_size": 136},
    "glm, groups": SIZES | {"moe_intermediate_size": 136, "intermediate_size": 260},
}
MINIMAX = Shape(layers=1, hidden=160, heads=4, kv_heads=2, head_dim=64, rotary_dim=32, experts=4, width=136)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    folders = {name: save(build(name, **sizes), root / str(number)) for number, (name, sizes) in enumerate(CASES.items())}
    return folders | {"minimax": MINIMAX.write(root / "minimax", shards=3)}


@pytest.fixture(scope="module")
def written(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fp8")
    for number, (name, folder) in enumerate(plain.items()):
        quantize_checkpoint(folder, root / name, most_bytes=1 << (19 + number), progress=False)
    return {name: root / name for name in plain}


cases = pytest.mark.parametrize("name", [*CASES, "minimax"])


@cases
def test_matrices_are_what_the_reference_makes_and_the_rest_is_as_it_was(
    name: str, plain: dict[str, Path], written: dict[str, Path]
) -> None:
    before, after = tensors_of(plain[name]), tensors_of(written[name])
    matrices = {key.removesuffix("_scale_inv") for key in after if key.endswith("_scale_inv")}
    assert matrices and after.keys() == before.keys() | {f"{key}_scale_inv" for key in matrices}
    for key, tensor in before.items():
        if key in matrices:
            weight = quantize_weight(tensor, BLOCK)
            assert torch.equal(after[key].view(torch.uint8), weight.data.view(torch.uint8))
            assert torch.equal(after[f"{key}_scale_inv"], weight.scale)
        else:
            assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor)
            assert key.split(".")[-2] in ("gate", "embed_tokens", "lm_head", "norm") or "norm" in key or key.endswith("bias")


# theirs takes a block to be as large as the scales divide the matrix, so it reads whole blocks alone
WHOLE = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 2, "moe_intermediate_size": 128, "intermediate_size": 256}


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_it_and_dequantizes_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    changes = {key: value for key, value in WHOLE.items() if key in MODELS[name][1]}
    quantize_checkpoint(save(build(name, **changes), tmp_path / "in"), tmp_path / "out", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    found, parameters = theirs.state_dict(), load_model(tmp_path / "out").parameters
    for number, layer in enumerate(parameters.layers):
        at = f"model.layers.{number}."
        joined = torch.cat([found[f"{at}self_attn.{part}_proj.weight"] for part in "qkv"])
        assert torch.equal(layer.qkv.dequantize(torch.bfloat16), joined)
        assert torch.equal(layer.o.dequantize(torch.bfloat16), found[f"{at}self_attn.o_proj.weight"])
        if layer.experts is not None:
            assert torch.equal(layer.experts.gate_up.dequantize(torch.bfloat16), found[f"{at}mlp.experts.gate_up_proj"])
            assert torch.equal(layer.experts.down.dequantize(torch.bfloat16), found[f"{at}mlp.experts.down_proj"])
        for name, pair in (("mlp.", layer.dense), ("mlp.shared_experts.", layer.shared)):
            if pair is not None:
                joined = torch.cat([found[f"{at}{name}{part}_proj.weight"] for part in ("gate", "up")])
                assert torch.equal(pair.gate_up.dequantize(torch.bfloat16), joined)
                assert torch.equal(pair.down.dequantize(torch.bfloat16), found[f"{at}{name}down_proj.weight"])


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_runs_it_as_their_model_of_the_dequantized_weights(name: str, plain: dict[str, Path], written: dict[str, Path]) -> None:
    """W8A16 on a CPU: against Hugging Face's float32 model of the exact values, the order of sums; W8A8 within what e4m3 rounds."""
    other = written[name].parent / f"{name} dequantized"
    other.mkdir(exist_ok=True)
    save_file(dequantized(tensors_of(written[name]), BLOCK), other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text((plain[name] / "config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32, experts_implementation="eager").eval()
    want, _, chosen = forward(theirs, IDS)
    replay = torch.stack(chosen, 1)
    got = Harness(load_model(written[name])).step({0: IDS}, replay_TNK=replay)[0]
    # logits are of size 1 to 4; sums over at most 260 terms
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)
    w8a8 = load_model(written[name], quantization="fp8", linear_backend="reference", moe_backend="reference")
    distance = (Harness(w8a8).step({0: IDS}, replay_TNK=replay)[0] - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0 < float(distance) < 0.08


def test_errors_are_those_of_the_numbers(plain: dict[str, Path], tmp_path: Path) -> None:
    found = quantize_checkpoint(plain["qwen"], tmp_path / "out", progress=False)
    before, exact = tensors_of(plain["qwen"]), dequantized(tensors_of(tmp_path / "out"), BLOCK)
    for layer in found.layers:
        keys = [key for key in before if f"layers.{layer.layer}." in key and not torch.equal(before[key].float(), exact[key])]
        difference = torch.cat([(exact[key] - before[key].float()).flatten() for key in keys]).double()
        whole = torch.cat([before[key].flatten() for key in keys]).double()
        assert layer.num_matrices == len(keys) and layer.worst in keys
        assert layer.relative == pytest.approx(float(difference.norm() / whole.norm()), rel=1e-5)
        assert layer.largest == pytest.approx(float(difference.abs().max()), rel=1e-6)
    # e4m3 has 3 bits after the point: 2^-4 at most, about 2.6 % root mean square of normal numbers
    assert 0.02 < found.relative < 0.03 and found.num_matrices == sum(layer.num_matrices for layer in found.layers)
    assert found.bytes_after < 0.6 * found.bytes_before


def test_files_are_bounded_indexed_and_what_lies_beside_is_copied(plain: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for path in plain["minimax"].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (source / name).write_text(name)
    quantize_checkpoint(source, tmp_path / "out", most_bytes=100_000, progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and {path.name for path in files} == set(index.values())
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.offset_keys()
            assert all(index[name] == path.name for name in names)
            assert sum(file.get_tensor(name).nbytes for name in names) <= 100_000
    assert all((tmp_path / "out" / name).read_text() == name for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"))
    with pytest.raises(ValueError, match=r"not empty; .* --force"):
        quantize_checkpoint(source, tmp_path / "out", progress=False)
    quantize_checkpoint(source, tmp_path / "out", force=True, progress=False)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    load_model(tmp_path / "out", quantization="fp8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_plain_types(dtype: torch.dtype, plain: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((plain["qwen"] / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(plain["qwen"]).items()}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", progress=False)
    kept = torch.bfloat16 if dtype == torch.float16 else torch.float32
    assert tensors_of(tmp_path / "out")["lm_head.weight"].dtype == kept
    assert load_model(tmp_path / "out").architecture.dtype == str(kept).removeprefix("torch.")


def test_a_broken_checkpoint_leaves_nothing_that_loads(plain: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_of(plain["mixtral"])
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][5, 7] = float("nan")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text((plain["mixtral"] / "config.json").read_text())
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts.3.w2.weight has numbers that are NaN"):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", most_bytes=1 << 18, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written_and_while_it_is(
    plain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = quantize_checkpoint(plain["minimax"], tmp_path / "real", progress=False)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=real.bytes_after - 1))
    assert main(["quantize", str(plain["minimax"]), str(tmp_path / "out")]) == 1
    assert "GiB are free there" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=real.bytes_after))
    quantize_checkpoint(plain["minimax"], tmp_path / "out", progress=False)  # exactly as much as was foreseen
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))  # what is replaced counts as free
    quantize_checkpoint(plain["minimax"], tmp_path / "out", force=True, progress=False)
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("pointsman.models.quantize.save_file", full)
    assert main(["quantize", str(plain["minimax"]), str(tmp_path / "other")]) == 1
    assert "No space left on device" in capsys.readouterr().err and list((tmp_path / "other").iterdir()) == []


def test_the_command(plain: dict[str, Path], written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(plain["qwen"]), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["num_matrices"] == 2 * (4 + 3 * 8) and any("worst matrix" in line for line in lines)
    assert main(["quantize", str(plain["qwen"]), str(tmp_path / "again"), "--json"]) == 0
    assert [layer["layer"] for layer in json.loads(capsys.readouterr().out)["layers"]] == [0, 1]
    refused = {
        (str(written["qwen"]), str(tmp_path / "x")): "quantized already (quant_method 'fp8')",
        (str(plain["qwen"]), str(plain["qwen"])): "is the checkpoint itself",
        (str(plain["qwen"]), str(plain["qwen"] / "config.json")): "is a file",
        (str(plain["qwen"]), str(tmp_path / "out")): "--force",
        (str(tmp_path), str(tmp_path / "y")): "config.json",
        ("no folder", str(tmp_path / "y")): "neither a folder nor",
    }
    for words, reason in refused.items():
        assert main(["quantize", *words]) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()
    assert main(["quantize", str(plain["qwen"])]) == 2
    assert "1 are given" in capsys.readouterr().err


def test_every_family_is_here() -> None:
    assert {MODELS[name][0] for name in CASES} == {family for family, _ in MODELS.values()}
