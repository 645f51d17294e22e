"""What the log claims: the story that its leaves tell, checked for contradictions in itself.

Fed leaf by leaf; afterwards it says which commits of which segments are sealed, and where the
leaves of a commit's records are. Memory grows with segments and commits, not with sessions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capture.verify.leaf import digest, nanoseconds

if TYPE_CHECKING:
    from capture.verify.packs import AnySegment
    from capture.verify.report import Report
    from capture.verify.segment import Commit

#: How long a seal may be silent without saying that it was started anew.
SILENCE_S = 60.0
_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
_PLACED = frozenset(
    {"start", "stop", "config", "session_open", "session_close", "decision", "access", "gap",
     "heartbeat", "recovered"}
)  # fmt: skip


def session_number(name: str) -> int:
    """Return the number of a printed session."""
    number = 0
    for letter in name:
        number = number * 32 + _LETTERS.index(letter)
    return number


@dataclass(frozen=True, slots=True)
class Run:
    """The commits that one `segment` leaf seals."""

    leaf: int
    first: int
    commits: int
    offset: int
    end: int
    base: int
    position: int
    root: bytes
    final: bool

    @property
    def recovery(self) -> bool:
        """Say whether this may be the one segment that completes a dead writer's stream."""
        return self.first == 0 and self.final


@dataclass(frozen=True, slots=True)
class Hot:
    """The commits that one `hot` leaf names."""

    leaf: int
    first: int
    commits: int
    offset: int
    tags: bytes


@dataclass(frozen=True, slots=True)
class Packed:
    """The pack that one `pack` leaf names."""

    leaf: int
    first: int
    commits: int
    digest: bytes
    parts: int
    size: int
    last: bool


@dataclass(slots=True)
class Sealed:
    """All that the log says of one segment."""

    incarnation: int
    stream: str
    header: bytes
    runs: list[Run] = field(default_factory=list)
    hot: list[Hot] = field(default_factory=list)
    packs: list[Packed] = field(default_factory=list)

    @property
    def commits(self) -> int:
        """Return how many commits are sealed."""
        return self.runs[-1].first + self.runs[-1].commits if self.runs else 0


@dataclass(slots=True)
class _Session:
    generation: int
    commit: int


