"""What is read from config.json of Qwen3-MoE, Mixtral and GLM-4.5: as published, as transformers writes it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.models import architecture_of
from pointsman.models.architecture import Architecture
from pointsman.moe.spec import RoutingSpec

# the configs of Qwen3-30B-A3B-FP8, Mixtral-8x7B and GLM-4.5; lists of modules and ids are shortened
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
GLM: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
PUBLISHED = {"Qwen3Moe": QWEN, "Mixtral": MIXTRAL, "Glm4Moe": GLM}
ARCHITECTURES = {
    "Qwen3Moe": Architecture(
        name="Qwen3MoeForCausalLM",
        vocab_size=151936,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        rotary_dim=128,
        rope_theta=1e6,
        max_positions=40960,
        norm_epsilon=1e-6,
        routing=RoutingSpec(num_experts=128, top_k=8, score="softmax"),
        routing_bias=False,
        expert_width=768,
        qk_norm="each",
        quantization_block=(128, 128),
        dtype="bfloat16",
    ),
    "Mixtral": Architecture(
        name="MixtralForCausalLM",
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=128,
        rope_theta=1e6,
        max_positions=32768,
        norm_epsilon=1e-5,
        routing=RoutingSpec(num_experts=8, top_k=2, score="softmax"),
        routing_bias=False,
        expert_width=14336,
        qk_norm=None,
        quantization_block=None,
        dtype="bfloat16",
    ),
    "Glm4Moe": Architecture(
        name="Glm4MoeForCausalLM",
        vocab_size=151552,
        hidden_size=5120,
        num_layers=92,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=64,
        rope_theta=1e6,
        max_positions=131072,
        norm_epsilon=1e-5,
        routing=RoutingSpec(num_experts=160, top_k=8, score="sigmoid", scale=2.5),
        routing_bias=True,
        expert_width=1536,
        shared_width=1536,
        dense_layers=(0, 1, 2),
        dense_width=12288,
        qk_norm="each",
        qkv_bias=True,
        quantization_block=None,
        num_draft_layers=1,
        dtype="bfloat16",
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_published_config(family: str) -> None:
    assert architecture_of(PUBLISHED[family]) == ARCHITECTURES[family]


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_config_that_transformers_writes(family: str) -> None:
    written = getattr(transformers, f"{family}Config")(**PUBLISHED[family]).to_diff_dict()
    assert "rope_theta" not in written
    assert architecture_of(written) == ARCHITECTURES[family]


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_is_left_out_is_what_transformers_computes(family: str) -> None:
    """Of keys that may be missing, theirs and our default are one."""
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    sizes += ("rms_norm_eps", "num_experts_per_tok", "intermediate_size", "moe_intermediate_size", "head_dim")
    sizes += ("num_experts", "num_local_experts", "n_routed_experts", "model_type", "architectures", "num_nextn_predict_layers")
    least = {key: value for key, value in PUBLISHED[family].items() if key in sizes}
    written = getattr(transformers, f"{family}Config")(**least).to_dict()
    del written["dtype"]
    assert architecture_of(least) == architecture_of(written)


REFUSED = [
    ("Qwen3Moe", "attention_bias", True, "False"),
    ("Qwen3Moe", "use_sliding_window", True, "False"),
    ("Qwen3Moe", "tie_word_embeddings", True, "False"),
    ("Qwen3Moe", "mlp_only_layers", [48], "from 0 to 47"),
    ("Qwen3Moe", "mlp_only_layers", list(range(48)), "no layer with experts"),
    ("Qwen3Moe", "decoder_sparse_step", 49, "no layer with experts"),
    ("Qwen3Moe", "norm_topk_prob", 1, "True or False"),
    ("Qwen3Moe", "n_shared_experts", 1, "does not know"),
    ("Qwen3Moe", "num_experts_per_tok", 129, "at most the number of experts"),
    ("Qwen3Moe", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "default"),
    ("Mixtral", "sliding_window", 4096, "null"),
    ("Mixtral", "model_type", "minimax_m2", "'mixtral'"),
    ("Mixtral", "use_qk_norm", True, "does not know"),
    ("Mixtral", "num_key_value_heads", 5, "multiple of num_key_value_heads"),
    ("Glm4Moe", "first_k_dense_replace", 92, "from 0 to 91"),
    ("Glm4Moe", "n_group", 3, "cannot be limited to 1 of 3 groups"),
    ("Glm4Moe", "topk_group", 2, "cannot be limited to 2 of 1 groups"),
    ("Glm4Moe", "n_shared_experts", 0, "from 1"),
    ("Glm4Moe", "routed_scaling_factor", 0, "positive"),
    ("Glm4Moe", "use_qk_norm", "per_head", "True or False"),
    ("Glm4Moe", "partial_rotary_factor", 2.0, "even number from 2"),
    ("Glm4Moe", "scoring_func", "softmax", "does not know"),
]


@pytest.mark.parametrize(("family", "key", "value", "right"), REFUSED)
def test_a_value_the_model_was_not_written_for_is_refused_by_name(family: str, key: str, value: Any, right: str) -> None:
    with pytest.raises(ValueError) as caught:
        architecture_of(PUBLISHED[family] | {key: value})
    assert right in str(caught.value) and (key in str(caught.value) or "group" in key)


SCALARS = st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=3)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from([*PUBLISHED]))
def test_no_value_does_anything_but_parse_or_be_refused(data: st.DataObject, family: str) -> None:
    values = SCALARS | st.lists(st.integers(-1, 99), max_size=3)
    changes = data.draw(st.dictionaries(st.sampled_from([*PUBLISHED[family], "num_local_experts", "rope_parameters"]), values, max_size=3))
    try:
        architecture = architecture_of(PUBLISHED[family] | changes)
    except ValueError:
        return
    assert architecture.expert_layers and architecture.top_k <= architecture.num_experts
    assert architecture.rotary_dim <= architecture.head_dim
