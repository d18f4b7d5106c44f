"""The decoder that all models share: embedding, layers of attention and experts, norm, head.

One forward takes the flat rows of a step, decode and prefill alike, and returns logits of the rows that ask for them. It is
written layer by layer in torch; a step compiled as one region computes the same from the same `parameters`, and this is its
oracle.

Of several ranks each runs this over its part of the weights. Between ranks go, in a layer, what attention and what the experts add
(`layers.norm`) and the sums of squares of a norm over all heads (`layers.attention`); before the layers, the embedding; after them, the
logits. The hidden state that is normed is the same on all ranks to the last bit, hence so is the choice of experts.

Shape suffixes: T rows, D hidden, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.kernels.apart import apart
from pointsman.kernels.candidates import AttentionShape
from pointsman.kernels.unsummed import Unsummed, summed
from pointsman.layers.attention import Attention, NormedTogether, Rotation
from pointsman.layers.context import Span, StepContext
from pointsman.layers.linear import Embedding, Head, Linear
from pointsman.layers.mlp import MLP
from pointsman.layers.moe import MoE
from pointsman.layers.norm import RMSNorm
from pointsman.models.backends import Backends
from pointsman.models.choices import attention_shape, reason_against_capture
from pointsman.models.parameters import LayerParameters, Mlp, Parameters
from pointsman.models.sharding import Shard

ALONE = Mesh.single()


class DecoderLayer:
    """x + attention(norm(x)), then x + experts(norm(x)) and what all tokens take: a dense layer has that alone."""

    def __init__(self, index: int, parameters: LayerParameters, shard: Shard, backends: Backends, dtype: torch.dtype, mesh: Mesh) -> None:
        architecture, epsilon = shard.architecture, shard.architecture.norm_epsilon
        self.attention_norm = RMSNorm(parameters.attention_norm_D, epsilon, backends.glue, mesh)
        self.attention = Attention(
            index,
            qkv=Linear(parameters.qkv, backends.linear, dtype, parameters.qkv_bias_N),
            o=Linear(parameters.o, backends.linear, dtype),
            q_weight=parameters.q_norm_Q,
            k_weight=parameters.k_norm_W,
            epsilon=epsilon,
            head_dim=architecture.head_dim,
            implementation=backends.attention,
            glue=backends.glue,
            together=_norm_together(shard, mesh),
        )
        self.expert_norm = RMSNorm(parameters.expert_norm_D, epsilon, backends.glue, mesh)
        self.moe: MoE | None = None
        if (experts := parameters.experts) is not None:
            assert parameters.gate_ED is not None
            number, spec = architecture.expert_layers.index(index), architecture.routing
            own = shard.experts if shard.ep > 1 else None
            self.moe = MoE(number, parameters.gate_ED, parameters.bias_E, experts, spec, backends.router, backends.moe, dtype, own)
        pair = parameters.shared if parameters.dense is None else parameters.dense
        # a rank may have no block of a narrow one
        self.mlp = None if pair is None or not pair.down.data.numel() else _mlp(pair, backends, dtype)

    def parts(self) -> Iterator[Linear | MoE]:
        """What has weights in an implementation's form."""
        yield from (self.attention.qkv, self.attention.o)
        if self.moe is not None:
            yield self.moe
        if self.mlp is not None:
            yield from (self.mlp.gate_up, self.mlp.down)

    def __call__(
        self, x_TD: Tensor, delta_TD: Tensor | Unsummed | None, rotation: Rotation, ctx: StepContext
    ) -> tuple[Tensor, Tensor | Unsummed]:
        """Takes and gives the hidden state as a sum not yet made: who norms it next adds it up in the same breath."""
        x_TD, normed = self.attention_norm(x_TD, delta_TD, quantize=self.attention.qkv.takes_quantized)
        attended_TD = self.attention(normed, rotation, ctx)
        if self.moe is None:
            if self.mlp is None:
                x_TD, normed = self.expert_norm(x_TD, attended_TD)
                return x_TD, torch.zeros_like(x_TD)
            x_TD, normed = self.expert_norm(x_TD, attended_TD, quantize=self.mlp.gate_up.takes_quantized)
            return x_TD, self.mlp(normed)
        x_TD, normed = self.expert_norm(x_TD, attended_TD)
        chosen_TD = self.moe(normed, ctx)
        return x_TD, chosen_TD if self.mlp is None else summed(chosen_TD) + self.mlp(normed)