class History:
    """The leaves' story so far."""

    def __init__(self, origin: str, report: Report, session: str | None = None) -> None:
        self._origin, self._report, self._wanted = origin, report, session
        self.segments: dict[int, Sealed] = {}
        #: incarnation -> its generations, in the order of the log
        self.streams: dict[int, list[int]] = {}
        #: (generation, commit) -> [first leaf, leaves] of its records, in the order of its frames
        self.places: dict[tuple[int, int], list[list[int]]] = {}
        self.recovered: dict[int, dict[str, Any]] = {}  #: dead incarnation -> leaf
        #: session -> leaf that cut it
        self.cut: dict[str, int] = {}
        self.open: dict[str, _Session] = {}
        #: generations between which the wanted session lies
        self.wanted: list[int] = []
        self.sealed_ns = 0  #: time of the last seal heartbeat
        self.started_ns = 0  #: time of the seal's last start
        self.stopped = False  #: the seal was stopped in order, and the log ends there
        self._heartbeat: dict[str, Any] | None = None
        self._restarted = False
        self._positions: dict[int, int] = {}
        self._damaged: list[tuple[int, dict[str, Any]]] = []

    def take(self, index: int, fields: dict[str, Any]) -> None:
        """Take the next leaf."""
        kind = fields["type"]
        if (kind == "genesis") != (index == 0):
            self._report.invalid("a log has one genesis leaf, its first", leaf=index)
        match kind:
            case "genesis":
                self.sealed_ns = nanoseconds(fields["time"])
                if fields["origin"] != self._origin:
                    self._report.invalid("the genesis leaf names another log", leaf=index)
            case "segment":
                self._segment(index, fields)
            case "hot":
                self._hot(index, fields)
            case "pack":
                self._pack(index, fields)
            case "seal_heartbeat":
                self._beat(index, fields)
            case "damaged":
                self._damaged.append((index, fields))
            case "gap":
                self._report.gaps += 1
            case "start" if fields["generation"] == 0:
                self._restarted, self.started_ns = True, nanoseconds(fields["time"])
                self.stopped = False
            case "stop" if fields["generation"] == 0:
                self.stopped = True
            case "session_open":
                self._opened(index, fields)
            case "session_close":
                self._closed(index, fields)
            case "recovered":
                self._recovery(index, fields)
        if kind in _PLACED and fields["generation"]:
            self._place(index, fields)

    def finish(self) -> None:
        """Say what is left open at the log's end."""
        for index, fields in self._damaged:
            self._damage(index, fields)
        dead = {
            incarnation
            for incarnation, fields in self.recovered.items()
            if self.sealed_ns - nanoseconds(fields["time"]) > SILENCE_S * 1e9
        }
        for name in self.open:
            if session_number(name) >> 40 in dead:
                self._report.incomplete("its writer is dead and it was never ended", session=name)
        self._report.sessions["open"] = len(self.open)

    def late_s(self, segment: AnySegment, commit: Commit) -> float:
        """Return for how long a commit was not sealed although it should have been.

        Negative or small for one that the seal could not know, or that a `hot` leaf covers, and for
        the command line's own records on an appliance that was stopped.
        """
        if self.stopped and segment.stream == "cli" and commit.time_ns > self.sealed_ns:
            return 0.0
        sealed = self.segments.get(segment.generation)
        hot = sealed.hot[-1] if sealed is not None and sealed.hot else None
        if hot is not None and hot.first <= commit.number < hot.first + hot.commits:
            return 0.0
        after = self.sealed_ns - max(commit.time_ns, self.started_ns)
        return max(after, commit.time_ns - self.sealed_ns) / 1e9

    def after(self, generation: int) -> bool:
        """Say whether a later segment of the same incarnation is sealed."""
        generations = self.streams[self.segments[generation].incarnation]
        return generations[-1] > generation

    def _segment(self, index: int, fields: dict[str, Any]) -> None:
        generation, incarnation = fields["generation"], fields["incarnation"]
        run = Run(
            index, fields["first"], fields["commits"], fields["offset"], fields["end"],
            fields["base"], fields["position"], digest(fields["root"]), fields["final"],
        )  # fmt: skip
        sealed = self.segments.get(generation)
        if sealed is None or not sealed.runs:
            sealed = self._new_segment(index, fields, sealed)
            expected = (0, 4096)
        else:
            last = sealed.runs[-1]
            expected = (last.first + last.commits, last.end)
            packed = bool(sealed.packs and sealed.packs[-1].last)
            if last.final or packed or fields["header"] or (sealed.incarnation, sealed.stream) != (
                incarnation, fields["stream"],
            ):  # fmt: skip
                self._invalid("the leaf does not continue its segment", index, fields)
        if (run.first, run.offset) != expected or not run.commits:
            self._invalid("the leaf leaves out commits, or repeats some", index, fields)
        position = self._positions.get(incarnation, 0)
        if run.base != position:
            self.broken(
                run.base, position, recovery=run.recovery, segment=generation, offset=run.offset,
                leaf=index,
            )  # fmt: skip
        self._positions[incarnation] = run.position
        sealed.runs.append(run)

    def _new_segment(self, index: int, fields: dict[str, Any], sealed: Sealed | None) -> Sealed:
        generation, incarnation = fields["generation"], fields["incarnation"]
        header = digest(fields["header"]) if fields["header"] else b""
        if not header:
            self._invalid("the segment's first leaf has no header", index, fields)
        generations = self.streams.setdefault(incarnation, [])
        if generations and generations[-1] > generation:
            self._invalid("the segments of a stream are out of order", index, fields)
        generations.append(generation)
        hot = sealed.hot if sealed is not None else []
        made = self.segments[generation] = Sealed(incarnation, fields["stream"], header, [], hot)
        return made

    def broken(self, base: int, position: int, *, recovery: bool, **where: Any) -> None:
        """The stream does not go on where it was, at `position`.

        Honest only in the segment that recovery wrote: when a chunk of memory was unreadable.
        """
        reason = f"stream position {position} is followed by {base}"
        if recovery and base > position:
            self._report.incomplete(f"{reason}: recovery could not read the memory", **where)
        else:
            self._report.invalid(reason, **where)

    def _hot(self, index: int, fields: dict[str, Any]) -> None:
        generation = fields["generation"]
        sealed = self.segments.get(generation)
        if sealed is None:
            sealed = self.segments[generation] = Sealed(0, "", b"")
        hot = Hot(
            index, fields["first"], fields["commits"], fields["offset"], digest(fields["tags"])
        )
        sealed.hot.append(hot)

    def _pack(self, index: int, fields: dict[str, Any]) -> None:
        sealed = self.segments.get(fields["generation"])
        if sealed is None:
            self._invalid("a pack is named of a segment that was not sealed", index, fields)
            return
        made = Packed(
            index, fields["first"], fields["commits"], digest(fields["digest"]), fields["parts"],
            fields["size"], fields["last"],
        )  # fmt: skip
        before = sealed.packs[-1] if sealed.packs else None
        expected = before.first + before.commits if before is not None else 0
        end = made.first + made.commits
        if made.first != expected or not made.commits or (before is not None and before.last):
            self._invalid("the packs of a segment do not follow each other", index, fields)
        elif end > sealed.commits or (made.last and end != sealed.commits):
            self._invalid("the pack does not hold what was sealed", index, fields)
        sealed.packs.append(made)

    def _beat(self, index: int, fields: dict[str, Any]) -> None:
        last = self._heartbeat
        if last is not None and not self._restarted:
            silence = (fields["mono_ms"] - last["mono_ms"]) / 1000
            if last["boot"] != fields["boot"] or silence < 0:
                self._report.invalid(
                    "a seal that was not started anew changed its boot", leaf=index
                )
            elif silence > max(SILENCE_S, 6 * fields["pace_ms"] / 1000):
                self._report.incomplete(f"nothing was signed for {silence:.0f} s", leaf=index)
        self._heartbeat, self._restarted = fields, False
        self.sealed_ns = nanoseconds(fields["time"])
        self._report.sealed = fields["time"]

    def _opened(self, index: int, fields: dict[str, Any]) -> None:
        name = fields["session"]
        self._report.sessions["opened"] += 1
        if name in self.open:
            self._report.invalid("the session is opened twice", leaf=index, session=name)
        self.open[name] = _Session(fields["generation"], fields["commit"])
        if name == self._wanted:
            self.wanted.append(fields["generation"])

    def _closed(self, index: int, fields: dict[str, Any]) -> None:
        name = fields["session"]
        self._report.sessions["cut" if fields["reason"] == "cut" else "closed"] += 1
        if self.open.pop(name, None) is None:
            if fields["opened"]:
                self._report.invalid(
                    "a session is closed that is not open", leaf=index, session=name
                )
            else:
                self._report.incomplete("the session's begin is missing", leaf=index, session=name)
        if fields["by"] == "recovery":
            self.cut[name] = index
        if name == self._wanted:
            self.wanted.append(fields["generation"])

    def _recovery(self, index: int, fields: dict[str, Any]) -> None:
        self.recovered[fields["incarnation"]] = fields
        if fields["power_loss"]:
            self._report.incomplete(
                "power was lost: what its writer had not stored is gone",
                segment=fields["last"], leaf=index,
            )  # fmt: skip

    def _damage(self, index: int, fields: dict[str, Any]) -> None:
        sealed = self.segments.get(fields["generation"])
        recovery = self.recovered.get(sealed.incarnation) if sealed is not None else None
        where = {"segment": fields["generation"], "offset": fields["offset"], "leaf": index}
        reason = f"it was damaged before it was sealed ({fields['reason']})"
        if recovery is not None and recovery["power_loss"]:
            self._report.incomplete(reason, **where)
        else:
            self._report.invalid(reason, **where)

    def _place(self, index: int, fields: dict[str, Any]) -> None:
        sealed = self.segments.get(fields["generation"])
        if sealed is None or fields["commit"] >= sealed.commits:
            self._invalid("the leaf's record is in no sealed commit", index, fields)
        if fields["type"] == "session_close" and fields["by"] == "recovery":
            return
        ranges = self.places.setdefault((fields["generation"], fields["commit"]), [])
        if ranges and sum(ranges[-1]) == index:
            ranges[-1][1] += 1
        else:
            ranges.append([index, 1])

    def _invalid(self, reason: str, index: int, fields: dict[str, Any]) -> None:
        self._report.invalid(reason, segment=fields["generation"], leaf=index)
