"""Which replica takes a request, against a simulator that compares prefixes token by token and looks at everything each time."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.scheduler.placement import Placed, Placement

WEIGHT = 3


@dataclass
class Replica:
    """Prefixes that were sent there, the latest use last, and the requests that have not ended: tokens to compute, and whether they are."""

    most: int
    prefixes: list[tuple[object, tuple[int, ...]]] = field(default_factory=list)
    requests: dict[int, tuple[int, bool]] = field(default_factory=dict)


class Simulator:
    """The rule, word by word."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.replicas: dict[int, Replica] = {}

    def place(self, request: int, tokens: list[int], salt: object) -> int | None:
        prefixes = [(salt, tuple(tokens[:end])) for end in range(self.block, len(tokens) + 1, self.block)]
        costs = []
        for number, replica in self.replicas.items():
            cached = 0
            while cached < len(prefixes) and prefixes[cached] in replica.prefixes:
                cached += 1
            missing = max(1, len(tokens) - cached * self.block)
            waiting = sum(left for left, waits in replica.requests.values() if waits)
            costs.append((missing + waiting + WEIGHT * len(replica.requests), len(replica.requests), number, missing))
        if not costs:
            return None
        _, _, number, missing = min(costs)
        replica = self.replicas[number]
        for prefix in reversed(prefixes):
            if prefix in replica.prefixes:
                replica.prefixes.remove(prefix)
            replica.prefixes.append(prefix)
        del replica.prefixes[: max(0, len(replica.prefixes) - replica.most)]
        replica.requests[request] = missing, True
        return number


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_places_are_those_of_the_simulator(data: st.DataObject) -> None:
    """Prompts of two tokens, so that many begin alike; replicas come and go, requests end in any order, some twice computed."""
    block = data.draw(st.integers(1, 4))
    placement, simulator = Placement(block=block, request_tokens=WEIGHT), Simulator(block)
    placed: dict[int, Placed] = {}
    for request in range(data.draw(st.integers(1, 30))):
        absent = [number for number in range(4) if number not in simulator.replicas]
        match data.draw(st.sampled_from(["place"] * 6 + ["computed", "end", "join", "leave", "forget"])):
            case "join" if absent:
                number, tokens = data.draw(st.sampled_from(absent)), data.draw(st.integers(0, 12))
                placement.join(number, tokens)
                simulator.replicas[number] = Replica(max(tokens // block, 1))
            case "leave":
                number = data.draw(st.integers(0, 4))  # also one that is not there
                placement.leave(number)
                simulator.replicas.pop(number, None)
            case "forget":
                placement.forget()
                for replica in simulator.replicas.values():
                    replica.prefixes.clear()
            case "computed" if placed:
                which = data.draw(st.sampled_from(sorted(placed)))
                placed[which].computed()
                for replica in simulator.replicas.values():
                    if which in replica.requests:
                        replica.requests[which] = replica.requests[which][0], False
            case "end" if placed:
                which = data.draw(st.sampled_from(sorted(placed)))
                placed.pop(which).end()
                for replica in simulator.replicas.values():
                    replica.requests.pop(which, None)
            case _:
                tokens = data.draw(st.lists(st.integers(1, 2), max_size=16))
                salt = data.draw(st.sampled_from(["", "a"]))
                found = placement.place(tokens, salt)
                assert (None if found is None else found.replica) == simulator.place(request, tokens, salt)
                if found is not None:
                    placed[request] = found
        assert placement.replicas == sorted(simulator.replicas)
        assert placement.num_blocks == sum(len(replica.prefixes) for replica in simulator.replicas.values())
        for number, replica in simulator.replicas.items():
            assert placement.num_requests(number) == len(replica.requests) and len(replica.prefixes) <= replica.most


def test_who_left_is_not_sent_anything_and_comes_back_empty() -> None:
    placement = Placement(block=2, request_tokens=1)
    assert placement.place([1, 2, 3]) is None
    placement.join(0, 64)
    placement.join(1, 64)
    first = placement.place([1] * 20)
    assert first is not None and first.replica == 0
    placement.leave(0)
    second = placement.place([1] * 20)
    assert second is not None and (second.replica, second.num_missing) == (1, 20)
    placement.join(0, 64)
    first.end()  # it was lost with the replica before
    assert [placement.num_requests(number) for number in (0, 1, 7)] == [0, 1, 0]


def test_a_prefix_outweighs_as_many_requests_as_it_is_worth() -> None:
    """40 shared tokens at 10 a request: up to 4 requests more than elsewhere, and not one beyond."""
    placement = Placement(block=4, request_tokens=10)
    placement.join(0, 1000)
    placement.join(1, 1000)
    shared = list(range(40))
    homes = []
    for number in range(12):
        placed = placement.place([*shared, 100 + number])
        assert placed is not None
        placed.computed()
        homes.append(placed.replica)
        assert placement.num_requests(0) - placement.num_requests(1) <= 4
    assert homes[:5] == [0] * 4 + [1]


def test_without_prefixes_requests_are_spread_evenly() -> None:
    placement = Placement(block=16, request_tokens=128)
    for replica in range(3):
        placement.join(replica, 1000)
    placed = [placement.place([number] * 50) for number in range(1, 31)]
    assert [placement.num_requests(replica) for replica in range(3)] == [10, 10, 10]
    for one in placed:
        assert one is not None
        one.end()
    assert [placement.num_requests(replica) for replica in range(3)] == [0, 0, 0]
