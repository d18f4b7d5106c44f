"""Small random models of Hugging Face, one of each family of routers."""

from __future__ import annotations

import functools

import torch
import transformers

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "experts_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
GROUPS = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_routed_experts": 8, "moe_intermediate_size": 12}
SMALL = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "intermediate_size": 12, "num_experts": 8}
FAMILIES = {
    "MiniMaxM2": {"intermediate_size": 12, "num_local_experts": 8, "num_experts_per_tok": 3, "rotary_dim": 4},
    "Mixtral": {"intermediate_size": 12, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Olmoe": {"intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3},
    "Qwen2Moe": {**SMALL, "num_experts_per_tok": 3},
    "Qwen3Moe": {**SMALL, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "DeepseekV3": {**GROUPS, **LATENT, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5, "intermediate_size": 24},
    "Glm4Moe": {**GROUPS, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5, "intermediate_size": 24},
}
EXPERTS = 8


def build(family: str = "MiniMaxM2", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A model whose routers are lively: scores far from each other, and biases that matter."""
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.to(dtype)


@functools.cache
def model_of(family: str = "MiniMaxM2") -> torch.nn.Module:
    """The same model for all tests that leave it as it is."""
    return build(family)


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, COMMON["vocab_size"], (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def layers_of(family: str) -> tuple[int, ...]:
    return (1, 2) if "first_k_dense_replace" in FAMILIES[family] else (0, 1, 2)


def checkpointing(model: torch.nn.Module, **how) -> torch.nn.Module:
    """The model, computing its layers again for the gradients; the method was renamed."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how or None)
    return model
