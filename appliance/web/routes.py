"""The shape of a route: what it is called, what it needs, what it takes and gives.

A handler is `async def name(review, asked, given) -> answer`: `given` is a dataclass of parameters
(`appliance.web.parameters`), the answer a JSON value of the type that its signature names, or a
response that it made itself. The server records and checks before it is called; openapi.json is
made from the same things.
"""

from __future__ import annotations

import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

if TYPE_CHECKING:
    from aiohttp import web

    from appliance.web.review import Review
    from appliance.web.tokens import Right, Token

Item = TypeVar("Item")
Handler = Callable[["Review", "Asked", Any], Awaitable[Any]]
JSON = "application/json"


class Page(TypedDict, Generic[Item]):
    """Part of a list; `next` is the cursor of what follows, null at the end."""

    items: list[Item]
    next: str | None


@dataclass(frozen=True, slots=True)
class Nothing:
    """A request that gives nothing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks."""

    request: web.Request
    token: Token | None  #: None only where no right is needed
    peer: str

    @property
    def actor(self) -> str:
        """Return how the evidence names who asks."""
        who = f"token:{self.token.id}({self.token.name})" if self.token is not None else "nobody"
        return f"{who} peer:{self.peer}"


@dataclass(frozen=True, slots=True)
class Route:
    """One thing that can be asked. With `action` None nothing of the evidence is shown, and no
    Access record is written. Parameters may have `needs` and `action` of their own, which go first.
    """

    method: str
    path: str
    needs: Right | None
    action: str | None
    handler: Handler
    media: str = JSON
    also: tuple[str, ...] = ()  #: other media types that it may answer with, each bytes
    answer: Any = None  #: type of the answer, where the handler's signature does not name it
    may: tuple[str, ...] = ()  #: problems besides those of every route

    @property
    def given(self) -> type:
        """Return the type of the parameters."""
        found: type = typing.get_type_hints(self.handler, localns=_names())["given"]
        return found

    @property
    def answers(self) -> Any:
        """Return the type of the answer."""
        if self.answer is not None:
            return self.answer
        return typing.get_type_hints(self.handler, localns=_names())["return"]

    @property
    def text(self) -> str:
        """Return what it does."""
        return " ".join((self.handler.__doc__ or "").split())


def _names() -> dict[str, Any]:
    """Return the names that handlers' signatures use and that are only imported for checking."""
    from aiohttp import web

    return {"Review": Any, "Asked": Asked, "web": web}
