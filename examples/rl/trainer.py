"""The trainer's model: transformers' MiniMax-M2, read from a checkpoint in FP8 blocks and written back as one.

Loading through transformers would round dequantized weights to bfloat16, and the router's bias with them, and then the trainer would
choose other experts before it has learnt anything. Here every value is what the file says: e4m3 times its scale, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from pointsman.kernels.reference import quantize_weight

SCALE = "_scale_inv"
EXPERT_PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
LEFT_OUT = ("quantization_config", "torch_dtype", "auto_map")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> MiniMaxM2ForCausalLM:
    """The model of a checkpoint; with `dtype` bfloat16 all but the routers is rounded to it, as trainers have it."""
    config = {name: value for name, value in json.loads((folder / "config.json").read_text()).items() if name not in LEFT_OUT}
    model = MiniMaxM2ForCausalLM(MiniMaxM2Config(**config, experts_implementation="eager", attn_implementation="sdpa"))
    weights = _exact(folder)
    state = {}
    for name in model.state_dict():
        parts = EXPERT_PARTS.get(name.rpartition(".")[2])
        if parts is None:
            state[name] = weights[_published(name)]
        else:
            at = _published(name).rpartition(".")[0]
            state[name] = torch.stack(
                [torch.cat([weights[f"{at}.{expert}.{part}.weight"] for part in parts]) for expert in range(model.config.num_local_experts)]
            )
    model.load_state_dict(state)
    model.to(dtype)
    for layer in model.model.layers:  # the engine's routers are float32, whatever the rest is
        layer.mlp.gate.float()
        layer.mlp.e_score_correction_bias = layer.mlp.e_score_correction_bias.float()
        layer.mlp.e_score_correction_bias.copy_(
            weights[f"model.layers.{layer.self_attn.layer_idx}.block_sparse_moe.e_score_correction_bias"]
        )
    return model.eval()


def _published(name: str) -> str:
    return name.replace(".mlp.", ".block_sparse_moe.")


def _exact(folder: Path) -> dict[str, Tensor]:
    """Every tensor in float32, dequantized by hand."""
    tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return {name: _dequantized(tensor, tensors.get(name + SCALE)) for name, tensor in tensors.items() if not name.endswith(SCALE)}


def _dequantized(tensor: Tensor, scale: Tensor | None, block: int = 128) -> Tensor:
    if scale is None:
        return tensor.float()
    rows, columns = tensor.shape
    spread = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return tensor.float() * spread


@torch.no_grad()
def published(model: MiniMaxM2ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The model's weights by their published names, as the checkpoint has them: matrices in FP8 blocks with scales, routers in float32."""
    for name, tensor in model.state_dict().items():
        at, _, last = _published(name).rpartition(".")
        if last in EXPERT_PARTS:
            for expert, matrix in enumerate(tensor):
                for part, half in zip(EXPERT_PARTS[last], matrix.chunk(len(EXPERT_PARTS[last])), strict=True):
                    yield from _quantized(f"{at}.{expert}.{part}.weight", half)
        elif "_proj." in name:
            yield from _quantized(_published(name), tensor)
        else:
            keep = last == "e_score_correction_bias" or ".mlp.gate." in name
            yield _published(name), tensor.float() if keep else tensor.bfloat16()


def _quantized(name: str, matrix: Tensor) -> Iterator[tuple[str, Tensor]]:
    weight = quantize_weight(matrix.float(), (128, 128))
    assert weight.scale is not None
    yield name, weight.data
    yield name + SCALE, weight.scale
