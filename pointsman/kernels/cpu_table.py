"""What compiled code and Python share: a table of 64-bit words, whose fields have names and types.

A step needs some ninety numbers and addresses. Python writes them once into one int64 array; compiled code reads them as
attributes (cpu_record). A field is "int", "float" (a float32), an address written as the element type and a star, or a record of its own,
in place. This module has no part in compiling, so that loading a compiled step does not import a compiler.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointsman.kernels.cpu_pack import FORMS

Fields = dict[str, Any]

# Words of the control block, each on a cache line of its own. A step's sizes have two places, for even and odd steps, so that a
# thread that comes late to a step can tell by the number of steps whether what it read was still that step's.
STEPS, WORK, UNDONE, SLEEPERS, STOPPED, THREADS, NUM_ROWS, NUM_LOGITS, NUM_GROUPS = range(0, 72, 8)
CONTROL_WORDS = 72

# The word of work is the phase's number and, in its low bits, the items not yet taken.
ITEM_BITS = 20
MOST_ITEMS = (1 << ITEM_BITS) - 1

# With at most this many rows, whoever ends the phase before does the row phases of all of them on the spot.
ALONE = 2
# Positions that attention scores at a time, and queries that it takes together if they are of several rows.
ATTENTION_BLOCK = 256
QUERIES = 16

INTS = """
    num_threads max_rows hidden hidden_stride layers heads kv_heads head_dim head_stride half_rotary experts expert_stride top_k
    width_stride vocab logits_stride qkv_stride attended_stride num_pages page_size max_pages num_lanes max_positions
    embed_bfloat16 wide_routes norms_all norms_each softmax renormalize biased routed_layers most_matrices most_queries
    panel_size pipe_in pipe_out
"""
FLOATS = "epsilon routing_scale lift_attention lift_experts lift_head cache_lift"
WEIGHTS = "input_norm post_norm qkv_bias q_norm k_norm final_norm bias cos sin embed32"
BUFFERS = """
    x h scores weights queries turned qkv_out attended projected activations outputs logits tile
    key_panel lifts scratch_scores sums highest weight
"""
NUMBERS = """
    control tokens positions lanes slots forced logit_rows wanted counting chosen starts pairs sources active groups members places
    route_of choices_of first_of matrices_of
"""


def linear_fields(form: str) -> Fields:
    """A stack of packed matrices."""
    return {"values": f"{FORMS[form]}*", "scales": "float32*"} | dict.fromkeys(("panels", "inputs", "block", "blocks"), "int")


def step_fields(attention: str, experts: str, head: str, cache: str) -> Fields:
    """All that a step reads and writes, for the stored forms of attention weights, experts, head, and keys and values."""
    fields: Fields = {}
    for names, kind in ((INTS, "int"), (FLOATS, "float"), (WEIGHTS, "float32*"), (BUFFERS, "float32*"), (NUMBERS, "int64*")):
        fields |= dict.fromkeys(names.split(), kind)
    fields |= {"page_table": "int32*", "embed16": "uint16*", "routes16": "uint16*", "routes8": "uint8*", "alike": "int16*"}
    fields |= {"cache_k": f"{FORMS[cache]}*", "cache_v": f"{FORMS[cache]}*"}
    forms = {"qkv": attention, "o": attention, "gate": "float32", "gate_up": experts, "down": experts, "head": head}
    return fields | {name: linear_fields(form) for name, form in forms.items()}


def table(fields: Fields, values: Mapping[str, Any]) -> NDArray[np.int64]:
    """The table of a record: arrays give their address (and must outlive it), mappings are inner records."""
    return np.fromiter(_words(fields, values), np.int64)


def _words(fields: Fields, values: Mapping[str, Any]) -> Iterator[int]:
    assert values.keys() == fields.keys(), values.keys() ^ fields.keys()
    for name, kind in fields.items():
        value = values[name]
        if isinstance(kind, dict):
            yield from _words(kind, value)
        elif kind == "int":
            yield int(value)
        elif kind == "float":
            yield struct.unpack("<i", struct.pack("<f", value))[0]
        else:
            assert value.flags.c_contiguous and f"{value.dtype}*" == kind, (name, value.dtype, kind)
            yield value.ctypes.data
