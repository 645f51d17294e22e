"""JSON Schema (2020-12) of the types that the API gives and takes: what openapi.json is made of.

Understood are the plain types, None, unions, Literal, Enum, list, tuple, dict, TypedDict, and
dataclasses, but for the fields that their `ABSENT` names. Named types become components and are
referred to.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from appliance.web import parameters

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"}, int: {"type": "integer"}, bool: {"type": "boolean"},
    float: {"type": "number"}, type(None): {"type": "null"}, Any: {},
}  # fmt: skip


class Components:
    """The named schemas that were needed so far."""

    def __init__(self) -> None:
        self.schemas: dict[str, Any] = {}

    def of(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type; TypeError for one that is not understood."""
        if kind in _PLAIN:
            return dict(_PLAIN[kind])
        origin, inner = get_origin(kind), get_args(kind)
        if origin in (types.UnionType, Union):
            return {"anyOf": [self.of(item) for item in inner]}
        if origin is Literal:
            return {"type": "string", "enum": list(inner)}
        if origin is list or (origin is tuple and inner[-1] is ...):
            return {"type": "array", "items": self.of(inner[0])}
        if origin is tuple:
            return {"type": "array", "prefixItems": [self.of(item) for item in inner]}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.of(inner[1])}
        if isinstance(kind, type) and issubclass(kind, Enum):
            return {"type": "string", "enum": [member.value for member in kind]}
        return self._named(kind, origin, inner)

    def _named(self, kind: Any, origin: Any, inner: tuple[Any, ...]) -> dict[str, Any]:
        plain = origin or kind
        name = plain.__name__.removesuffix("Object") + "".join(
            item.__name__.removesuffix("Object") for item in inner
        )
        if name not in self.schemas:
            self.schemas[name] = {}  # it may refer to itself
            self.schemas[name] = self._object(plain, inner)
        return {"$ref": f"#/components/schemas/{name}"}

    def _object(self, kind: Any, inner: tuple[Any, ...]) -> dict[str, Any]:
        hints = typing.get_type_hints(kind)
        if dataclasses.is_dataclass(kind):
            absent: frozenset[str] = getattr(kind, "ABSENT", frozenset())
            required = [f.name for f in dataclasses.fields(kind) if f.name not in absent]
            hints = {name: hints[name] for name in required}
        elif typing.is_typeddict(kind):
            required = [name for name in hints if name in kind.__required_keys__]
        else:
            raise TypeError(f"{kind!r} has no schema")
        variables = dict(zip(getattr(kind, "__parameters__", ()), inner, strict=False))
        return {
            "type": "object",
            "description": " ".join((inspect.getdoc(kind) or "").split()),
            "properties": {name: self._property(hint, variables) for name, hint in hints.items()},
            "required": required,
        }

    def _property(self, hint: Any, variables: dict[Any, Any]) -> dict[str, Any]:
        if get_origin(hint) is list and get_args(hint)[0] in variables:
            return {"type": "array", "items": self.of(variables[get_args(hint)[0]])}
        return self.of(hint)


def of_parameter(field: parameters.Field) -> dict[str, Any]:
    """Return the schema of a parameter."""
    given, kind = field.given, parameters.bare(field.kind)
    told: dict[str, Any] = {"type": "string"}
    if words := parameters.choices(kind):
        told["enum"] = words
    elif given.form or given.parse is not None or kind is str:
        told |= {"maxLength": given.longest}
        if pattern := given.pattern or given.told:
            told["pattern"] = pattern
        told |= {"format": given.form} if given.form else {}
    elif kind is bool:
        told["type"] = "boolean"
    else:
        told = {"type": "integer", "minimum": given.least, "maximum": given.most}
    if not field.required and field.default is not None and given.parse is None:
        told["default"] = field.default
    return told
