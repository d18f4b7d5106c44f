"""A layer's experts with random weights, and the time of work on it as a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pointsman.kernels.tiles import Shape
from pointsman.kernels.weight import FP8, Weight
from pointsman.moe.routing import RoutingSpec
from pointsman.moe.spec import ExpertForm
from pointsman.moe.weights import ExpertWeights

RUNS = 12
WARM_UPS = 2


@dataclass(frozen=True, eq=False)
class Layer:
    """Gate and experts of a shape."""

    shape: Shape
    gate_ED: Tensor
    bias_E: Tensor
    experts: ExpertWeights

    @property
    def spec(self) -> RoutingSpec:
        return RoutingSpec(num_experts=self.shape.num_experts, top_k=self.shape.top_k, score="sigmoid")

    @property
    def form(self) -> ExpertForm:
        return ExpertForm(self.shape.hidden, self.shape.width, (128, 128) if self.shape.quantized else None)

    @classmethod
    def draw(cls, shape: Shape, device: torch.device, seed: int) -> Layer:
        """Random weights: numbers as a normal distribution has them, not zeros and not NaN, so that power and errors are real."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        def stack(rows: int, columns: int, parts: tuple[int, ...]) -> Weight:
            size = (shape.num_experts, rows, columns)
            if not shape.quantized:
                plain = torch.empty(size, dtype=torch.bfloat16, device=device)
                for expert in range(shape.num_experts):
                    plain[expert] = normal(rows, columns) * columns**-0.5
                return Weight(plain, parts=parts)
            data = torch.empty(size, dtype=torch.uint8, device=device)
            for expert in range(shape.num_experts):
                data[expert] = (normal(rows, columns) * 100).clamp(-448, 448).to(FP8).view(torch.uint8)
            scale = torch.rand(shape.num_experts, rows // 128, columns // 128, generator=generator, device=device)
            return Weight(data.view(FP8), (scale + 0.5) * (0.01 * columns**-0.5), parts=parts)

        width = shape.width
        experts = ExpertWeights(stack(2 * width, shape.hidden, (width, width)), stack(shape.hidden, width, ()))
        return cls(shape, normal(shape.num_experts, shape.hidden) * shape.hidden**-0.5, normal(shape.num_experts) * 0.01, experts)


def time_graph(work: Callable[[], Any]) -> float:
    """Seconds of one run of the work, captured as a CUDA graph: the median of many replays."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    times: list[float] = []
    for index in range(RUNS + WARM_UPS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= WARM_UPS:
            times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)
