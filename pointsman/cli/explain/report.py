"""An engine's plan for people, as tables, and for programs, as one object; both from the same numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pointsman.engine.device_models import DeviceModel, Figure
from pointsman.engine.floor import Floor
from pointsman.engine.memory import kv_dtype_of
from pointsman.engine.plan import Plan
from pointsman.models.sharding import describe_split

UNITS = {
    "memory": "memory, bytes",
    "read": "reading, bytes a second",
    "fp8": "FP8 products, operations a second",
    "plain": "other products, operations a second",
    "cache": "last cache, bytes",
    "cached_read": "reading what is in it, bytes a second",
    "link": "to other devices, bytes a second",
    "reduce_seconds": "the shortest sum over ranks, seconds",
}
MANY = 16  # the batch that the verdict tells of, where it is asked about
MOST_PARTS = 4  # of a step's time that have a column


@dataclass(frozen=True, kw_only=True)
class Report:
    """A plan, and what follows from it.

    Attributes:
        floors: of decode steps, with `context` tokens a sequence.
        prefill: least seconds of a prompt of `context` tokens.
        remedies: what to change where it does not run.
    """

    plan: Plan
    model: DeviceModel
    context: int
    floors: list[Floor]
    prefill: float
    remedies: list[str]

    def verdict(self) -> str:
        """The answer in a sentence or two."""
        plan = self.plan
        if plan.cache is None or plan.refusals:
            return f"{plan.words} does not run: {'; '.join(plan.refusals)}."
        floor = next((floor for floor in self.floors if floor.num_tokens == MANY), self.floors[0])
        return (
            f"{plan.words} runs: {_gib(plan.weight_bytes)} of weights and {_gib(plan.cache.num_bytes)} of cache for "
            f"{plan.cache.num_tokens:,} tokens a rank. A step in which {floor.num_tokens} decode takes at least "
            f"{1000 * floor.total_seconds:.3g} ms: {floor.tokens_per_second:,.0f} tokens a second at best."
        )

    def sharding(self) -> list[str]:
        """What a rank holds, in lines."""
        shard = self.plan.shard
        return describe_split(shard.architecture, shard.tp, shard.ep)

    def as_object(self) -> dict[str, Any]:
        """All of it, in bytes, seconds and tokens a second."""
        plan = self.plan
        return {
            "model": plan.shard.architecture.name,
            "device": _device(self.model),
            "runs": not plan.refusals,
            "verdict": self.verdict(),
            "refusals": list(plan.refusals),
            "would_run": self.remedies,
            "sharding": {"tp": plan.shard.tp, "ep": plan.shard.ep, "rank": self.sharding()},
            "dtype": plan.choices.dtype,
            "kv_cache_dtype": kv_dtype_of(plan.config),
            "choices": {
                name: {"wanted": choice.wanted, "chosen": choice.chosen, "candidates": dict(choice.reasons)}
                for name, choice in plan.all_choices.items()
            },
            "notes": plan.notes,
            "memory": self._memory(),
            "floor": {
                "context": self.context,
                "decode": [_floor(floor) for floor in self.floors],
                "prefill": {"seconds": self.prefill, "tokens_per_second": self.context / self.prefill},
            },
        }

    def _memory(self) -> dict[str, Any]:
        plan, cache = self.plan, self.plan.cache
        return {
            "weights": {kind: size.num_bytes for kind, size in plan.weights.items()},
            "weights_again": plan.forms,
            "beside": plan.beside,
            "token": plan.token,
            "cache": None if cache is None else {"tokens": cache.num_tokens, "pages": cache.num_pages, "bytes": cache.num_bytes},
            "context_length": plan.context_length,
        }

    def show(self, console: Console) -> None:
        """Print it for a person."""
        plan = self.plan
        lines = [self.verdict()]
        if self.remedies:
            lines += ["It would run with:", *(f"  {remedy}" for remedy in self.remedies)]
        lines += ["", "Of several ranks each holds", *(f"  {line}" for line in self.sharding())] if plan.shard.tp > 1 else []
        prefill = f"A prompt of {self.context:,} tokens alone takes at least {1000 * self.prefill:.3g} ms: "
        for line in [*lines, ""]:
            _print(console, line)
        console.print(_memory_table(plan))
        console.print(_choices_table(plan))
        for line in [*plan.notes, ""]:
            _print(console, line)
        console.print(_floors_table(self.floors, self.context))
        _print(console, f"{prefill}{self.context / self.prefill:,.0f} tokens a second.\n")
        for name, figure in _figures(self.model).items():
            _print(console, f"{UNITS[name]}: {figure.value:.4g} ({figure.source})")


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False)


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of a rank", title_justify="left", caption_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for kind, size in sorted(plan.weights.items(), key=lambda item: -item[1].num_bytes):
        table.add_row(f"weights: {kind}", f"{size.num_bytes / 2**30:.3f}")
    for form, number in plan.forms.items():
        table.add_row(f"the same weights, {form}", f"{number / 2**30:.3f}")
    for part, number in plan.beside.items():
        table.add_row(part, f"{number / 2**30:.3f}")
    num_tokens = 0 if plan.cache is None else plan.cache.num_tokens
    for part, number in plan.token.items():
        table.add_row(f"cache: {part}, {number:,} bytes a token", f"{num_tokens * number / 2**30:.3f}")
    table.caption = f"{num_tokens:,} tokens fit; a request has up to {plan.context_length:,}"
    if plan.cache is None:
        table.caption = (
            f"a request has up to {plan.context_length:,} tokens: {_gib(sum(plan.token.values()) * plan.context_length)} of cache"
        )
    return table


def _choices_table(plan: Plan) -> Table:
    table = Table(title="Choices", title_justify="left")
    for name in ("operation", "chosen", "the others"):
        table.add_column(name, overflow="fold")
    for name, choice in plan.all_choices.items():
        others = [f"{key}: {why or 'it could, too'}" for key, why in choice.reasons.items() if key != choice.chosen]
        table.add_row(name, choice.chosen or "refused", Text("\n".join(others)))
    return table


def _floors_table(floors: list[Floor], context: int) -> Table:
    table = Table(title=f"Least time of a decode step in ms, and of its parts; {context:,} tokens a sequence", title_justify="left")
    parts = sorted(floors[-1].seconds, key=lambda part: -floors[-1].seconds[part])[:MOST_PARTS]
    for name in ("batch", "experts hit", "GB", "ms", *parts, "tokens/s"):
        table.add_column(name, justify="right")
    for floor in floors:
        row = [f"{floor.num_tokens}", f"{floor.experts_hit:.1f}", f"{floor.total_bytes / 1e9:.3g}", f"{1000 * floor.total_seconds:.3g}"]
        row += [f"{1000 * floor.seconds[part]:.3g}" for part in parts]
        table.add_row(*row, f"{floor.tokens_per_second:,.0f}")
    return table


def _floor(floor: Floor) -> dict[str, Any]:
    return {
        "batch": floor.num_tokens,
        "experts_hit": floor.experts_hit,
        "bytes": floor.total_bytes,
        "seconds": floor.total_seconds,
        "tokens_per_second": floor.tokens_per_second,
        "parts": dict(floor.seconds),
    }


def _device(model: DeviceModel) -> dict[str, Any]:
    device = model.device
    figures = {name: figure._asdict() for name, figure in _figures(model).items()}
    return {"name": model.name, "type": device.type, "capability": device.capability, "processors": model.num_processors} | figures


def _figures(model: DeviceModel) -> dict[str, Figure]:
    named = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return {name: figure for name, figure in named.items() if isinstance(figure, Figure)}


def _gib(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"
