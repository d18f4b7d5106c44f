"""Whether the routing records that a server sent are whole: a row for every token that was fed, and no more."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pointsman.bench.serving.query import Outcome
from pointsman.routed_experts import decode_record

INT32_BYTES = 4


def check_routing(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many records came, what they weigh as sent, and what is wrong with those that are not as they should be."""
    faults: Counter[str] = Counter()
    size = missing = 0
    for outcome in outcomes:
        fault, lost = _fault(outcome)
        missing += lost
        size += _size(outcome.routing)
        if fault is not None:
            faults[fault] += 1
    tokens = sum((outcome.prompt_tokens or 0) + outcome.output_len for outcome in outcomes)
    return {
        "routing_records": len(outcomes) - sum(faults.values()),
        "routing_missing_rows": missing,
        "routing_bytes_per_token": size / tokens if tokens else 0.0,
        "routing_faults": dict(faults),
    }


def _size(routing: Any) -> int:
    data = routing.get("data") if isinstance(routing, dict) else routing
    return len(data) if isinstance(data, str) else 0


def _fault(outcome: Outcome) -> tuple[str | None, int]:
    """What is wrong with a record, or None; and how many of its rows are not known."""
    routing = outcome.routing
    if routing is None:
        return "no record came", 0
    fed = None if outcome.prompt_tokens is None else outcome.prompt_tokens + outcome.output_len - 1
    if isinstance(routing, str):
        try:
            size = len(base64.b64decode(routing, validate=True))
        except binascii.Error:
            return "the record is not base64", 0
        is_whole = size > 0 and (fed is None or size % (INT32_BYTES * fed) == 0)
        return None if is_whole else "the record has not the same number of values for every token", 0
    try:
        record = decode_record(routing)
    except (ValueError, TypeError, AttributeError) as error:
        return f"the record cannot be read: {error}", 0
    if fed is not None and record.num_rows != fed:
        return "the record has other rows than tokens were fed", 0
    return None, sum(end - start for start, end in record.missing)
