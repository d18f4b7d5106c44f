"""Records of cpu_table as numba sees them: a pointer whose attributes are loads.

As arguments, ninety numbers and addresses would make every compiled function a function of ninety arguments; as numpy arrays every
call would unbox and count references. `step.hidden` or `step.qkv.scales` is one load, typed by the field.
"""

# Numba types what it compiles, from calls; annotations would say nothing to it.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc, no-any-return"

from __future__ import annotations

import hashlib
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, lower_getattr_generic, models, register_model

from pointsman.kernels.cpu_table import Fields

WORD = ir.IntType(64)


class RecordType(types.Type):
    """A pointer to consecutive words, one for each field."""

    def __init__(self, fields: Fields) -> None:
        self.fields: dict[str, Any] = {}
        self.offsets: dict[str, int] = {}
        self.words = 0
        for name, kind in fields.items():
            self.fields[name] = _numba_type(kind)
            self.offsets[name] = self.words
            self.words += self.fields[name].words if isinstance(kind, dict) else 1
        super().__init__(name=f"Record{hashlib.sha256(str(fields).encode()).hexdigest()[:12]}")


def _numba_type(kind: Any) -> Any:
    if isinstance(kind, dict):
        return RecordType(kind)
    plain = {"int": types.int64, "float": types.float32}
    return plain[kind] if kind in plain else types.CPointer(getattr(types, kind.removesuffix("*")))


@register_model(RecordType)
class RecordModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, WORD.as_pointer())


@infer_getattr
class RecordAttribute(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, kind: RecordType, name: str) -> Any:
        return kind.fields.get(name)


@lower_getattr_generic(RecordType)
def _load_field(context: Any, builder: Any, kind: RecordType, base: Any, name: str) -> Any:
    field = kind.fields[name]
    place = builder.gep(base, [ir.Constant(WORD, kind.offsets[name])])
    if isinstance(field, RecordType):
        return place
    word = builder.load(place)
    if isinstance(field, types.CPointer):
        return builder.inttoptr(word, context.get_value_type(field))
    return builder.bitcast(builder.trunc(word, ir.IntType(32)), ir.FloatType()) if field == types.float32 else word


def reader(kind: RecordType) -> Any:
    """A compiled function that takes an address for a record of this type."""

    @intrinsic
    def record_at(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], WORD.as_pointer())

        return kind(types.int64), generate

    return record_at
