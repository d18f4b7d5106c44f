"""The compiled step against Hugging Face's MiniMax-M2 in float32: greedy decoding, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from pointsman.kernels.cpu_pack import Matrix
from pointsman.kernels.cpu_step import CpuCache, CpuStep, LayerWeights, ModelShape, pack_weights

SHAPE = ModelShape(
    vocab=211, hidden=96, layers=3, heads=6, kv_heads=2, head_dim=32, rotary_dim=16, experts=10, top_k=3, width=48, epsilon=1e-6
)
NEW_TOKENS = 64


def peer() -> Any:
    torch.manual_seed(0)
    config = MiniMaxM2Config(
        vocab_size=SHAPE.vocab,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.width,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        rotary_dim=SHAPE.rotary_dim,
        num_local_experts=SHAPE.experts,
        num_experts_per_tok=SHAPE.top_k,
        rms_norm_eps=SHAPE.epsilon,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = MiniMaxM2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(1 + 0.2 * torch.randn_like(tensor) if "norm" in name else torch.randn_like(tensor) * 1.5 / tensor.shape[-1] ** 0.5)
        for layer in model.model.layers:
            layer.mlp.e_score_correction_bias.copy_(0.05 * torch.randn(SHAPE.experts))
    return model


def array(tensor: torch.Tensor) -> Any:
    return tensor.detach().float().numpy()


def packed(model: Any) -> Any:
    def layer(source: Any) -> LayerWeights:
        attention, experts = source.self_attn, source.mlp.experts
        return LayerWeights(
            input_norm=array(source.input_layernorm.weight),
            qkv=Matrix(np.concatenate([array(getattr(attention, f"{part}_proj").weight) for part in "qkv"])),
            q_norm=array(attention.q_norm.weight),
            k_norm=array(attention.k_norm.weight),
            o=Matrix(array(attention.o_proj.weight)),
            post_norm=array(source.post_attention_layernorm.weight),
            gate=array(source.mlp.gate.weight),
            bias=array(source.mlp.e_score_correction_bias),
            experts=[(Matrix(array(experts.gate_up_proj[e])), Matrix(array(experts.down_proj[e]))) for e in range(SHAPE.experts)],
        )

    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(128)[None])
    return pack_weights(
        SHAPE,
        embed=array(model.model.embed_tokens.weight),
        layers=map(layer, model.model.layers),
        final_norm=array(model.model.norm.weight),
        head=Matrix(array(model.lm_head.weight)),
        cos=array(cos)[0, :, : SHAPE.rotary_dim // 2],
        sin=array(sin)[0, :, : SHAPE.rotary_dim // 2],
    )


def test_greedy_tokens_are_the_same() -> None:
    """64 tokens of two sequences, decoded side by side; the logits on the way within 2e-4 of sizes up to 10."""
    model = peer()
    size = (SHAPE.layers, 20, SHAPE.kv_heads, 16, SHAPE.head_dim)
    routes = np.zeros((320, SHAPE.layers, SHAPE.top_k), np.uint8)
    table = np.random.default_rng(0).permutation(20).astype(np.int32).reshape(2, 10)
    cache = CpuCache(np.zeros(size, np.float32), np.zeros(size, np.float32), routes, np.zeros(320, np.int16), table)
    step = CpuStep(SHAPE, packed(model), cache, max_rows=32, num_threads=2)
    prompts = np.random.default_rng(1).integers(0, SHAPE.vocab, (2, 14))
    positions, lanes = np.tile(np.arange(14), 2), np.repeat([0, 1], 14)
    logits = [step.run(prompts.reshape(-1), positions, lanes, [13, 27]).copy()]
    for position in range(14, 14 + NEW_TOKENS - 1):
        logits.append(step.run(logits[-1].argmax(1), [position] * 2, [0, 1], [0, 1]).copy())
    tokens = np.concatenate([prompts, np.stack([row.argmax(1) for row in logits], axis=1)], axis=1)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)).logits[:, 13:-1].numpy()
    np.testing.assert_allclose(np.stack(logits, axis=1), expected, rtol=0, atol=2e-4)
    assert (expected.argmax(-1) == tokens[:, 14:]).all()
    assert len(np.unique(tokens[:, 14:])) > 16
