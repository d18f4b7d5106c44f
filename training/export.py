"""Writes a model as a checkpoint in the published MiniMax-M2 form, and reads one back."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.model import Model, Shape, dequantize_blocks, quantize_blocks

LAYER = "model.layers.{}."


def config(shape: Shape, eos: int, bos: int, pad: int) -> dict:
    """config.json with the published field names."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * shape.layers,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.expert_width,
        "max_position_embeddings": shape.max_position,
        "model_type": "minimax_m2",
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "pad_token_id": pad,
        "qk_norm_type": "per_layer",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "rotary_dim": shape.rotary_dim,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mtp": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": shape.vocab,
    }


def linears(model: Model) -> dict[str, Tensor]:
    """Every FP8 matrix by its published name."""
    found = {}
    for index in range(model.shape.layers):
        layer = LAYER.format(index)
        found[layer + "self_attn.q_proj"] = model.q_proj[index]
        found[layer + "self_attn.k_proj"], found[layer + "self_attn.v_proj"] = model.kv_proj[index]
        found[layer + "self_attn.o_proj"] = model.o_proj[index]
        for expert in range(model.shape.experts):
            name = f"{layer}block_sparse_moe.experts.{expert}."
            found[name + "w1"], found[name + "w3"] = model.up_proj[index, expert]
            found[name + "w2"] = model.down_proj[index, expert]
    return found


def others(model: Model) -> dict[str, Tensor]:
    """What stays in bf16 (norms, embedding, head) and in fp32 (router) by its published name."""
    found = {"model.embed_tokens.weight": model.embed, "lm_head.weight": model.head, "model.norm.weight": model.norm}
    for index in range(model.shape.layers):
        layer = LAYER.format(index)
        found[layer + "input_layernorm.weight"] = model.attention_norm[index]
        found[layer + "post_attention_layernorm.weight"] = model.expert_norm[index]
        found[layer + "self_attn.q_norm.weight"] = model.q_norm[index]
        found[layer + "self_attn.k_norm.weight"] = model.k_norm[index]
        found[layer + "block_sparse_moe.gate.weight"] = model.gate[index]
        found[layer + "block_sparse_moe.e_score_correction_bias"] = model.bias[index]
    return found


@torch.no_grad()
def save(model: Model, path: Path) -> None:
    """model.safetensors: e4m3 with block scales, bf16, and fp32 for the router."""
    tensors = {}
    for name, weight in linears(model).items():
        tensors[name + ".weight"], tensors[name + ".weight_scale_inv"] = quantize_blocks(weight.detach().float().cpu())
    for name, value in others(model).items():
        tensors[name] = value.detach().cpu().to(torch.float32 if "block_sparse_moe" in name else torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata={"format": "pt"})


@torch.no_grad()
def load(path: Path, shape: Shape, **options) -> Model:
    """The model of an exported checkpoint, its weights exactly as served."""
    model, tensors = Model(shape, **options), load_file(str(path))
    for name, weight in linears(model).items():
        weight.copy_(dequantize_blocks(tensors[name + ".weight"], tensors[name + ".weight_scale_inv"]))
    for name, value in others(model).items():
        value.copy_(tensors[name])
    return model


def save_master(model: Model, folder: Path) -> None:
    """The weights to go on training from: matrices in bf16, which keeps the files small, and the router in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    exact = ("gate", "bias")
    state = {
        name: value.detach().cpu().to(torch.float32 if name in exact else torch.bfloat16) for name, value in model.state_dict().items()
    }
    halves = {"up_proj"}, set(state) - {"up_proj"}
    for index, names in enumerate(halves):
        save_file({name: state[name].contiguous() for name in sorted(names)}, str(folder / f"master-{index}.safetensors"))


def load_master(model: Model, folder: Path) -> None:
    """The inverse of `save_master`."""
    model.load_state_dict(
        {name: value.float() for path in sorted(folder.glob("master-*.safetensors")) for name, value in load_file(str(path)).items()}
    )


def save_configs(shape: Shape, folder: Path) -> None:
    """config.json and generation_config.json for the tokenizer in the same folder."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    eos, bos, pad = ids["[e~["], ids["]~!b["], ids["]!p~["]
    (folder / "config.json").write_text(json.dumps(config(shape, eos, bos, pad), indent=2) + "\n")
    generation = {
        "bos_token_id": bos,
        "do_sample": True,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
