"""Every bound on what a client may send, as types that are checked when a body is read.

The same types make the OpenAPI document, so that what it says is what holds. Numbers that the engine bounds too have its bounds.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from pointsman.request import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOPS, MAX_TOP_K
from pointsman.update import MAX_VERSION_LENGTH

MAX_BODY_BYTES = 16 << 20
MAX_MESSAGES = 8192
MAX_PARTS = 1024
MAX_TOOLS = 512
MAX_TOOL_CALLS = 128
MAX_PROMPTS = 1024
MAX_ANSWERS = 1024
MAX_DEPTH = 64
MAX_NAME = 256
MAX_TEMPLATE_VARIABLES = 64
MAX_TOKENS = 1 << 30
MAX_COUNTED_TOKENS = 1 << 17
MAX_UPDATE_BYTES = 1 << 31
MAX_FILES = 64
MAX_TENSORS = 1 << 17
MAX_INTEGER = (1 << 63) - 1

Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
TokenCount = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Meta(max_length=MAX_BODY_BYTES)]
Top = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
StartLength = Annotated[int, Meta(ge=-1, le=MAX_TOKENS)]
TopK = Annotated[int, Meta(ge=-1, le=MAX_TOP_K)]
TopP = Annotated[float, Meta(gt=0, le=1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=10)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[dict[Annotated[str, Meta(pattern="^[0-9]{1,10}$")], Bias], Meta(max_length=MAX_LOGIT_BIAS)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
StopTokens = Annotated[list[TokenId], Meta(max_length=MAX_STOPS)]
Priority = Annotated[int, Meta(ge=-(1 << 31), le=1 << 31)]
Salt = Annotated[str, Meta(max_length=256)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
RequestName = Annotated[str, Meta(min_length=1, max_length=128)]
Shape = Annotated[list[Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(max_length=8)]
ModelPath = Annotated[str, Meta(min_length=1, max_length=4096)]
WeightVersion = Annotated[str, Meta(min_length=1, max_length=MAX_VERSION_LENGTH)]
FunctionName = Annotated[str, Meta(pattern="^[A-Za-z0-9_.:/-]{1,128}$")]


def too_deep(value: Any, limit: int = MAX_DEPTH) -> bool:
    """Whether a JSON value has lists and objects in more levels than this."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(too_deep(entry, limit - 1) for entry in inner if isinstance(entry, dict | list))
