"""The MiniMax-M2 architecture in a form that trains fast on one GPU, in the numerics it will be served in.

B rows of L tokens are one flat axis T = B * L. All layers of one kind of weight are stacked (`[layers, ...]`), every expert is computed
for every token (two dense products, the unchosen weighted by 0: cheap at this size), and weights and activations pass through FP8
with straight-through gradients, so that the export rounds nothing the training has not seen.
"""

import inspect
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

BLOCK = 128
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Shape:
    """The sizes of the checkpoint."""

    vocab: int = 3072
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 32
    experts: int = 16
    top_k: int = 4
    expert_width: int = 128
    eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position: int = 2048

    def asdict(self) -> dict:
        return asdict(self)


def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """[..., N, K] to e4m3 and one fp32 scale per 128x128 block, [..., N/128, K/128]."""
    *lead, n, k = w.shape
    blocks = w.float().reshape(*lead, n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scale = (blocks.abs().amax((-3, -1), keepdim=True) / E4M3_MAX).clamp_min(1e-12)
    return (blocks / scale).to(torch.float8_e4m3fn).reshape(w.shape), scale.squeeze(-1).squeeze(-2)


def dequantize_blocks(q: Tensor, scale: Tensor) -> Tensor:
    """The inverse, in fp32."""
    *lead, n, k = q.shape
    blocks = q.float().reshape(*lead, n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    return (blocks * scale[..., :, None, :, None]).reshape(q.shape)


def rounded_weight(w: Tensor) -> Tensor:
    """A weight as served, bf16 of its FP8 blocks; the gradient passes straight through."""
    with torch.no_grad():
        served = dequantize_blocks(*quantize_blocks(w))
    return (w + (served - w).detach()).bfloat16()


def rounded_activation(x: Tensor) -> Tensor:
    """bf16 activations rounded to e4m3 per token and 128 channels; the gradient passes straight through."""
    with torch.no_grad():
        groups = x.float().unflatten(-1, (-1, BLOCK))
        scale = (groups.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
        served = ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)
    return x + (served - x).detach()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    return weight.to(x.dtype) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """NeoX rotary on the first channels of every head."""
    width = cos_TR.shape[-1]
    a, b, rest = x_THD.split((width, width, x_THD.shape[-1] - 2 * width), -1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def varlen_attention():
    """Causal attention within each document, flat [T, heads, dim], on the GPU; the options follow the installed torch."""
    known = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known
    if grouped:
        options["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        if not grouped:
            k, v = k.repeat_interleave(q.shape[1] // k.shape[1], 1), v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)

    return attend


def masked_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """The same with a dense mask per row of `longest` tokens, anywhere."""
    tokens = q.shape[0]
    rows = tokens // longest
    document = torch.bucketize(torch.arange(tokens, device=q.device), cu_seqlens, right=True).view(rows, longest)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    q, k, v = (t.view(rows, longest, t.shape[1], -1).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Batch:
    """Packed documents: flat tokens, positions in their document, where documents start, and the loss weight of the next token."""

    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    weights_T: Tensor
    longest: int


class Model(nn.Module):
    def __init__(self, shape: Shape, attend=masked_attention):
        super().__init__()
        self.shape, self.attend, self.exact = shape, attend, False
        s, n = shape, shape.layers
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim

        def matrix(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*sizes).uniform_(-1, 1) * math.sqrt(3 / sizes[-1]) * 0.7)

        self.q_proj, self.kv_proj = matrix(n, q, s.hidden), matrix(n, 2, kv, s.hidden)
        self.o_proj = nn.Parameter(torch.zeros(n, s.hidden, q))
        self.up_proj = matrix(n, s.experts, 2, s.expert_width, s.hidden)
        self.down_proj = nn.Parameter(torch.zeros(n, s.experts, s.hidden, s.expert_width))
        self.gate = nn.Parameter(torch.randn(n, s.experts, s.hidden) * 0.03)
        self.embed = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.5)
        self.head = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.005)
        self.attention_norm, self.expert_norm = nn.Parameter(torch.ones(n, s.hidden)), nn.Parameter(torch.ones(n, s.hidden))
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(n, q)), nn.Parameter(torch.ones(n, kv))
        self.norm = nn.Parameter(torch.ones(s.hidden))
        self.register_buffer("bias", torch.zeros(n, s.experts))

    def matrices(self) -> list[nn.Parameter]:
        """The stacked matrices that Muon trains."""
        return [self.q_proj, self.kv_proj, self.o_proj, self.up_proj, self.down_proj]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states after the last norm [T, D], and how many tokens each layer sent to each expert [layers, E]."""
        s = self.shape
        weigh = (lambda w: w.bfloat16()) if self.exact else rounded_weight
        weights = [weigh(w).unbind(0) for w in self.matrices()]
        small = [w.unbind(0) for w in (self.attention_norm, self.expert_norm, self.q_norm, self.k_norm, self.gate, self.bias)]
        inverse = 1.0 / s.rope_theta ** (torch.arange(0, s.rotary_dim, 2, device=self.embed.device).float() / s.rotary_dim)
        angles = batch.positions_T[:, None].float() * inverse
        rotary = angles.cos().bfloat16(), angles.sin().bfloat16()
        x_TD = self.embed.bfloat16()[batch.tokens_T]
        real_T = batch.tokens_T != 0
        loads = []
        for (q, kv, o, up, down), (norm_1, norm_2, q_norm, k_norm, gate, bias) in zip(
            zip(*weights, strict=True), zip(*small, strict=True), strict=True
        ):
            x_TD = x_TD + self.attention(rms_norm(x_TD, norm_1, s.eps), q, kv, o, q_norm, k_norm, rotary, batch)
            y_TD, chosen_TE = self.moe(rms_norm(x_TD, norm_2, s.eps), up, down, gate, bias)
            x_TD = x_TD + y_TD
            loads.append((chosen_TE & real_T[:, None]).sum(0))
        return rms_norm(x_TD, self.norm, s.eps), torch.stack(loads)

    def attention(self, h_TD: Tensor, q: Tensor, kv: Tensor, o: Tensor, q_norm: Tensor, k_norm: Tensor, rotary, batch: Batch) -> Tensor:
        s = self.shape
        h_TD = self.activation(h_TD)
        q_THD = rms_norm(h_TD @ q.T, q_norm, s.eps).unflatten(-1, (s.heads, s.head_dim))
        k_THD = rms_norm(h_TD @ kv[0].T, k_norm, s.eps).unflatten(-1, (s.kv_heads, s.head_dim))
        v_THD = (h_TD @ kv[1].T).unflatten(-1, (s.kv_heads, s.head_dim))
        out = self.attend(rotate(q_THD, *rotary), rotate(k_THD, *rotary), v_THD, batch.cu_seqlens, batch.longest)
        return self.activation(out.flatten(1)) @ o.T

    def moe(self, h_TD: Tensor, up: Tensor, down: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Sigmoid scores; the bias chooses, ties to the lower id; the chosen scores are normalised to 1."""
        s = self.shape
        scores_TE = torch.sigmoid(h_TD.float() @ gate.T)
        with torch.no_grad():
            keys = scores_TE + bias
            ids = torch.arange(s.experts, device=keys.device)
            ahead = (keys[:, None, :] > keys[:, :, None]) | ((keys[:, None, :] == keys[:, :, None]) & (ids[None, :] < ids[:, None]))
            chosen_TE = ahead.sum(-1) < s.top_k
        share_TE = torch.where(chosen_TE, scores_TE, 0.0)
        share_TE = share_TE / share_TE.sum(-1, keepdim=True)
        gate_up = (self.activation(h_TD) @ up.flatten(0, 2).T).unflatten(-1, (s.experts, 2, s.expert_width))
        inner = (F.silu(gate_up[:, :, 0].float()) * gate_up[:, :, 1].float()).bfloat16()
        inner = self.activation(inner) * share_TE[:, :, None].bfloat16()
        return inner.flatten(1) @ down.transpose(1, 2).flatten(0, 1), chosen_TE

    def activation(self, x: Tensor) -> Tensor:
        return x if self.exact else rounded_activation(x)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted mean cross-entropy of the next tokens, and the loads."""
        hidden_TD, loads = self(batch)
        logits_TV = (hidden_TD @ self.head.bfloat16().T).float()
        targets_T = torch.cat((batch.tokens_T[1:], batch.tokens_T[:1]))
        each_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
        return (each_T * batch.weights_T).sum() / batch.weights_T.sum(), loads
