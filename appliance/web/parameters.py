"""What a request gives: dataclasses whose fields say where a value stands and what it may be.

    @dataclass(frozen=True, slots=True)
    class Given:
        session: Annotated[str, In("path", "id of the session", pattern=SESSION)]
        limit: Annotated[int, In("query", "at most so many", least=1, most=1000)] = 100

`bind` makes one of a request, or a Problem that names the parameter; `appliance.web.openapi`
describes the same fields. Whatever no field asks for is refused: a filter that is misspelt and
passed over would show other evidence than was meant.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from appliance.web.problem import Problem
from capture.moment import nanoseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Where = Literal["path", "query", "header", "body"]

SESSION = "^[0-9a-f][0-9a-hjkmnp-tv-z]{12}$"
MOST_NUMBER = (1 << 53) - 1
MOST_NS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class In:
    """Where a value stands, what it means, and its bounds; `longest` is in letters."""

    where: Where
    text: str
    least: int = 0
    most: int = MOST_NUMBER
    longest: int = 1000
    pattern: str = ""
    parse: Callable[[str], Any] | None = None  #: of a value that is not what its schema says
    form: str = ""  #: `format` of the schema
    told: str = ""  #: `pattern` of the schema where only `parse` can check it


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a dataclass of parameters."""

    name: str
    kind: Any
    given: In
    default: Any  #: dataclasses.MISSING when it must be given

    @property
    def required(self) -> bool:
        """Say whether it must be given."""
        return self.default is dataclasses.MISSING


def fields(kind: type) -> list[Field]:
    """Return the fields of a dataclass of parameters."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        annotated, given = get_args(hints[field.name])[:2]
        found.append(Field(field.name, annotated, given, field.default))
    return found


def bind(kind: type, sources: Mapping[Where, Mapping[str, Any]]) -> Any:
    """Return the dataclass of what a request gives; Problem when it does not fit."""
    known = fields(kind)
    for where in ("query", "body"):
        names = {field.name for field in known if field.given.where == where}
        unknown = next((name for name in sources.get(where, {}) if name not in names), None)
        if unknown is not None:
            told = f"known here: {', '.join(sorted(names)) or 'none'}"
            raise Problem("bad-request", f"{unknown[:100]!r} is not known; {told}")
    values = {}
    for field in known:
        source = sources.get(field.given.where, {})
        if field.name in source:
            values[field.name] = _value(field, source[field.name])
        elif field.required:
            raise Problem("bad-request", f"{field.name} is missing", parameter=field.name)
    return kind(**values)


def single(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Return a query as names and values; Problem when a name is there twice."""
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise Problem("bad-request", "it is given twice", parameter=name[:100])
        found[name] = value
    return found


def time_ns(text: str) -> int:
    """Return the nanoseconds of an RFC 3339 time; ValueError otherwise. A time that no record can
    have is the nearest one that a record can.
    """
    try:
        found = nanoseconds(text)
    except OverflowError:  # in UTC it is before year 1 or after year 9999
        found = -MOST_NS if text.startswith("0001") else MOST_NS
    return min(max(found, -MOST_NS), MOST_NS)


def bare(kind: Any) -> Any:
    """Return the type without None."""
    inner = [item for item in get_args(kind) if item is not type(None)]
    return inner[0] if type(None) in get_args(kind) and len(inner) == 1 else kind


def _value(field: Field, value: Any) -> Any:
    try:
        return _checked(field.given, bare(field.kind), value)
    except ValueError as wrong:
        raise Problem("bad-request", str(wrong), parameter=field.name) from wrong


def _checked(given: In, kind: Any, value: Any) -> Any:
    if given.where != "body" and kind in (int, bool) and given.parse is None:
        value = _from_text(kind, value)
    if not isinstance(value, str):
        return _number(given, kind, value)
    if len(value) > given.longest:
        raise ValueError(f"it is longer than {given.longest} letters")
    if given.pattern and not re.fullmatch(given.pattern, value, re.ASCII):
        raise ValueError(f"it does not match {given.pattern}")
    if given.parse is not None:
        return given.parse(value)
    allowed = choices(kind)
    if allowed and value not in allowed:
        raise ValueError(f"it is one of {', '.join(allowed)}")
    if kind is int:
        raise ValueError("it is no number")
    return kind(value) if isinstance(kind, type) and issubclass(kind, Enum) else value


def _from_text(kind: Any, value: str) -> Any:
    if kind is bool:
        if value not in ("true", "false"):
            raise ValueError("it is true or false")
        return value == "true"
    if not re.fullmatch("[0-9]{1,16}", value, re.ASCII):
        raise ValueError("it is no number")
    return int(value)


def _number(given: In, kind: Any, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it is not {'text' if kind is str else kind.__name__}")
    if kind is int and not given.least <= value <= given.most:
        raise ValueError(f"it is from {given.least} to {given.most}")
    return value


def choices(kind: Any) -> list[str]:
    """Return the words that a type allows; empty when it is not such a type."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return []
