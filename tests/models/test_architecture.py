"""What is read from config.json, in both of its forms, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MiniMaxM2Config

from pointsman.models import architecture_of
from pointsman.models.architecture import Architecture
from pointsman.moe.spec import RoutingSpec

# config.json of MiniMax-M2.5
PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "minimax_m25.json").read_text())
M25 = Architecture(
    name="MiniMaxM2ForCausalLM",
    vocab_size=200064,
    hidden_size=3072,
    num_layers=62,
    num_heads=48,
    num_kv_heads=8,
    head_dim=128,
    rotary_dim=64,
    rope_theta=5e6,
    max_positions=196608,
    norm_epsilon=1e-6,
    routing=RoutingSpec(num_experts=256, top_k=8, score="sigmoid"),
    routing_bias=True,
    expert_width=1536,
    qk_norm="all",
    quantization_block=(128, 128),
    num_draft_layers=3,
    dtype="bfloat16",
)


def changed(**changes: Any) -> dict[str, Any]:
    return PUBLISHED | changes


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in PUBLISHED.items() if key not in keys}


def test_the_published_config() -> None:
    assert architecture_of(PUBLISHED) == M25


def test_the_config_that_transformers_writes() -> None:
    written = MiniMaxM2Config(**without("auto_map"), dtype="bfloat16").to_diff_dict()
    assert "rope_theta" not in written and written["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert architecture_of(written | {"architectures": ["MiniMaxM2ForCausalLM"]}) == M25


def test_transformers_names_alone() -> None:
    config = without("rotary_dim", "rope_theta", "num_local_experts", "use_mtp")
    config |= {
        "num_experts": 256,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    }
    assert architecture_of(config).sizes == M25.sizes
    assert (architecture_of(config).rotary_dim, architecture_of(config).num_draft_layers) == (64, 0)


def test_without_a_partial_factor_all_channels_rotate_as_in_transformers() -> None:
    assert MiniMaxM2Config().rope_parameters == {"rope_theta": 5e6, "rope_type": "default"}
    config = without("rotary_dim", "rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
    assert architecture_of(config).rotary_dim == 128
    assert architecture_of(without("rotary_dim", "rope_theta")).rope_theta == MiniMaxM2Config.default_theta


def test_a_plain_checkpoint() -> None:
    architecture = architecture_of(without("quantization_config") | {"torch_dtype": "float32"})
    assert architecture.quantization_block is None and architecture.dtype == "float32"


REFUSED = [
    ("model_type", "mixtral", "'minimax_m2'"),
    ("hidden_act", "gelu", "'silu'"),
    ("attn_type_list", [1] * 61 + [0], "[1, 1"),
    ("attn_type_list", [1] * 61, "[1, 1"),
    ("layer_types", ["full_attention"] * 61 + ["linear_attention"], "full_attention"),
    ("sliding_window", 4096, "null"),
    ("scoring_func", "softmax", "'sigmoid'"),
    ("use_routing_bias", False, "True"),
    ("use_qk_norm", False, "True"),
    ("qk_norm_type", "per_head", "'per_layer'"),
    ("shared_intermediate_size", 1536, "0"),
    ("tie_word_embeddings", True, "False"),
    ("attention_bias", True, "False"),
    ("norm_topk_prob", False, "True"),
    ("routed_scaling_factor", 2.5, "1.0"),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}, "default"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e6}, "'default'"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, "disagree"),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}, "disagree"),
    ("rope_parameters", [1], "object"),
    ("partial_rotary_factor", 1.0, "disagree"),
    ("rotary_dim", 63, "even number"),
    ("rotary_dim", 256, "from 2 to 128"),
    ("rotary_dim", float("inf"), "from 2 to 128"),
    ("rope_theta", -1, "positive"),
    ("rms_norm_eps", 0, "positive"),
    ("rms_norm_eps", float("nan"), "positive"),
    ("hidden_size", "3072", "whole number"),
    ("hidden_size", True, "whole number"),
    ("num_hidden_layers", 0, "from 1"),
    ("num_hidden_layers", 10**9, "from 1"),
    ("num_key_value_heads", 7, "multiple of num_key_value_heads"),
    ("num_experts_per_tok", 257, "at most the number of experts"),
    ("num_experts", 128, "num_local_experts"),
    ("dtype", "float16", "'bfloat16' or 'float32'"),
    ("use_mtp", 3, "True or False"),
    ("num_mtp_modules", -1, "from 0"),
    ("attn_window_size", 8192, "does not know"),
    ("mlp_only_layers", [0], "does not know"),
    ("quantization_config", "fp8", "object"),
]
FP8 = PUBLISHED["quantization_config"]
_E4M3 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None, "block_structure": None}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "global_compression_ratio": 1.4,
    "ignore": ["lm_head", "re:.*block_sparse_moe.gate$"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "output_activations": None,
            "weights": _E4M3 | {"dynamic": False, "observer": "minmax", "observer_kwargs": {}},
            "input_activations": _E4M3 | {"dynamic": False, "observer": "minmax", "actorder": None},
        }
    },
}


_SHORT = {"dynamic": False, "num_bits": 8, "type": "float"}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "ignore": ["lm_head", "model.layers.0.block_sparse_moe.gate"],
    "config_groups": {"group_0": {"input_activations": _SHORT, "weights": _SHORT, "targets": ["Linear"]}},
}


def compressed(part: str, **changes: Any) -> dict[str, Any]:
    group = COMPRESSED["config_groups"]["group_0"]
    return COMPRESSED | {"config_groups": {"group_0": group | {part: group[part] | changes}}}


REFUSED_QUANTIZATION = [
    ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'; this model is written for 'FP8'"),
    (MODELOPT | {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, "keys and values have scale 1 here"),
    (COMPRESSED | {"quant_algo": "FP8"}, "quant_algo is 'FP8'; this version does not know the key"),
    (COMPRESSED | {"weight_block_size": [128, 128]}, "weight_block_size is [128, 128]; this model is written for null"),
    (FP8 | {"fmt": "float8_e5m2"}, "fmt is 'float8_e5m2'"),
    (FP8 | {"activation_scheme": "static"}, "of FP8 in blocks it must be 'dynamic'; with one scale a matrix weight_block_size is null"),
    (FP8 | {"activation_scheme": "none", "weight_block_size": None}, "activation_scheme is 'none'"),
    (FP8 | {"weight_block_size": [128]}, "two whole numbers"),
    (FP8 | {"weight_block_size": [128, 0]}, "two whole numbers"),
    (FP8 | {"modules_to_not_convert": ["gate", "model.layers.0.self_attn"]}, "modules_to_not_convert"),
    (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
    (FP8 | {"kv_cache_scheme": "static"}, "kv_cache_scheme is 'static'; keys and values have scale 1 here"),
    (COMPRESSED | {"format": "pack-quantized"}, "format is 'pack-quantized'"),
    (COMPRESSED | {"config_groups": {}}, "one group, of all linears"),
    (compressed("weights", strategy="channel"), "config_groups.group_0.weights.strategy is 'channel'"),
    (compressed("weights", num_bits=4), "weights.num_bits is 4"),
    (compressed("weights", type="int"), "weights.type is 'int'"),
    (compressed("input_activations", strategy="token"), "input_activations.strategy is 'token'; this model is written for 'tensor'"),
    (COMPRESSED | {"ignore": ["re:.*mlp.*"]}, "ignore is ['re:.*mlp.*']"),
    (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "keys and values have scale 1 here"),
]
ONE_SCALE = [
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, False),
    ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", "model.layers.0.block_sparse_moe.gate"]}, True),
    (FP8 | {"weight_block_size": None}, False),
    (COMPRESSED, True),
    (compressed("input_activations", dynamic=True, strategy="token"), False),
    (MODELOPT, True),
]


@pytest.mark.parametrize(("section", "static"), ONE_SCALE)
def test_one_scale_a_matrix_is_that_of_all_its_blocks(section: dict[str, Any], static: bool) -> None:
    """As AutoFP8, transformers, llm-compressor and ModelOpt say it."""
    want = dataclasses.replace(architecture_of(PUBLISHED), scalar_scales=True, input_scales=static)
    assert architecture_of(changed(quantization_config=section)) == want and want.quantization_block == (128, 128)


@pytest.mark.parametrize(("key", "value", "right"), REFUSED)
def test_a_value_the_model_was_not_written_for_is_refused_by_name(key: str, value: Any, right: str) -> None:
    with pytest.raises(ValueError) as caught:
        architecture_of(changed(**{key: value}))
    assert key in str(caught.value) and right in str(caught.value)


@pytest.mark.parametrize(("section", "message"), REFUSED_QUANTIZATION)
def test_other_quantizations_are_refused_by_name(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="quantization_config") as caught:
        architecture_of(changed(quantization_config=section))
    assert message in str(caught.value)


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(ValueError) as caught:
        architecture_of(changed(hidden_act="gelu", scoring_func="softmax", brand_new=1))
    assert all(word in str(caught.value) for word in ("hidden_act", "scoring_func", "brand_new"))


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "num_hidden_layers", "rms_norm_eps", "num_local_experts", "vocab_size"])
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is missing"):
        architecture_of(without(key))


@pytest.mark.parametrize("names", [None, "MiniMaxM2ForCausalLM", [], ["LlamaForCausalLM"], [["x"]]])
def test_an_unknown_model_is_named(names: Any) -> None:
    with pytest.raises(ValueError, match=r"architectures .* this version has 'MiniMaxM2ForCausalLM'"):
        architecture_of(changed(architectures=names))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = (
    SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from([*FP8, "rope_type", "rope_theta", "x"]), SCALARS, max_size=4)
)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from([*PUBLISHED, "rope_parameters", "rope_scaling", "dtype", "num_experts", "partial_rotary_factor"]),
        VALUES,
        max_size=3,
    )
)
def test_no_value_does_anything_but_parse_or_be_refused(changes: dict[str, Any]) -> None:
    try:
        architecture = architecture_of(PUBLISHED | changes)
    except ValueError:
        return
    assert 2 <= architecture.rotary_dim <= architecture.head_dim and architecture.top_k <= architecture.num_experts


@settings(deadline=None, max_examples=200)
@given(data=st.data(), base=st.sampled_from([FP8, COMPRESSED, MODELOPT]))
def test_no_quantization_does_anything_but_parse_or_be_refused(data: st.DataObject, base: dict[str, Any]) -> None:
    """Values of any kind, at any depth of a section that would be read."""
    section = json.loads(json.dumps(base))
    for _ in range(data.draw(st.integers(1, 3))):
        place = section
        while isinstance(inner := place.get(key := data.draw(st.sampled_from(sorted(place) or ["x"]))), dict) and data.draw(st.booleans()):
            place = inner
        place[key] = data.draw(VALUES)
    try:
        architecture = architecture_of(changed(quantization_config=section))
    except ValueError:
        return
    assert architecture.quantization_block is not None and (architecture.scalar_scales or not architecture.input_scales)