def _mlp(pair: Mlp, backends: Backends, dtype: torch.dtype) -> MLP:
    return MLP(Linear(pair.gate_up, backends.linear, dtype), Linear(pair.down, backends.linear, dtype), backends.glue)


class Decoder:
    """A model that runs steps, or one rank's part of it.

    Attributes:
        architecture: the model's sizes and numbers.
        shard: the part of it that is here.
        parameters: the weights of that, as the checkpoint has them.
        dtype: what it computes in; bfloat16 rounds activations between operations.
    """

    def __init__(self, shard: Shard, parameters: Parameters, backends: Backends, dtype: torch.dtype, mesh: Mesh = ALONE) -> None:
        assert (shard.tp, shard.ep, shard.rank) == (mesh.tp, mesh.ep, mesh.rank)
        self.architecture = architecture = shard.architecture
        self.shard, self.mesh = shard, mesh
        self.parameters = parameters
        self.backends = backends
        self.dtype = dtype
        self.embedding = Embedding(parameters.embed_VD, dtype, mesh, shard.ranges["vocab"].start)
        self.layers = [DecoderLayer(index, layer, shard, backends, dtype, mesh) for index, layer in enumerate(parameters.layers)]
        self.norm = RMSNorm(parameters.norm_D, architecture.norm_epsilon, backends.glue, mesh)
        self.head = Head(parameters.head, backends.linear, dtype, mesh, shard.vocab_sizes)

    @property
    def device(self) -> torch.device:
        return self.parameters.embed_VD.device

    def prepare(self) -> None:
        """Make every implementation's own form of its weights now rather than at first use."""
        with apart(self.device):
            for part in self._parts():
                part.prepare()

    def release(self) -> None:
        """Drop those forms, when another step serves in this one's place."""
        for part in self._parts():
            part.release()

    def _parts(self) -> Iterator[Linear | MoE]:
        yield self.head
        for layer in self.layers:
            yield from layer.parts()

    @property
    def attention_shape(self) -> AttentionShape:
        """Of the heads that are here."""
        return attention_shape(self.shard)

    def plan_attention(self, spans: Sequence[Span], num_rows: int) -> Any:
        """The attention plan of a step whose rows are these runs of lanes' tokens."""
        plan = self.backends.attention.plan
        assert plan is not None, "a planner plans the steps of this attention"
        return plan(spans, num_rows, self.attention_shape, self.device)

    def reason_against_capture(self) -> str | None:
        """Why a step over this model cannot be a CUDA graph, or None."""
        return reason_against_capture(self.device.type, self.backends.moe.name, reads_host=self.backends.attention.reads_host)

    def forward(self, tokens_T: Tensor, ctx: StepContext, rows_R: Tensor) -> Tensor:
        """Run one step: store its keys, values and routing, and return logits [R, V] of the rows asked for, in its dtype."""
        x_TD, delta_TD = self.hidden(tokens_T, ctx)
        return self.logits(x_TD[rows_R], None if delta_TD is None else delta_TD[rows_R])

    def hidden(self, tokens_T: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor | None]:
        """What the layers make of the rows, in two parts [T, D] yet to be summed, the second of them over the ranks as well; keys, values
        and routing are stored on the way."""
        rotation = Rotation.at(ctx.positions_T, self.architecture.rotary_dim, self.architecture.rope_theta)
        x_TD, delta_TD = self.embedding(tokens_T), None
        for layer in self.layers:
            x_TD, delta_TD = layer(x_TD, delta_TD, rotation, ctx)
        return x_TD, None if delta_TD is None else summed(delta_TD)

    def logits(self, x_RD: Tensor, delta_RD: Tensor | None) -> Tensor:
        """Logits [R, V] of rows that have been through the layers, in its dtype: what is exact in bfloat16 is gathered and kept as that."""
        _, normed_RD = self.norm(x_RD, delta_RD)
        return self.head(normed_RD)


def _norm_together(shard: Shard, mesh: Mesh) -> NormedTogether | None:
    architecture = shard.architecture
    if shard.whole or architecture.qk_norm != "all":
        return None
    heads, kv_heads = architecture.num_heads, architecture.num_kv_heads
    even = heads % shard.tp == 0 and (kv_heads % shard.tp == 0 or shard.tp % kv_heads == 0)
    return NormedTogether(architecture.sizes["q"], architecture.sizes["kv"], shard.owns_kv_heads, even, mesh)
