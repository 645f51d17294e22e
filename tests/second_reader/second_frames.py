"""Frames, and what they say of a session: records and half-streams."""

import json
import struct
from dataclasses import dataclass, field

from second_ledger import Broken, expect

UP, DOWN, UP_OWN, DOWN_OWN = 1, 2, 3, 4
RECORD = 16
OPERATION, HIDDEN, GAP, CLOSE = 19, 22, 24, 30
LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; `start` and `end` are its place in the plaintext that holds it."""

    incarnation: int
    kind: int
    session: int
    time: int
    offset: int
    payload: bytes
    start: int
    end: int

    @property
    def record(self):
        """The JSON object of a record."""
        return json.loads(self.payload)


def frames(data, start=0):
    """Yield the frames that fill `data`, which begins at `start` of its plaintext."""
    at = 0
    while at < len(data):
        expect(len(data) - at >= 32, "frame: cut")
        word, session, time, offset = struct.unpack_from("<4Q", data, at)
        length = word & 0xFFFFFF
        size = 32 + -(-length // 8) * 8
        expect(at + size <= len(data), "frame: longer than its plaintext")
        payload = data[at + 32 : at + 32 + length]
        place = start + at, start + at + size
        yield Frame(word >> 32, word >> 24 & 0xFF, session, time, offset, payload, *place)
        at += size


def runs_by_session(plaintext):
    """Return {session: [(start, bytes)]} of a commit: the longest stretches of one session."""
    runs, last = {}, None
    for frame in frames(plaintext):
        if frame.session == last:
            runs[last][-1][1] = frame.end
        else:
            last = frame.session
            runs.setdefault(last, []).append([frame.start, frame.end])
    return {
        session: [(start, plaintext[start:end]) for start, end in places]
        for session, places in runs.items()
    }


def printed(session):
    """Return a session's number as people see it: 13 letters."""
    return "".join(LETTERS[session >> 5 * place & 31] for place in range(12, -1, -1))


@dataclass(slots=True)
class Session:
    """All that is known of one session; `leaves` are the data of the leaves of its `subroot`."""

    number: int
    frames: list = field(default_factory=list)
    leaves: list = field(default_factory=list)

    def of(self, kind):
        """Return the records of a kind, in order."""
        return [frame.record for frame in self.frames if frame.kind == kind]

    @property
    def records(self):
        """(kind, record) of every record, in order."""
        return [(frame.kind, frame.record) for frame in self.frames if frame.kind >= RECORD]

    def size(self, kind):
        """Return the bytes that data frames of a kind hold."""
        return sum(len(frame.payload) for frame in self.frames if frame.kind == kind)

    def half_stream(self, kind):
        """Return a half-stream; hidden ranges and what was not recorded are zeros."""
        data = bytearray()
        for frame in self.frames:
            if frame.kind == kind:
                if frame.offset < len(data):
                    raise Broken(f"session {self.number:016x}: bytes recorded twice")
                data += bytes(frame.offset - len(data)) + frame.payload
        return bytes(data)

    def hidden(self, side):
        """Return (offset, length, digest) of what was blanked of a side's half-stream."""
        return [
            (record["offset"], record["length"], record["digest"])
            for record in self.of(HIDDEN)
            if record["side"] == side
        ]
