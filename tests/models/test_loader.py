"""Every tensor lands where it belongs, unchanged; and what does not fit is listed before or as it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pointsman.models import MODELS, architecture_of
from pointsman.models.loader import load_model, make_parameters
from pointsman.models.parameters import Parameters
from pointsman.models.sharding import Shard
from tests.models.checkpoints import Harness, Shape, write
from tests.models.test_architecture import PUBLISHED

FP8 = Shape(hidden=48, heads=5, kv_heads=1, head_dim=16, width=40, experts=4, block=(32, 20))
ROWS = MODELS["MiniMaxM2ForCausalLM"].rows
CPU = torch.device("cpu")


def same(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit; e4m3 is compared as bytes."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8)) if left.element_size() == 1 else torch.equal(left, right)


def published(parameters: Parameters, shape: Shape) -> dict[str, Tensor]:
    """What was loaded, cut up again by hand under the published names."""
    found = {
        "model.embed_tokens.weight": parameters.embed_VD,
        "model.norm.weight": parameters.norm_D,
        "lm_head.weight": parameters.head.data,
    }
    q, kv, width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.width
    blocks = shape.block or (1, 1)

    def cut(name: str, data: Tensor, scale: Tensor | None, first: int, last: int, first_block: int) -> None:
        found[f"{name}.weight"] = data[first:last]
        if scale is not None:
            found[f"{name}.weight_scale_inv"] = scale[first_block : first_block + -(-(last - first) // blocks[0])]

    for number, layer in enumerate(parameters.layers):
        at = f"model.layers.{number}."
        found[at + "input_layernorm.weight"] = layer.attention_norm_D
        found[at + "post_attention_layernorm.weight"] = layer.expert_norm_D
        found[at + "self_attn.q_norm.weight"] = layer.q_norm_Q
        found[at + "self_attn.k_norm.weight"] = layer.k_norm_W
        found[at + "block_sparse_moe.gate.weight"] = layer.gate_ED
        found[at + "block_sparse_moe.e_score_correction_bias"] = layer.bias_E
        q_blocks, kv_blocks = -(-q // blocks[0]), -(-kv // blocks[0])
        cut(at + "self_attn.q_proj", layer.qkv.data, layer.qkv.scale, 0, q, 0)
        cut(at + "self_attn.k_proj", layer.qkv.data, layer.qkv.scale, q, q + kv, q_blocks)
        cut(at + "self_attn.v_proj", layer.qkv.data, layer.qkv.scale, q + kv, q + 2 * kv, q_blocks + kv_blocks)
        cut(at + "self_attn.o_proj", layer.o.data, layer.o.scale, 0, shape.hidden, 0)
        for expert in range(shape.experts):
            gate_up, down = layer.experts.gate_up[expert], layer.experts.down[expert]
            to = f"{at}block_sparse_moe.experts.{expert}."
            cut(to + "w1", gate_up.data, gate_up.scale, 0, width, 0)
            cut(to + "w3", gate_up.data, gate_up.scale, width, 2 * width, -(-width // blocks[0]))
            cut(to + "w2", down.data, down.scale, 0, shape.hidden, 0)
    return found


@pytest.mark.parametrize("shape", [Shape(), FP8, Shape(hidden=128, width=128, block=(128, 128))], ids=["plain", "ragged", "square"])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_tensor_lands_in_its_place_unchanged(tmp_path: Path, shape: Shape, shards: int) -> None:
    decoder = load_model(shape.write(tmp_path, shards=shards))
    want, got = shape.tensors(), published(decoder.parameters, shape)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        # norms are kept in float32, which is exact for bfloat16
        assert same(got[name], tensor.float() if "norm" in name else tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_and_norms_are_float32_whatever_the_file_has(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in Shape().tensors().items()}
    write(tmp_path, Shape().config(), tensors)
    layer = load_model(tmp_path).parameters.layers[0]
    assert {layer.gate_ED.dtype, layer.bias_E.dtype, layer.q_norm_Q.dtype} == {torch.float32}
    assert torch.equal(layer.gate_ED, tensors["model.layers.0.block_sparse_moe.gate.weight"].float())
    assert layer.qkv.data.dtype == layer.experts.down.data.dtype == dtype


def test_joined_tensors_take_the_widest_type(tmp_path: Path) -> None:
    tensors = Shape().tensors()
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].float()
    write(tmp_path, Shape().config(), tensors)
    parameters = load_model(tmp_path).parameters
    assert parameters.layers[0].qkv.data.dtype == torch.float32 and parameters.layers[0].o.data.dtype == torch.bfloat16


def test_scales_may_be_bfloat16(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() if name.endswith("scale_inv") else tensor for name, tensor in FP8.tensors().items()}
    write(tmp_path, FP8.config(), tensors)
    scale = load_model(tmp_path).parameters.layers[0].o.scale
    assert scale is not None and torch.equal(scale, tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"].float())


def test_all_that_does_not_fit_is_one_message(tmp_path: Path) -> None:
    tensors = FP8.tensors()
    at = "model.layers.0."
    del tensors[at + "self_attn.q_norm.weight"]
    del tensors[at + "self_attn.q_proj.weight_scale_inv"]
    tensors[at + "self_attn.rotary.inv_freq"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.ones(7)
    tensors[at + "self_attn.v_proj.weight"] = tensors[at + "self_attn.v_proj.weight"].to(torch.bfloat16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    write(tmp_path, FP8.config(), tensors)
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert "6 problems" in message
    assert f"{at}self_attn.q_norm.weight is missing" in message and f"{at}self_attn.q_proj.weight_scale_inv is missing" in message
    assert f"{at}self_attn.rotary.inv_freq does not belong" in message
    assert "model.norm.weight is [7] where [48] belongs" in message
    assert f"{at}self_attn.v_proj.weight is BF16 where F8_E4M3 belongs" in message
    assert "lm_head.weight is F16 where BF16 or F32 belongs" in message


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    write(tmp_path, Shape().config(), {"lm_head.weight": Shape().tensors()["lm_head.weight"]})
    with pytest.raises(ValueError, match=r"(?s)(\n  [^\n]* is missing){20}\n  and \d+ more$"):
        load_model(tmp_path)


def test_plain_weights_under_an_fp8_config_and_the_reverse_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", FP8.config(), Shape(**{**FP8.__dict__, "block": None}).tensors())
    with pytest.raises(ValueError, match=r"is BF16 where F8_E4M3 belongs"):
        load_model(tmp_path / "a")
    write(tmp_path / "b", {key: value for key, value in FP8.config().items() if key != "quantization_config"}, FP8.tensors())
    with pytest.raises(ValueError, match=r"is F8_E4M3 where BF16 or F32 belongs"):
        load_model(tmp_path / "b")


def _nan_bytes(tensor: Tensor) -> None:
    tensor.view(torch.uint8)[1, 2] = 0xFF


def _infinite(tensor: Tensor) -> None:
    tensor[0, 0] = float("inf")


def _nan(tensor: Tensor) -> None:
    tensor[3] = float("nan")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("model.layers.1.block_sparse_moe.experts.3.w2.weight", _nan_bytes),
        ("model.layers.0.self_attn.k_proj.weight_scale_inv", _infinite),
        ("model.layers.0.block_sparse_moe.e_score_correction_bias", _nan),
        ("lm_head.weight", _nan),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path, name: str, spoil: Callable[[Tensor], None]) -> None:
    tensors = FP8.tensors()
    spoil(tensors[name])
    write(tmp_path, FP8.config(), tensors)
    with pytest.raises(ValueError, match=f"{name} has numbers that are NaN or infinite"):
        load_model(tmp_path)


def test_draft_layers_are_skipped_and_layers_past_them_are_not(tmp_path: Path) -> None:
    tensors, config = Shape().tensors(), Shape().config()
    tensors |= {f"model.layers.{layer}.eh_proj.weight": torch.zeros(2) for layer in (2, 3, 4)}
    write(tmp_path / "a", config, tensors)
    load_model(tmp_path / "a")
    write(tmp_path / "b", config | {"use_mtp": False}, tensors)
    with pytest.raises(ValueError, match="3 problems"):
        load_model(tmp_path / "b")
    write(tmp_path / "c", config, tensors | {"model.layers.5.eh_proj.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"1 problems:\n  model.layers.5.eh_proj.weight does not belong"):
        load_model(tmp_path / "c")


def test_choices_are_checked_before_weights_are_read(tmp_path: Path) -> None:
    write(tmp_path, Shape().config(), {})
    for options, message in (
        ({"moe_backend": "triton"}, r"MoE runner 'triton' cannot serve here: it needs a CUDA device .*; these can: cpu, reference"),
        ({"linear_backend": "deep_gemm"}, r"unknown FP8 linear backend 'deep_gemm'"),
        ({"attention_backend": "flashinfer"}, r"attention backend 'flashinfer' cannot serve here: it needs a CUDA device"),
        ({"quantization": "fp8"}, r"quantization is 'fp8', but .* is a bfloat16 checkpoint"),
        ({"dtype": "float16"}, r"dtype is 'float16'; it must be one of auto, bfloat16, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path, **options)


def test_fp8_may_be_insisted_on(tmp_path: Path) -> None:
    assert load_model(FP8.write(tmp_path), quantization="fp8").parameters.layers[0].o.quantized


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_goes_to_stderr_and_only_where_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool | None) -> None:
    load_model(Shape().write(tmp_path), progress=progress)
    out, err = capsys.readouterr()
    assert out == "" and ("loading weights" in err) == (progress is True)


def test_what_is_joined_was_filled_to_the_last_number(tmp_path: Path) -> None:
    FP8.write(tmp_path)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        parameters = load_model(tmp_path).parameters
    finally:
        torch.use_deterministic_algorithms(False)
    for layer in parameters.layers:
        for weight in (layer.qkv, layer.o, *layer.experts):
            assert weight.dequantize(torch.float32).isfinite().all()


class TestDummy:
    CONFIG = Shape(
        layers=8, hidden=128, heads=8, kv_heads=2, head_dim=16, width=64, experts=32, top_k=4, vocab=500, block=(128, 128)
    ).config()

    def test_tokens_are_spread_evenly_over_the_experts(self, tmp_path: Path) -> None:
        write(tmp_path, self.CONFIG, {})
        (tmp_path / "model.safetensors").unlink()
        decoder = load_model(tmp_path, load_format="dummy")
        harness = Harness(decoder, max_tokens=512, page_size=16, lanes=1)
        ids = torch.randint(500, (512,), generator=torch.Generator().manual_seed(0))
        harness.step({0: ids.tolist()})
        routes_TNK = harness.routes.gather(harness.slots(0, 0, 512)).long()
        for layer in range(8):
            load_E = torch.bincount(routes_TNK[:, layer].flatten(), minlength=32) / (512 * 4 / 32)
            # an expert's share of random choices has a standard deviation of 12 %, and a fixed random router prefers some a little
            assert load_E.min() > 0.4 and load_E.max() < 1.8, (layer, load_E)
        assert len(torch.unique(routes_TNK.sort(-1).values.flatten(1), dim=0)) > 250, "tokens must not share their experts"

    def test_weights_have_the_promised_spread(self) -> None:
        parameters = make_parameters(Shard(architecture_of(self.CONFIG)), ROWS, seed=0, device=CPU)
        layer = parameters.layers[0]
        for weight in (layer.qkv, layer.o, *layer.experts, parameters.head):
            assert abs(float(weight.dequantize(torch.float32).std()) - 0.02) < 0.001
        assert abs(float(layer.gate_ED.std()) - 0.05 * (3072 / 128) ** 0.5) < 0.01
        assert layer.qkv.quantized and not parameters.head.quantized
        assert bool((layer.attention_norm_D == 1).all()) and not layer.bias_E.any()

    def test_the_seed_decides(self) -> None:
        architecture = architecture_of(self.CONFIG)
        first, again, other = (make_parameters(Shard(architecture), ROWS, seed=seed, device=CPU).layers[1].experts for seed in (3, 3, 4))
        assert same(first.down.data, again.down.data) and not same(first.down.data, other.down.data)
        assert not same(first.down.data[0], first.down.data[1])

    def test_full_size_only_needs_the_config(self) -> None:
        # one layer of few experts: the widths are the published ones
        config = PUBLISHED | {"num_hidden_layers": 1, "attn_type_list": [1], "num_local_experts": 8, "vocab_size": 512}
        parameters = make_parameters(Shard(architecture_of(config)), ROWS, seed=0, device=CPU)
        assert parameters.layers[0].qkv.data.shape == (8192, 3072)
        assert parameters.layers[0].qkv.scale is not None and parameters.layers[0].qkv.scale.shape == (64, 24)
