"""Muon for the stacked matrices, AdamW for everything else, one learning-rate factor for both."""

import torch
from torch import Tensor, nn


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """Quintic Newton-Schulz towards the nearest orthogonal matrix, batched over the leading axis (Jordan 2024)."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised per matrix."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, momentum: float = 0.95, decay: float = 0.05):
        self.parameters, self.rate, self.momentum, self.decay = parameters, rate, momentum, decay
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        rate = self.rate * factor
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            gradient = parameter.grad
            buffer.lerp_(gradient, 1 - self.momentum)
            update = gradient.lerp(buffer, self.momentum)
            rows, columns = update.shape[-2:]
            update = orthogonal(update.reshape(-1, rows, columns)).view_as(parameter)
            parameter.mul_(1 - rate * self.decay).add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)


def adam_groups(model) -> list[dict]:
    """Learning rates of what Muon does not train."""
    return [
        {"params": [model.embed], "lr": 0.01},
        {"params": [model.head], "lr": 0.003},
        {"params": [model.gate], "lr": 0.002},
        {"params": [model.attention_norm, model.expert_norm, model.q_norm, model.k_norm, model.norm], "lr": 0.003},
    ]


class Optimizer:
    def __init__(self, model, muon_rate: float = 0.02):
        self.muon = Muon(model.matrices(), muon_rate)
        self.adam = torch.optim.AdamW(adam_groups(model), betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=model.embed.is_cuda)
        self.rates = [group["lr"] for group in self.adam.param_groups]

    def step(self, factor: float) -> None:
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.adam.step()
        self.muon.step(factor)
        self.adam.zero_grad(set_to_none=True)
        for parameter in self.muon.parameters:
            parameter.grad = None
