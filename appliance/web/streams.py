"""The bytes of a session over HTTP: one direction of it, with ranges, and exports.

A byte stands at its place in the half-stream. Hidden bytes (credentials) and bytes that were not
recorded are zero; `GET .../records?kind=hidden` and `?kind=gaps` name them. The end of a running
session is where it was when the answer began.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Literal

from aiohttp import web

from appliance.web.parameters import SESSION, In
from appliance.web.problem import Problem
from appliance.web.routes import Route
from appliance.web.tokens import Right
from capture.errors import ExportError
from capture.export import capturefile, ocsf
from capture.reader import Side

if TYPE_CHECKING:
    from collections.abc import Iterator

    from appliance.web.reading import Opened
    from appliance.web.review import Review
    from appliance.web.routes import Asked
    from capture.reader import Reader

Direction = Literal["up", "down", "gate-up", "gate-down"]
SIDES = {
    "up": Side.UP, "down": Side.DOWN, "gate-up": Side.UP_OWN, "gate-down": Side.DOWN_OWN,
}  # fmt: skip
BYTES, LINES = "application/octet-stream", "application/x-ndjson"
PACKETS = "application/x-pcapng"
_ZEROS = bytes(64 << 10)
_ID = In("path", "id of the session", pattern=SESSION)
_RANGE = re.compile(r"bytes=\s*(\d{0,16})-(\d{0,16})\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Stream:
    """One direction of a session."""

    session: Annotated[str, _ID]
    direction: Annotated[
        Direction,
        In("path", "up: what the client sent; down: what the upstream sent; gate-up, gate-down:"
           " the gate's own bytes that were sent there"),
    ]  # fmt: skip
    range: Annotated[
        str, In("header", "one range of bytes; several, or another unit, are passed over")
    ] = ""


@dataclass(frozen=True, slots=True)
class Export:
    """A session in a format of others."""

    session: Annotated[str, _ID]
    format: Annotated[
        Literal["ndjson", "pcapng"],
        In("query", "ndjson: OCSF events, one a line; pcapng: synthetic TCP, for Wireshark"),
    ] = "ndjson"


async def get_stream(review: Review, asked: Asked, given: Stream) -> web.StreamResponse:
    """Return the bytes of one direction; Range works."""
    side = SIDES[given.direction]
    number, total = await review.reading.ask(lambda opened: _extent(opened, given.session, side))
    start, end, partial = span(given.range, total)
    name = f"{given.session}.{given.direction}"
    headers = {
        "Accept-Ranges": "bytes", "Content-Length": str(end - start),
        "Content-Disposition": f'attachment; filename="{name}"',
    }  # fmt: skip
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
    response = web.StreamResponse(status=206 if partial else 200, headers=headers)
    response.content_type = BYTES

    def content(opened: Opened) -> Iterator[bytes]:
        """Read the bytes."""
        return cut(opened.reader, number, side, start, end)

    return await review.send(asked.request, response, content)


async def export_session(review: Review, asked: Asked, given: Export) -> web.StreamResponse:
    """Return a session as OCSF 1.8.0 events (each operation, then the session), or as a capture
    file.
    """
    session = await review.reading.ask(lambda opened: opened.session(given.session))
    name = f"{given.session}.{given.format}"
    response = web.StreamResponse(headers={"Content-Disposition": f'attachment; filename="{name}"'})
    response.content_type = LINES if given.format == "ndjson" else PACKETS

    def content(opened: Opened) -> Iterator[bytes]:
        """Read the bytes."""
        if given.format == "pcapng":
            return capturefile.export(opened.reader, [session])
        return ocsf.export(opened.reader, session)

    try:
        return await review.send(asked.request, response, content)
    except ExportError as wrong:
        raise Problem("unavailable", f"the export cannot be made: {wrong}") from wrong


def span(text: str, total: int) -> tuple[int, int, bool]:
    """Return (start, end, whether it is a part) of what a Range header means (RFC 9110, 14.2);
    Problem when there are no such bytes.
    """
    found = _RANGE.fullmatch(text)
    if found is None or not (found[1] or found[2]):
        return 0, total, False
    if found[1]:
        start = int(found[1])
        end = min(int(found[2]) + 1, total) if found[2] else total
        if found[2] and int(found[2]) < start:
            return 0, total, False  # no range at all: passed over
    else:
        start, end = max(total - int(found[2]), 0), total
    if start >= end:
        headers = {"Content-Range": f"bytes */{total}"}
        raise Problem("range", f"there are {total} bytes", parameter="range", headers=headers)
    return start, end, True


def cut(reader: Reader, session: int, side: Side, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes from `start` to before `end`; what was not recorded is zero."""
    at = start
    for piece in reader.stream(session, side, start):
        stop = piece.offset + len(piece.data)
        if stop <= at:
            continue
        if at >= end:
            break
        yield from _zeros(min(piece.offset, end) - at)
        at = max(at, min(piece.offset, end))
        yield bytes(piece.data[at - piece.offset : end - piece.offset]) if at < end else b""
        at = min(stop, end)
    yield from _zeros(end - at)


def _zeros(count: int) -> Iterator[bytes]:
    for start in range(0, count, len(_ZEROS)):
        yield _ZEROS[: count - start]


def _extent(opened: Opened, name: str, side: Side) -> tuple[int, int]:
    """Return the number of a session and how many bytes one of its sides has."""
    session = opened.session(name)
    if side is Side.UP:
        return session.number, session.bytes_up
    if side is Side.DOWN:
        return session.number, session.bytes_down
    ends = (p.offset + len(p.data) for p in opened.reader.stream(session.number, side))
    return session.number, max(chain((0,), ends))


ROUTES = (
    Route(
        "GET", "/sessions/{session}/streams/{direction}", Right.PAYLOAD, "show", get_stream,
        media=BYTES, may=("range",),
    ),
    Route(
        "GET", "/sessions/{session}/export", Right.PAYLOAD, "export", export_session, media=LINES,
        also=(PACKETS,),
    ),
)  # fmt: skip
