"""Small random models of each family, as Hugging Face makes and saves them: the checkpoint is theirs, names and config included."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "experts_implementation": "eager",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN = COMMON | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True, "intermediate_size": 40}
MIXTRAL = COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
GLM = COMMON | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "use_qk_norm": True,
    "num_mtp_layers": 0,
}
# class, and what its config is told
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": ("Qwen3Moe", QWEN),
    "qwen, weights of the chosen not normed": ("Qwen3Moe", QWEN | {"norm_topk_prob": False}),
    "qwen, dense layers": ("Qwen3Moe", QWEN | {"num_hidden_layers": 5, "mlp_only_layers": [0], "decoder_sparse_step": 2}),
    "qwen, one head of keys, theta": (
        "Qwen3Moe",
        QWEN | {"num_key_value_heads": 1, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral, heads as wide as hidden allows": ("Mixtral", MIXTRAL | {"head_dim": None, "num_key_value_heads": 4}),
    "glm": ("Glm4Moe", GLM),
    "glm, groups": ("Glm4Moe", GLM | {"n_group": 4, "topk_group": 2}),
    "glm, neither norm nor bias, two shared, two dense": (
        "Glm4Moe",
        GLM | {"use_qk_norm": False, "attention_bias": False, "n_shared_experts": 2, "first_k_dense_replace": 2},
    ),
    "glm, no dense layer, all of a head rotates, weights not normed": (
        "Glm4Moe",
        GLM | {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0, "norm_topk_prob": False},
    ),
}
IDS = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def config_of(name: str, **changes: Any) -> Any:
    """Their config of a model."""
    family, told = MODELS[name]
    return getattr(transformers, f"{family}Config")(**{**told, **changes}, architectures=[f"{family}ForCausalLM"])


def build(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A lively model in float32, whose numbers are exact in bfloat16: norms are not all one, routers are wide, biases matter."""
    model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(config_of(name, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():  # what a checkpoint has: parameters and the biases of routers
            value = torch.randn(tensor.shape, generator=generator)
            if "norm" in key:
                value = 1.2 + 0.2 * value
            elif key.endswith("bias"):
                value *= 0.1 if "correction" in key else 0.5
            elif "embed" not in key:
                value *= (2.0 if key.endswith("gate.weight") else 1.0) * tensor.shape[-1] ** -0.5
            tensor.copy_(value.bfloat16().float())
    return model


@functools.cache
def model_of(name: str) -> nn.Module:
    """The same model for all tests that leave it as it is."""
    return build(name)


def save(model: nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Their checkpoint of a model; of a copy, for in a narrow type a model's rotary frequencies are rounded for good."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(folder)
    return folder


@torch.no_grad()
def forward(model: nn.Module, ids: list[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, and of each layer with experts the router's logits and its choice, unsorted."""
    chosen: list[Tensor] = []
    routed: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: (routed.append(output[0]), chosen.append(output[2]), None)[2])
        for path, module in model.named_modules()
        if path.endswith("mlp.gate")
    ]
    try:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return logits, routed, chosen
