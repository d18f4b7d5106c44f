"""A MiniMax-M2 checkpoint as a GGUF file, so that llama.cpp can be measured on the same weights.

The one door to the `gguf` package, which only this benchmark needs. Block scales are multiplied in (exactly, in float32); norms, biases
and the router stay float32, as llama.cpp wants them, and the matrices take the type asked for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pointsman.models import architecture_of
from pointsman.models.architecture import Architecture
from pointsman.models.checkpoint import open_checkpoint
from pointsman.models.folder import read_json
from pointsman.models.names import respelled, scale_suffix

TYPES = ("F32", "F16", "BF16", "Q8_0")

PRE_TOKENIZER = "minimax-m2"
NORMAL, CONTROL = 1, 3

# Parts of a layer by their names in the checkpoint and in GGUF; experts are stacked.
PARTS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias",
}
EXPERTS = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
KEPT_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write the checkpoint of a folder to a file, its matrices as one of TYPES.

    Raises:
        ValueError: the gguf package is not installed, or the checkpoint is no MiniMax-M2.
    """
    try:
        import gguf  # noqa: PLC0415 - of this benchmark only
    except ImportError as error:
        raise ValueError(f"llama.cpp is measured on a GGUF file, which needs gguf ({error}): pip install gguf") from None
    config = read_json(folder, "config.json")
    if config.get("model_type") != "minimax_m2":
        raise ValueError(f"{folder} has the model type {config.get('model_type')!r}; only minimax_m2 is written as GGUF")
    architecture = architecture_of(config)
    writer = gguf.GGUFWriter(str(path), "minimax-m2")
    _write_shape(writer, architecture, gguf.ExpertGatingFuncType.SIGMOID)
    _write_tokenizer(writer, folder, architecture)
    for name, values in tensors(folder, architecture):
        to = "F32" if values.ndim == 1 or name.endswith(KEPT_FLOAT32) else kind
        quantization = getattr(gguf.GGMLQuantizationType, to)
        writer.add_tensor(name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, architecture: Architecture, gating: Any) -> None:
    writer.add_context_length(architecture.max_positions)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_block_count(architecture.num_layers)
    writer.add_feed_forward_length(architecture.expert_width)
    writer.add_expert_feed_forward_length(architecture.expert_width)
    writer.add_head_count(architecture.num_heads)
    writer.add_head_count_kv(architecture.num_kv_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_dimension_count(architecture.rotary_dim)
    writer.add_rope_freq_base(architecture.rope_theta)
    writer.add_expert_count(architecture.num_experts)
    writer.add_expert_used_count(architecture.top_k)
    writer.add_expert_gating_func(gating)


def _write_tokenizer(writer: Any, folder: Path, architecture: Architecture) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = read_json(folder, "config.json")
    texts = {token: text for text, token in content["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    vocabulary = [special.get(token) or texts.get(token) or f"[PAD{token}]" for token in range(architecture.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(vocabulary)
    writer.add_token_types([CONTROL if token in special or token not in texts else NORMAL for token in range(architecture.vocab_size)])
    writer.add_token_merges([entry if isinstance(entry, str) else " ".join(entry) for entry in content["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def tensors(folder: Path, architecture: Architecture) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every tensor by its name in GGUF, in float32, block scales multiplied in."""
    weights = dequantized(folder, architecture)
    for name, to in WHOLE.items():
        yield to, weights[name].numpy()
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}."
        for name, to in PARTS.items():
            yield f"blk.{layer}.{to}", weights[prefix + name].numpy()
        for name, to in EXPERTS.items():
            experts = [weights[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] for expert in range(architecture.num_experts)]
            yield f"blk.{layer}.{to}", torch.stack(experts).numpy()


def dequantized(folder: Path, architecture: Architecture) -> dict[str, Tensor]:
    """Every weight in float32."""
    scalar, block = architecture.scalar_scales, architecture.quantization_block
    checkpoint, suffix = open_checkpoint(folder, functools.partial(respelled, scalar=scalar)), scale_suffix(scalar)
    found = {name: tensor.float() for name, tensor in checkpoint.tensors(checkpoint.headers)}
    for name in [name for name in found if name.endswith(suffix) and name.removesuffix(suffix) in found]:
        assert block is not None
        weight, scale = name.removesuffix(suffix), found.pop(name)
        if scalar:
            found[weight] *= scale
            continue
        rows, columns = found[weight].shape
        spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        found[weight] *= spread
    return found
