"""What routing as data costs beside the step: counting the load of experts, and gathering the rows of an answer at its end.

    python benchmarks/routing.py

Best of many runs, in microseconds, for the shapes of the bundled checkpoint and of MiniMax-M2.5.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from pointsman.moe.capture import RouteStore
from pointsman.moe.load import ExpertLoad

SHAPES = {"bundled": (6, 16, 4), "MiniMax-M2.5": (62, 256, 8)}
SLOTS = 16384
STEPS = 256
ROWS = (1, 8, 64, 512)
ANSWER = 512
RUNS = 30


def microseconds(run: Callable[[], None]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def main() -> None:
    figures = {}
    for name, (num_layers, num_experts, top_k) in SHAPES.items():
        routes = RouteStore(SLOTS, num_layers, top_k, num_experts)
        routes.rows_SLK.random_(0, num_experts)
        load = ExpertLoad(routes, num_experts)
        for num_rows in ROWS:
            steps = [np.random.randint(0, SLOTS, num_rows) for _ in range(STEPS)]

            def count(steps: list[np.ndarray] = steps, load: ExpertLoad = load) -> None:
                for slots in steps:
                    load.before_step()
                    load.after_step(slots)
                load.counts_LE()

            cost = microseconds(count) / STEPS
            figures[f"{name}: count a step of {num_rows} rows"] = round(cost, 2)
        slots = np.arange(ANSWER)
        figures[f"{name}: gather {ANSWER} rows"] = round(microseconds(lambda: routes.gather(slots)), 2)  # noqa: B023
    for name, cost in figures.items():
        print(f"{name:<45}{cost:9.2f} us")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
