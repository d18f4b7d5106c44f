"""Random decoders, and the same model once more as plain numpy in float64, written from the description of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pointsman.kernels.cpu_pack import Matrix
from pointsman.kernels.cpu_step import CpuCache, CpuStep, CpuWeights, LayerWeights, ModelShape, pack_weights, pieces

Floats = NDArray[np.float64]

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}


def stored(values: NDArray[np.float32], form: str) -> tuple[NDArray[np.generic], Floats]:
    """The values rounded to a stored form: its bits, and what they stand for."""
    rounded = torch.from_numpy(values).to(KV_DTYPES[form])
    bits = {"float32": torch.float32, "bfloat16": torch.uint16, "e4m3": torch.uint8}[form]
    return rounded.view(bits).numpy(), rounded.double().numpy()


@dataclass
class Layer:
    """One layer in float64, as the oracle multiplies."""

    packed: LayerWeights
    qkv: Floats
    o: Floats
    gate_up: list[Floats]
    down: list[Floats]
    common: tuple[Floats, Floats] | None


class Model:
    """A random model of a shape; `block` is that of e4m3 matrices."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        attention: str = "e4m3",
        experts: str = "e4m3",
        head: str = "bfloat16",
        block: tuple[int, int] = (128, 128),
        seed: int = 0,
        bias: float | None = 0.02,
        max_positions: int = 512,
        shared_width: int = 0,
        dense_width: int = 0,
    ) -> None:
        self.shape, self.block, self.generator = shape, block, np.random.default_rng(seed)
        half = shape.rotary_dim // 2
        angles = np.arange(max_positions)[:, None] * 10000.0 ** (-np.arange(half) / max(half, 1))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        embed = self.normal(shape.vocab, shape.hidden)
        self.embed_bits, self.embed = stored(embed, head if head != "e4m3" else "bfloat16")
        self.head_matrix, self.head = self.matrix((shape.vocab,), shape.hidden, head)
        self.final_norm = 1 + 0.2 * self.normal(shape.hidden)
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.layers = []
        for number in range(shape.layers):
            dense = number in shape.dense_layers
            num_experts, common_width = (0, dense_width) if dense else (shape.experts, shared_width)
            qkv, qkv_values = self.matrix((q, kv, kv), shape.hidden, attention)
            o, o_values = self.matrix((shape.hidden,), q, attention)
            gate_up = [self.matrix((shape.width, shape.width), shape.hidden, experts) for _ in range(num_experts)]
            down = [self.matrix((shape.hidden,), shape.width, experts) for _ in range(num_experts)]
            common = self.pair(common_width, experts) if common_width else None
            packed = LayerWeights(
                input_norm=1 + 0.2 * self.normal(shape.hidden),
                qkv=qkv,
                q_norm=self.norm(q),
                k_norm=self.norm(kv),
                o=o,
                post_norm=1 + 0.2 * self.normal(shape.hidden),
                gate=None if dense else self.normal(shape.experts, shape.hidden) * np.float32(2 / shape.hidden**0.5),
                bias=None if bias is None or dense else np.float32(bias) * self.normal(shape.experts),
                experts=[(a[0], b[0]) for a, b in zip(gate_up, down, strict=True)]
                + ([] if common is None else pieces(common[0][0], common[1][0], shape.width)),
                qkv_bias=0.3 * self.normal(q + 2 * kv) if shape.biased else None,
            )
            self.layers.append(
                Layer(packed, qkv_values, o_values, [a[1] for a in gate_up], [b[1] for b in down], common and (common[0][1], common[1][1]))
            )

    def normal(self, *size: int) -> NDArray[np.float32]:
        return self.generator.standard_normal(size).astype(np.float32)

    def pair(self, width: int, form: str) -> tuple[tuple[Matrix, Floats], tuple[Matrix, Floats]]:
        """Gate and up joined, and down."""
        return self.matrix((width, width), self.shape.hidden, form), self.matrix((self.shape.hidden,), width, form)

    def norm(self, width: int) -> NDArray[np.float32] | None:
        """The weights of a norm of q or k, which are so wide together."""
        if self.shape.qk_norm is None:
            return None
        return 1 + 0.2 * self.normal(width if self.shape.qk_norm == "all" else self.shape.head_dim)

    def matrix(self, parts: tuple[int, ...], inputs: int, form: str) -> tuple[Matrix, Floats]:
        """A random matrix as stored, and its values."""
        if form != "e4m3":
            bits, values = stored(self.normal(sum(parts), inputs) / np.float32(inputs**0.5), form)
            return Matrix(bits), values
        bits, values = stored(np.clip(self.normal(sum(parts), inputs) * 60, -448, 448), "e4m3")
        rows, columns = self.block
        scales = np.float32(0.016 / inputs**0.5) * (
            0.5 + self.generator.random((sum(-(-part // rows) for part in parts), -(-inputs // columns)), dtype=np.float32)
        )
        first, spread = 0, []
        for part in parts:
            height = -(-part // rows)
            spread.append(np.repeat(scales[first : first + height], rows, axis=0)[:part])
            first += height
        wide = np.repeat(np.concatenate(spread).astype(np.float64), columns, axis=1)[:, :inputs]
        return Matrix(bits, scales, self.block, parts), values * wide

    @staticmethod
    def decode(codes: NDArray[np.generic]) -> Floats:
        return torch.from_numpy(np.ascontiguousarray(codes)).view(torch.float8_e4m3fn).double().numpy()

    def weights(self) -> CpuWeights:
        return pack_weights(
            self.shape,
            embed=self.embed_bits,
            layers=(layer.packed for layer in self.layers),
            final_norm=self.final_norm,
            head=self.head_matrix,
            cos=self.cos,
            sin=self.sin,
        )

    def step(
        self,
        cache: str = "bfloat16",
        *,
        lanes: int = 4,
        pages: int = 16,
        page_size: int = 16,
        max_rows: int = 64,
        num_threads: int = 2,
        seed: int = 1,
    ) -> tuple[CpuStep, CpuCache]:
        """A step over an empty cache, every lane with as many pages, in random order."""
        shape, generator = self.shape, np.random.default_rng(seed)
        dtype = {"float32": np.float32, "bfloat16": np.uint16, "e4m3": np.uint8}[cache]
        size = (shape.layers, lanes * pages, shape.kv_heads, page_size, shape.head_dim)
        k, v = (np.full(size, np.nan if cache == "float32" else 0x7F if cache == "e4m3" else 0x7FC0, dtype) for _ in range(2))
        routes = np.full(
            (lanes * pages * page_size, shape.routed_layers, shape.top_k), 251, np.uint8 if shape.experts <= 256 else np.uint16
        )
        alike = np.full(lanes * pages * page_size, -7, np.int16)
        table = generator.permutation(lanes * pages).astype(np.int32).reshape(lanes, pages)
        held = CpuCache(k, v, routes, alike, table)
        return CpuStep(shape, self.weights(), held, max_rows=max_rows, num_threads=num_threads), held

    def forward(
        self, tokens: NDArray[np.int64], cache: str = "bfloat16", forced: NDArray[np.integer[Any]] | None = None
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Logits [T, vocab] of one sequence, or of one with its experts given, and the router's choice [T, layers, top_k], best first."""
        x: Floats = self.embed[tokens]
        routes: list[NDArray[np.int64]] = []
        for layer in self.layers:
            x = x + self.attention(layer, rms(x, layer.packed.input_norm, self.shape.epsilon), cache)
            h = rms(x, layer.packed.post_norm, self.shape.epsilon)

            if layer.common is not None:
                x = x + pair_of(h, *layer.common)
            if layer.packed.gate is not None:
                given = None if forced is None else forced.astype(np.int64)[:, len(routes)]
                update, best = self.experts(layer, h, given)
                x = x + update
                routes.append(best)
        return rms(x, self.final_norm, self.shape.epsilon) @ self.head.T, np.stack(routes, axis=1)

    def attention(self, layer: Layer, h: Floats, cache: str) -> Floats:
        shape, length = self.shape, len(h)
        sizes = np.array([shape.heads, shape.kv_heads, shape.kv_heads]) * shape.head_dim
        q, k, v = np.split(h @ layer.qkv.T + (0 if layer.packed.qkv_bias is None else layer.packed.qkv_bias), np.cumsum(sizes)[:2], axis=1)
        q, k = self.turn(self.normed(q, layer.packed.q_norm)), self.turn(self.normed(k, layer.packed.k_norm))
        k = stored(k.astype(np.float32), cache)[1]
        v = stored(v.astype(np.float32).reshape(length, -1, shape.head_dim), cache)[1]
        repeat = shape.heads // shape.kv_heads
        scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, repeat, axis=1)) / shape.head_dim**0.5
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out: Floats = np.einsum("hqk,khd->qhd", p, np.repeat(v, repeat, axis=1)).reshape(length, -1) @ layer.o.T
        return out

    def normed(self, x: Floats, weight: NDArray[np.float32] | None) -> Floats:
        """Heads [T, H, C], normed all at once, each, or not."""
        heads = x.reshape(len(x), -1, self.shape.head_dim)
        if weight is None:
            return heads
        return (
            rms(x, weight, self.shape.epsilon).reshape(heads.shape)
            if self.shape.qk_norm == "all"
            else rms(heads, weight, self.shape.epsilon)
        )

    def turn(self, x: Floats) -> Floats:
        half = self.shape.rotary_dim // 2
        cos, sin = (table[: len(x), None, :].astype(np.float64) for table in (self.cos, self.sin))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    def experts(self, layer: Layer, h: Floats, given: NDArray[np.int64] | None) -> tuple[Floats, NDArray[np.int64]]:
        assert layer.packed.gate is not None
        logits = h @ layer.packed.gate.T.astype(np.float64)
        scores = 1 / (1 + np.exp(-logits))
        if self.shape.score == "softmax":
            powers = np.exp(logits - logits.max(1, keepdims=True))
            scores = powers / powers.sum(1, keepdims=True)
        best = np.argsort(-(scores if layer.packed.bias is None else scores + layer.packed.bias), axis=1, kind="stable")[
            :, : self.shape.top_k
        ]
        chosen = best if given is None else given
        weights = np.take_along_axis(scores, chosen, axis=1)
        if self.shape.renormalize:
            weights = weights / weights.sum(1, keepdims=True)
        weights = weights * self.shape.routing_scale
        out = np.zeros_like(h)
        for row in range(len(h)):
            for expert, weight in zip(chosen[row], weights[row], strict=True):
                gate, up = np.split(layer.gate_up[expert] @ h[row], 2)
                out[row] += weight * (layer.down[expert] @ (gate / (1 + np.exp(-gate)) * up))
        return out, best


def pair_of(h: Floats, gate_up: Floats, down: Floats) -> Floats:
    gate, up = np.split(h @ gate_up.T, 2, axis=1)
    out: Floats = (gate / (1 + np.exp(-gate)) * up) @ down.T
    return out


def rms(x: Floats, weight: NDArray[np.float32], epsilon: float) -> Floats:
    out: Floats = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight
    return out
