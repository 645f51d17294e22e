"""The log over HTTP: its signed checkpoint, its leaves, and proofs (RFC 6962, 2.1).

Who keeps a checkpoint can later ask for a consistency proof, and knows that nothing before it was
changed. The private key is not needed, and not read.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar

import orjson

from appliance.web.parameters import In
from appliance.web.problem import Problem
from appliance.web.routes import Nothing, Page, Route
from appliance.web.tokens import Right
from capture.errors import EvidenceError
from capture.ledger import Ledger
from capture.merkle import leaf_hash
from capture.note import NoteVerifier

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.web.review import Review
    from appliance.web.routes import Asked
    from capture.store import Store

Answer = TypeVar("Answer")
_TRIES = 5  #: the log grows while it is read: then it is opened anew


class CheckpointObject(TypedDict):
    """The newest signed checkpoint; `note` is the signed note itself, `key` the line of the key
    that signed it, `root` base64.
    """

    note: str
    key: str
    origin: str
    size: int
    root: str


class LeafObject(TypedDict):
    """A leaf of the log; `data` is base64, `leaf` the same as JSON, `hash` base64."""

    index: int
    data: str
    hash: str
    leaf: dict[str, Any]


class InclusionObject(TypedDict):
    """That a leaf is in the tree of a size; hashes are base64, the leaf's siblings first."""

    index: int
    size: int
    hash: str
    root: str
    path: list[str]


class ConsistencyObject(TypedDict):
    """That the tree of `new` leaves continues that of `old`; hashes are base64."""

    old: int
    new: int
    old_root: str
    new_root: str
    path: list[str]


@dataclass(frozen=True, slots=True)
class Leaves:
    """Some leaves."""

    start: Annotated[int, In("query", "index of the first")] = 0
    limit: Annotated[int, In("query", "at most so many", least=1, most=1000)] = 100


@dataclass(frozen=True, slots=True)
class Inclusion:
    """A leaf and a tree."""

    index: Annotated[int, In("query", "index of the leaf, from 0")]
    size: Annotated[
        int | None, In("query", "leaves of the tree, the newest one if not given", least=1)
    ] = None


@dataclass(frozen=True, slots=True)
class Consistency:
    """Two trees."""

    old: Annotated[int, In("query", "leaves of the older tree", least=1)]
    new: Annotated[
        int | None, In("query", "leaves of the newer one, the newest if not given", least=1)
    ] = None


async def get_checkpoint(review: Review, asked: Asked, given: Nothing) -> CheckpointObject:
    """Return the newest checkpoint."""
    del asked, given

    def question(ledger: Ledger, key: NoteVerifier) -> CheckpointObject:
        """Read the log."""
        found = ledger.checkpoint
        return {
            "note": ledger.note.decode(), "key": key.vkey(), "origin": found.origin,
            "size": found.size, "root": _text(found.root),
        }  # fmt: skip

    return await _ask(review, question)


async def list_leaves(review: Review, asked: Asked, given: Leaves) -> Page[LeafObject]:
    """List leaves of the log, the oldest first; `next` is the `start` of what follows."""
    del asked

    def question(ledger: Ledger, key: NoteVerifier) -> Page[LeafObject]:
        """Read the log."""
        del key
        end = min(given.start + given.limit, ledger.size)
        entries = ledger.entries(given.start, end) if given.start < end else ()
        items: list[LeafObject] = [
            {"index": index, "data": _text(data), "hash": _text(leaf_hash(data)),
             "leaf": orjson.loads(data)}
            for index, data in enumerate(entries, given.start)
        ]  # fmt: skip
        return {"items": items, "next": str(end) if end < ledger.size else None}

    return await _ask(review, question)


async def prove_inclusion(review: Review, asked: Asked, given: Inclusion) -> InclusionObject:
    """Prove that a leaf is in the log."""
    del asked

    def question(ledger: Ledger, key: NoteVerifier) -> InclusionObject:
        """Read the log."""
        del key
        size = ledger.size if given.size is None else given.size
        path = ledger.inclusion(given.index, size)
        [data] = ledger.entries(given.index, given.index + 1)
        return {
            "index": given.index, "size": size, "hash": _text(leaf_hash(data)),
            "root": _text(ledger.root_at(size)), "path": [_text(node) for node in path],
        }  # fmt: skip

    return await _ask(review, question)


async def prove_consistency(review: Review, asked: Asked, given: Consistency) -> ConsistencyObject:
    """Prove that nothing before an older checkpoint was changed."""
    del asked

    def question(ledger: Ledger, key: NoteVerifier) -> ConsistencyObject:
        """Read the log."""
        del key
        new = ledger.size if given.new is None else given.new
        path = ledger.consistency(given.old, new)
        return {
            "old": given.old, "new": new, "old_root": _text(ledger.root_at(given.old)),
            "new_root": _text(ledger.root_at(new)), "path": [_text(node) for node in path],
        }  # fmt: skip

    return await _ask(review, question)


async def _ask(review: Review, question: Callable[[Ledger, NoteVerifier], Answer]) -> Answer:
    return await review.reading.ask(lambda opened: asked(opened.store, question))


def asked(store: Store, question: Callable[[Ledger, NoteVerifier], Answer]) -> Answer:
    """Ask the log as it is now; Problem when there is none, or nothing like what was asked for."""
    for left in reversed(range(_TRIES)):
        try:
            key = NoteVerifier.parse((store.state / "ledger.pub").read_text("ascii"))
            ledger = Ledger(store.ledger, key)
            return question(ledger, key)
        except ValueError as wrong:
            raise Problem("not-found", str(wrong)) from wrong
        except (OSError, EvidenceError) as wrong:
            if not left:
                detail = "the log cannot be read; narrows evidence verify says more"
                raise Problem("unavailable", detail) from wrong
    raise AssertionError("the last try answers or raises")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


ROUTES = (
    Route("GET", "/evidence/checkpoint", Right.METADATA, "checkpoint", get_checkpoint),
    Route("GET", "/evidence/leaves", Right.METADATA, "checkpoint", list_leaves),
    Route(
        "GET", "/evidence/proofs/inclusion", Right.METADATA, "checkpoint", prove_inclusion,
        may=("not-found",),
    ),
    Route(
        "GET", "/evidence/proofs/consistency", Right.METADATA, "checkpoint", prove_consistency,
        may=("not-found",),
    ),
)  # fmt: skip
