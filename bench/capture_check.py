"""Is what the gate recorded in the bench what was sent? Compared byte for byte, from the segments
themselves.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from capture import frames
from capture.crypt import Keys
from capture.frames import Kind
from capture.store import Store
from capture.tail import SegmentReader

if TYPE_CHECKING:
    from bench.report import Report
    from bench.stage import Stage

PIECE = 256 * 1024
HEADER = 16


def pattern() -> bytes:
    """Return the bytes that load.c sends over and over."""
    x, made = 1, bytearray()
    for _ in range(PIECE):
        x = (x * 1103515245 + 12345) & 0xFFFFFFFF
        made.append(b"abcdefgh01234567"[x >> 16 & 15])
    return bytes(made)


def check_capture(stage: Stage, report: Report) -> bool:
    """Compare every bulk session's recorded bytes with the pattern; say in the report what was
    found.
    """
    time.sleep(1.0)
    store, keys = Store(stage.state, stage.run), Keys.load(stage.state)
    doubled = pattern() * 3
    position: dict[tuple[int, int], int] = defaultdict(int)
    modes: dict[int, bytes] = {}
    compared = wrong = 0
    for generation in store.generations():
        with SegmentReader(store.segment(generation), keys) as reader:
            for commit in reader.commits():
                for kind, session, _, offset, payload, _ in frames.walk(
                    reader.plaintext(commit), reader.header.incarnation
                ):
                    if kind > Kind.DOWN:
                        continue
                    key = (session, kind)
                    if offset != position[key]:
                        wrong += 1
                    position[key] = offset + len(payload)
                    if kind == Kind.UP and offset == 0:
                        modes[session] = bytes(payload[:1])
                    if modes.get(session) == b"d" and kind == Kind.DOWN:
                        skip = 0
                    elif modes.get(session) == b"u" and kind == Kind.UP:
                        skip = HEADER
                    else:
                        continue
                    start = max(skip - offset, 0)
                    at = (offset + start - skip) % PIECE
                    compared += len(payload) - start
                    wrong += payload[start:] != doubled[at : at + len(payload) - start]
    report.checks.append(f"capture compared byte for byte: {compared} bytes, {wrong} differences")
    return wrong == 0
