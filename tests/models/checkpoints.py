"""Small random checkpoints in the published form, and what stands in for the engine: pages in random order, rows as told.

Weights are drawn so that a random model is lively: activations keep their size from layer to layer, the router is wide, the bias
matters, norms are not all one. All plain weights are exact in bfloat16, gate and bias are float32 as published.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from pointsman.kernels.reference import Span, quantize_weight
from pointsman.layers.context import StepContext
from pointsman.layers.paged_kv import PagedKV
from pointsman.models.decoder import Decoder
from pointsman.moe.capture import RouteStore


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a test model; `block` makes it FP8, and so does `scalar`, the activation scheme of one with one scale a matrix."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 8
    experts: int = 8
    top_k: int = 2
    width: int = 24
    vocab: int = 97
    block: tuple[int, int] | None = None
    scalar: Literal["dynamic", "static"] | None = None

    @property
    def fp8(self) -> bool:
        return self.block is not None or self.scalar is not None

    def config(self) -> dict:
        """config.json as published."""
        config = {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "attn_type_list": [1] * self.layers,
            "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "max_position_embeddings": 512,
            "model_type": "minimax_m2",
            "mtp_transformer_layers": 1,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "num_mtp_modules": 3,
            "qk_norm_type": "per_layer",
            "rms_norm_eps": 1e-06,
            "rope_theta": 5000000,
            "rotary_dim": self.rotary_dim,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.46.1",
            "use_cache": True,
            "use_mtp": True,
            "use_qk_norm": True,
            "use_routing_bias": True,
            "vocab_size": self.vocab,
        }
        if self.block is not None:
            config["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "float8_e4m3fn",
                "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
                "quant_method": "fp8",
                "weight_block_size": list(self.block),
            }
        if self.scalar is not None:
            left = ["lm_head", *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(self.layers))]
            config["quantization_config"] = {"activation_scheme": self.scalar, "ignored_layers": left, "quant_method": "fp8"}
        return config

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Every tensor by its published name."""
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}

        def normal(*size: int, std: float) -> Tensor:
            return torch.randn(size, generator=generator) * std

        def plain(name: str, value: Tensor) -> None:
            tensors[name] = value.to(torch.bfloat16)

        def matrix(name: str, rows: int, columns: int) -> None:
            value = normal(rows, columns, std=columns**-0.5)
            if self.scalar is not None:
                weight = quantize_weight(value, (rows, columns))
                tensors[name], tensors[name + "_scale"] = weight.data, weight.scale.reshape(())
                if self.scalar == "static":
                    tensors[name.removesuffix("weight") + "input_scale"] = 0.01 + 0.01 * torch.rand((), generator=generator)
                return None
            if self.block is None:
                return plain(name, value)
            weight = quantize_weight(value, self.block)
            tensors[name], tensors[name + "_scale_inv"] = weight.data, weight.scale

        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        plain("model.embed_tokens.weight", normal(self.vocab, self.hidden, std=1.0))
        plain("lm_head.weight", normal(self.vocab, self.hidden, std=self.hidden**-0.5))
        plain("model.norm.weight", 1 + normal(self.hidden, std=0.1))
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                plain(f"{at}{name}.weight", 1 + normal(self.hidden, std=0.1))
            for name, rows, columns in (("q", q, self.hidden), ("k", kv, self.hidden), ("v", kv, self.hidden), ("o", self.hidden, q)):
                matrix(f"{at}self_attn.{name}_proj.weight", rows, columns)
            plain(f"{at}self_attn.q_norm.weight", 1.5 + normal(q, std=0.2))
            plain(f"{at}self_attn.k_norm.weight", 1.5 + normal(kv, std=0.2))
            moe = f"{at}block_sparse_moe."
            tensors[moe + "gate.weight"] = normal(self.experts, self.hidden, std=2 * self.hidden**-0.5)
            tensors[moe + "e_score_correction_bias"] = normal(self.experts, std=0.1)
            for expert in range(self.experts):
                for name, rows, columns in (
                    ("w1", self.width, self.hidden),
                    ("w3", self.width, self.hidden),
                    ("w2", self.hidden, self.width),
                ):
                    matrix(f"{moe}experts.{expert}.{name}.weight", rows, columns)
        return tensors

    def write(self, folder: Path, *, seed: int = 0, shards: int = 1) -> Path:
        """Write config.json and the weights, in shards with an index if more than one."""
        write(folder, self.config(), self.tensors(seed), shards=shards)
        return folder


