"""Every leaf of the ledger, as frozen dataclasses: the field docs are the format's specification.

The seal makes them; the verifier has its own reading of docs/evidence-format.md. A leaf is one
canonical JSON object (RFC 8785) of less than 4 KiB. It holds commitments to ciphertext and counts,
never content: what a record says stays in the segment, and its leaf only says where the record
lies. Words that come from a record (reasons, actions) are cut down to a lower-case word by `word`,
so that no text of a peer can get here.

Fields are declared in the order of their names, which is the order of RFC 8785 for ASCII names, so
that a leaf is written as it stands. Numbers are below 2^53. Times are RFC 3339 with nanoseconds. A
record is found by `generation` and `commit` (the number of the commit that holds its frame);
generation 0 stands for the seal, which writes no segment. Hashes are base64.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from functools import lru_cache

import orjson

VERSION = 1

_WORD = re.compile("[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Genesis:
    """First leaf of a log."""

    boot: str  #: boot id, hex
    origin: str  #: name of the log, as in its checkpoints
    time: str
    type: str = "genesis"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A process that writes evidence began (record Start), or the seal itself."""

    boot: str  #: boot id, hex
    commit: int
    generation: int
    role: str  #: "gate", "cli", "review", "seal"
    time: str
    type: str = "start"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """An orderly stop (record Stop), or the seal's own."""

    commit: int
    generation: int
    reason: str
    time: str
    type: str = "stop"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A process began with another configuration than the last one that the log names."""

    commit: int
    generation: int
    sha256: str  #: of the configuration, hex, as its Start record says
    time: str
    type: str = "config"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of commits of one segment, as they lie on disk."""

    base: int  #: stream position of the run's first byte of plaintext
    commits: int  #: how many, 1 or more
    end: int  #: offset in the file after the run
    final: bool  #: whether the last commit of the run ends the segment
    first: int  #: number of the first commit
    generation: int
    header: str  #: SHA-256 of the segment's first 4096 bytes in the run with `first` 0, else ""
    incarnation: int
    offset: int  #: offset in the file of the first commit
    position: int  #: stream position after the run
    root: str  #: RFC 6962 root; one leaf a commit: the 32 bytes of SHA-256 over its block range
    stream: str
    time: str  #: of the last commit
    type: str = "segment"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Hot:
    """Commits on disk that the seal has not read yet: it was behind when it signed."""

    commits: int  #: how many from `first` on
    first: int  #: number of the first one that no `segment` leaf covers
    generation: int
    offset: int  #: offset in the file of the first
    tags: str  #: SHA-256 over the 16-byte GCM tags of these commits, in order
    time: str
    type: str = "hot"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Sealed commits of a finished segment were rewritten as a pack of the sealed store."""

    commits: int  #: how many from `first` on
    digest: str  #: SHA-256 of the pack's head
    first: int  #: number of the first one
    generation: int
    last: bool  #: whether they are the last of the segment: its file may go then
    parts: int  #: lines of the pack's directory
    size: int  #: of the pack, bytes
    time: str
    type: str = "pack"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpen:
    """A session began (record SessionOpen)."""

    commit: int
    generation: int
    session: str
    time: str
    type: str = "session_open"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClose:
    """A session ended, with what the seal counted in its frames.

    `reason` is the SessionClose record's, or "cut" when there is none: its writer died (the leaf's
    place is then that of the Recovered record) or stopped without closing it (that of the Stop).
    """

    by: str  #: "client", "upstream" or "gate"; "recovery" or "stop" when cut
    bytes: tuple[int, int]  #: payload of UP and DOWN frames
    commit: int
    commits: int  #: how many commits hold frames of the session: leaves under `subroot`
    declared: tuple[int, int, int]  #: bytes_up, bytes_down, operations that the record says
    frames: int  #: all frames of the session, SessionClose included
    gaps: int  #: Gap records among them
    generation: int
    opened: str  #: time of its SessionOpen, "" when that was never seen
    operations: int  #: Operation records
    own: tuple[int, int]  #: payload of UP_OWN and DOWN_OWN frames
    reason: str
    records: int  #: frames that are records
    session: str
    #: RFC 6962 root; one leaf a commit that holds frames of the session, in order: SHA-256 of the
    #: commit's block range | generation u32 | number u32 | (start u32, end u32) of each run of
    #: the session's frames in the commit's plaintext; little-endian
    subroot: str
    time: str
    type: str = "session_close"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A person or program acted (record Decision)."""

    action: str
    commit: int
    generation: int
    session: str  #: "" when the record stands outside of a session
    time: str
    type: str = "decision"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Somebody read evidence (record Access)."""

    action: str
    commit: int
    generation: int
    time: str
    type: str = "access"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Something outside of one session was not recorded (record Gap with session 0)."""

    bytes: tuple[int, int]
    commit: int
    count: int
    generation: int
    packets: int
    reason: str
    scope: str
    time: str
    type: str = "gap"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a gate worker counted (record Heartbeat)."""

    accepted: int
    closed: int
    commit: int
    generation: int
    kernel_accepted: int
    listen_drops: int
    open: int
    refused: int
    sensor_lost: int
    time: str
    type: str = "heartbeat"
    v: int = VERSION
    worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SealHeartbeat:
    """Last leaf before every checkpoint: the seal lives, and this is what it knows."""

    boot: str  #: boot id, hex
    mono_ms: int  #: CLOCK_BOOTTIME
    open: int  #: sessions that are open in what is sealed
    pace_ms: int  #: longest time between checkpoints that the configuration asks for
    time: str
    type: str = "seal_heartbeat"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A dead writer's evidence was completed (record Recovered)."""

    bytes: int
    commit: int
    frames: int
    generation: int
    incarnation: int  #: the dead writer's
    last: int  #: generation that completes it
    power_loss: bool  #: what was not committed is lost
    segments: int  #: how many segments it has
    time: str
    type: str = "recovered"
    v: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """What the seal found on disk was not what a writer wrote."""

    generation: int
    offset: int  #: in the file; 0: the whole segment cannot be read
    reason: str
    time: str
    type: str = "damaged"
    v: int = VERSION


Leaf = (
    Genesis
    | Start
    | Stop
    | Config
    | Segment
    | Hot
    | Pack
    | SessionOpen
    | SessionClose
    | Decision
    | Access
    | Gap
    | Heartbeat
    | SealHeartbeat
    | Recovered
    | Damaged
)


def pack(leaf: Leaf) -> bytes:
    """Return the canonical JSON of `leaf`; TypeError for a number beyond 2^53 - 1."""
    packed = orjson.dumps(leaf, option=orjson.OPT_STRICT_INTEGER)
    # What orjson returns keeps the pages that it was written in: 8 KiB and two page faults for each
    # leaf that waits for its checkpoint. A copy is as long as it is.
    return bytes(memoryview(packed))


@lru_cache(maxsize=256)
def word(text: object) -> str:
    """Return `text` when it is a plain lower-case word, "other" when it is not."""
    return text if isinstance(text, str) and _WORD.fullmatch(text) else "other"


def base64_of(digest: bytes) -> str:
    """Return the base64 spelling of a hash."""
    return base64.b64encode(digest).decode("ascii")
