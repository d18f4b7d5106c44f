"""One rank's share of a change that all ranks make or none: made ready, and undone where another rank could not."""

from __future__ import annotations

from pointsman.distributed import Group
from pointsman.engine.orders import FromBefore, FromDisk, FromFiles, FromGroup, JoinGroup, LeaveGroup, Work
from pointsman.engine.weights import Fresh, Weights


def prepare(weights: Weights, work: Work, number: int) -> Fresh | None:
    """Make ready what rank `number` needs for it. Raises ValueError where it cannot be had."""
    match work:
        case FromDisk():
            return weights.from_disk(work.model_path)
        case FromFiles():
            return weights.from_files(work.files, work.update)
        case FromGroup():
            return weights.from_group(work.announced, work.group_name, work.update)
        case FromBefore():
            return weights.restore(work.tags)
        case JoinGroup():
            weights.join_group(
                Group(
                    master_address=work.master_address,
                    master_port=work.master_port,
                    rank=work.rank + number,
                    world_size=work.world_size,
                    name=work.name,
                    backend=work.backend,
                    timeout=work.timeout,
                )
            )
        case LeaveGroup():
            weights.leave_group(work.name)
    return None


def undo(weights: Weights, work: Work) -> None:
    """Have it as it was before this was made ready here. What is in force has not changed."""
    match work:
        case FromFiles():
            weights.give_up()
        case FromGroup():
            weights.give_up()
            weights.leave_group(work.group_name)
        case FromBefore():
            weights.release(work.tags)
        case JoinGroup():
            weights.leave_group(work.name)