def write(folder: Path, config: dict, tensors: dict[str, Tensor], *, shards: int = 1) -> None:
    """Write a checkpoint's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        index |= dict.fromkeys(names[shard::shards], file)
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def dequantized(tensors: dict[str, Tensor], block: tuple[int, int] | None) -> dict[str, Tensor]:
    """Every weight as exact float32, by a loop that shares nothing with ours."""
    exact: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("_scale_inv", "_scale")):
            continue
        exact[name] = tensor.float()
        if name + "_scale" in tensors:
            exact[name] *= tensors[name + "_scale"].float()
        if name + "_scale_inv" in tensors:
            assert block is not None
            scale = tensors[name + "_scale_inv"]
            for row in range(scale.shape[0]):
                for column in range(scale.shape[1]):
                    rows = slice(row * block[0], (row + 1) * block[0])
                    exact[name][rows, column * block[1] : (column + 1) * block[1]] *= scale[row, column]
    return exact


class Harness:
    """Runs a decoder as an engine would, with sequences in lanes and pages in random order, in memory poisoned with NaN."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        lanes: int = 4,
        page_size: int = 4,
        max_tokens: int = 96,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        architecture = decoder.architecture
        pages = -(-max_tokens // page_size)
        order = torch.randperm(lanes * pages, generator=torch.Generator().manual_seed(seed))
        self.decoder, self.page_size = decoder, page_size
        self.page_table_LP = order.view(lanes, pages)
        self.kv = PagedKV.allocate(
            num_layers=architecture.num_layers,
            num_pages=lanes * pages,
            num_kv_heads=decoder.attention_shape.num_kv_heads,
            page_size=page_size,
            head_dim=architecture.head_dim,
            dtype=dtype,
        )
        for memory in (self.kv.k, self.kv.v):
            memory.view(torch.uint8).fill_(0x7F) if dtype.itemsize == 1 else memory.fill_(float("nan"))
        self.routes = RouteStore(self.kv.num_slots, len(architecture.expert_layers), architecture.top_k, architecture.num_experts)
        self.length = [0] * lanes

    def slots(self, lane: int, start: int, length: int) -> Tensor:
        positions = torch.arange(start, start + length)
        return self.page_table_LP[lane][positions // self.page_size] * self.page_size + positions % self.page_size

    def step(self, feed: dict[int, list[int]], replay_TNK: Tensor | None = None) -> dict[int, Tensor]:
        """Feed tokens to lanes in one step; logits of every row, by lane."""
        segments, positions, slots, tokens = [], [], [], []
        for lane, ids in feed.items():
            segments.append(Span(lane, len(tokens), len(ids)))
            tokens += ids
            positions.append(torch.arange(self.length[lane], self.length[lane] + len(ids)))
            slots.append(self.slots(lane, self.length[lane], len(ids)))
            self.length[lane] += len(ids)
        ctx = StepContext(
            positions_T=torch.cat(positions),
            slots_T=torch.cat(slots),
            attention_plan=self.decoder.plan_attention(segments, len(tokens)),
            page_table_LP=self.page_table_LP,
            kv=self.kv,
            routes=self.routes,
            replay_TNK=replay_TNK,
        )
        logits = self.decoder.forward(torch.tensor(tokens), ctx, torch.arange(len(tokens)))
        return {span.lane: logits[span.start : span.start + span.length] for span in segments}

    def greedy(self, lane: int, prompt: list[int], count: int) -> list[int]:
        """The prompt in one step, then token by token."""
        ids = [int(self.step({lane: prompt})[lane][-1].argmax())]
        while len(ids) < count:
            ids.append(int(self.step({lane: ids[-1:]})[lane][-1].argmax()))
        return ids
