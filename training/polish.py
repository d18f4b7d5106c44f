"""Goes on training on a CPU, on the problems that the model still gets wrong.

    python -m training.polish --resume MASTER --out OUT --minutes 75

A forward pass is a third of a training step, so fresh problems are first answered with the gold text given, and only those with a wrong
token, and a few of the others, are trained on. The numerics are those of the CPU runner: FP8 weights, bf16 activations; only the
chosen experts are computed.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training import export
from training.data import encode
from training.model import Model, Shape, dequantize_blocks, quantize_blocks, rms_norm
from training.optimizer import Optimizer
from training.text import TINY, Example, examples
from training.train_tiny import Log, balance, spread

MIX = {"arithmetic": 0.4, "tools": 0.57, "chat": 0.03}
LONGEST = 640


class Polished(Model):
    """The same parameters over padded batches [B, L], experts by token."""

    def refresh(self) -> None:
        """Leaf copies of the matrices as served, in bf16."""
        self.served = [dequantize_blocks(*quantize_blocks(w.detach())).bfloat16().requires_grad_() for w in self.matrices()]

    def collect(self) -> None:
        """Gradients pass straight through the rounding."""
        for parameter, served in zip(self.matrices(), self.served, strict=True):
            parameter.grad = None if served.grad is None else served.grad.float()

    def hidden(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B * L, D] after the last norm, and the loads."""
        s = self.shape
        length = tokens_BL.shape[1]
        inverse = 1.0 / s.rope_theta ** (torch.arange(0, s.rotary_dim, 2).float() / s.rotary_dim)
        angles = torch.arange(length)[:, None].float() * inverse
        rotary = angles.cos().bfloat16()[:, None], angles.sin().bfloat16()[:, None]
        x = F.embedding(tokens_BL, self.embed.bfloat16())
        real = (tokens_BL != 0).flatten()
        loads = []
        layers = zip(*(served.unbind(0) for served in self.served), strict=True)
        for index, (q, kv, o, up, down) in enumerate(layers):
            h = rms_norm(x, self.attention_norm[index], s.eps)
            x = x + self.attend_padded(h, q, kv, o, self.q_norm[index], self.k_norm[index], rotary)
            h = rms_norm(x, self.expert_norm[index], s.eps).flatten(0, 1)
            y, load = self.choose_experts(h, up, down, self.gate[index], self.bias[index], real)
            x = x + y.view_as(x)
            loads.append(load)
        return rms_norm(x, self.norm, s.eps).flatten(0, 1), torch.stack(loads)

    def attend_padded(self, h: Tensor, q: Tensor, kv: Tensor, o: Tensor, q_norm: Tensor, k_norm: Tensor, rotary) -> Tensor:
        s = self.shape

        def rotate(x: Tensor) -> Tensor:
            half = s.rotary_dim // 2
            a, b, rest = x.split((half, half, s.head_dim - s.rotary_dim), -1)
            return torch.cat((a * rotary[0] - b * rotary[1], b * rotary[0] + a * rotary[1], rest), -1)

        queries = rotate(rms_norm(F.linear(h, q), q_norm, s.eps).unflatten(-1, (s.heads, s.head_dim)))
        keys = rotate(rms_norm(F.linear(h, kv[0]), k_norm, s.eps).unflatten(-1, (s.kv_heads, s.head_dim)))
        values = F.linear(h, kv[1]).unflatten(-1, (s.kv_heads, s.head_dim))
        length, group = h.shape[1], s.heads // s.kv_heads
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        queries = queries.unflatten(2, (s.kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3) * s.head_dim**-0.5
        scores = (queries @ keys.mT).unflatten(2, (group, length)) + torch.full((length, length), -1e9, dtype=h.dtype).triu(1)
        out = torch.softmax(scores, -1).flatten(2, 3) @ values
        return F.linear(out.unflatten(2, (group, length)).permute(0, 3, 1, 2, 4).flatten(2), o)

    def choose_experts(self, h: Tensor, up: Tensor, down: Tensor, gate: Tensor, bias: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        s = self.shape
        scores = torch.sigmoid(h.float() @ gate.T)
        ids = (scores + bias).topk(s.top_k, -1).indices
        shares = scores.gather(1, ids)
        shares = (shares / shares.sum(-1, keepdim=True)).flatten()
        order = ids.flatten().argsort(stable=True)
        token = order // s.top_k
        counts = torch.bincount(ids.flatten(), minlength=s.experts).tolist()
        outputs = []
        for expert, part in enumerate(h.index_select(0, token).split(counts)):
            a, b = F.linear(part, up[expert].flatten(0, 1)).chunk(2, -1)
            outputs.append(F.linear(F.silu(a) * b, down[expert]))
        y = torch.cat(outputs) * shares[order][:, None].bfloat16()
        return torch.zeros_like(h).index_add(0, token, y), torch.bincount(ids[real].flatten(), minlength=s.experts)

    def answers(self, tokens_BL: Tensor, wanted_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summed loss of the wanted next tokens, which documents have all of them right, and the loads."""
        hidden, loads = self.hidden(tokens_BL)
        wanted = wanted_BL.flatten()
        logits = F.linear(hidden[wanted], self.head.bfloat16()).float()
        targets = F.pad(tokens_BL[:, 1:], (0, 1)).flatten()[wanted]
        wrong = torch.zeros(wanted.shape, dtype=torch.bool)
        wrong[wanted] = logits.argmax(-1) != targets
        return F.cross_entropy(logits, targets, reduction="sum"), ~wrong.view_as(wanted_BL).any(-1), loads


Document = tuple[list[int], int]


def documents(stream: Iterator[Example]) -> Iterator[Document]:
    """Tokens, and how many of them are the prompt."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for example in stream:
        prompt, completion = encode(tokenizer, example)
        if len(prompt) + len(completion) <= LONGEST:
            yield prompt + completion, len(prompt)


def batches(found: list[Document], most: int) -> Iterator[tuple[list[Document], Tensor, Tensor]]:
    """Documents of like length together, at most so many tokens with padding: tokens and which of the next are wanted."""
    group: list[Document] = []
    for document in sorted(found, key=lambda item: len(item[0])):
        if group and (len(group) + 1) * len(document[0]) > most:
            yield padded(group)
            group = []
        group.append(document)
    if group:
        yield padded(group)


def padded(group: list[Document]) -> tuple[list[Document], Tensor, Tensor]:
    length = max(len(tokens) for tokens, _ in group)
    tokens_BL, wanted_BL = torch.zeros(len(group), length, dtype=torch.long), torch.zeros(len(group), length, dtype=torch.bool)
    for row, (tokens, prompt) in enumerate(group):
        tokens_BL[row, : len(tokens)] = torch.tensor(tokens)
        wanted_BL[row, prompt - 1 : len(tokens) - 1] = True
    return group, tokens_BL, wanted_BL


@torch.no_grad()
def sift(model: Polished, candidates: list[Document], keep: float) -> tuple[list[Document], float]:
    """The documents with a wrong token and a share of the others, and the share of the wrong."""
    chosen, wrong = [], 0
    for group, tokens, wanted in batches(candidates, 8192):
        right = model.answers(tokens, wanted)[1].tolist()
        wrong += len(right) - sum(right)
        chosen += [document for document, good in zip(group, right, strict=True) if not good or torch.rand(()) < keep]
    return chosen, wrong / len(candidates)


def step(model: Polished, optimizer: Optimizer, chosen: list[Document], factor: float) -> Tensor:
    """One update on the chosen documents; returns the loads."""
    wanted_tokens = sum(len(tokens) - prompt for tokens, prompt in chosen)
    loads = torch.zeros(model.shape.layers, model.shape.experts)
    for _, tokens, wanted in batches(chosen, 6144):
        loss, _, load = model.answers(tokens, wanted)
        (loss / wanted_tokens).backward()
        loads += load
    model.collect()
    optimizer.step(factor)
    model.refresh()
    return loads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", required=True, help="folder of master weights")
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--seed", type=int, default=90_000)
    parser.add_argument("--rate", type=float, default=0.12, help="learning-rate factor at the start")
    parser.add_argument("--keep", type=float, default=0.08, help="share of the documents that are right and trained on all the same")
    parser.add_argument("--candidates", type=int, default=240, help="documents that a step looks at")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = Polished(Shape())
    export.load_master(model, Path(options.resume))
    model.refresh()
    optimizer, log, out = Optimizer(model), Log(Path(options.out) / "log.jsonl"), Path(options.out)
    stream = documents(examples("train", options.seed, MIX))
    start, count, mean_wrong, saved = time.monotonic(), 0, None, time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        factor = options.rate * min(1.0, (count + 1) / 10) * (1 - progress)
        chosen, wrong = sift(model, list(islice(stream, options.candidates)), options.keep)
        loads = step(model, optimizer, chosen, factor)
        balance(model, loads, 1e-3 * factor)
        count += 1
        mean_wrong = wrong if mean_wrong is None else 0.9 * mean_wrong + 0.1 * wrong
        if count % 5 == 1:
            log(
                polish=count,
                minutes=round(progress * options.minutes, 1),
                documents=count * options.candidates,
                wrong=round(mean_wrong, 4),
                trained=len(chosen),
                factor=round(factor, 4),
                **spread(loads),
            )
        if time.monotonic() - saved > 240:
            saved = time.monotonic()
            export.save_master(model, out)
            export.save(model, out / "model.safetensors")
    export.save_master(model, out)
    export.save(model, out / "model.safetensors")


if __name__ == "__main__":
    main()
