"""A plan as a picture: what fills the memory of each rank, and what the least time of a decode step is made of."""

from __future__ import annotations

from pointsman.bench.plot import Bars, Line, Panel, chart
from pointsman.engine.device_models import DeviceModel
from pointsman.engine.floor import Floor
from pointsman.engine.plan import Plan
from pointsman.models.sharding import Shard
from pointsman.models.sizes import described

SMALL = 0.02  # of a rank's weights; kinds with less are drawn as one
TINY = 0.05  # of a device's memory: less would not be seen beside all of it
MOST_PARTS = 4  # of a step's time that have a line


def picture(plan: Plan, model: DeviceModel, floors: list[Floor], context: int) -> str:
    """An SVG document."""
    ranks = range(plan.shard.tp)
    rows = [(f"rank {rank}" if plan.shard.tp > 1 else plan.device_name, _memory(plan, rank)) for rank in ranks]
    whole = model.memory.value / 2**30
    memory = Bars(
        title="Memory of each rank",
        x="GiB",
        rows=rows,
        limit=(f"{plan.device_name} has {whole:.1f}", whole) if sum(rows[0][1].values()) > TINY * whole else None,
    )
    parts = sorted(floors[-1].seconds, key=lambda part: -floors[-1].seconds[part])[:MOST_PARTS]
    lines = [Line(name="the whole step", points=[(floor.num_tokens, 1000 * floor.total_seconds) for floor in floors])]
    lines += [Line(name=part, points=[(floor.num_tokens, 1000 * floor.seconds[part]) for floor in floors]) for part in parts]
    title = "Least time of a decode step"
    floor = Panel(title=title, x=f"sequences of {context:,} tokens", y="ms", lines=lines, logarithmic=True)
    return chart([memory, floor])


def _memory(plan: Plan, rank: int) -> dict[str, float]:
    """GiB by part, the largest kinds of weights first."""
    shard = Shard(plan.shard.architecture, plan.shard.tp, plan.shard.ep, rank)
    weights = {kind: size.num_bytes for kind, size in described(shard).items()}
    least = SMALL * sum(weights.values())
    found = {kind: float(number) for kind, number in sorted(weights.items(), key=lambda item: -item[1]) if number >= least}
    found["other weights"] = float(sum(number for number in weights.values() if number < least))
    found |= {"the weights again": float(sum(plan.forms.values())), "what a step works in": float(sum(plan.beside.values()))}
    if plan.cache is not None:
        found |= {part: float(plan.cache.num_tokens * number) for part, number in plan.token.items()}
    return {part: number / 2**30 for part, number in found.items() if number}
