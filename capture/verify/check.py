"""One verification: the log first, then the bytes on disk against it, then what is not sealed."""

from __future__ import annotations

import base64
import re
from hashlib import sha256
from typing import TYPE_CHECKING

from capture.verify import leaf as leaves
from capture.verify.content import Content
from capture.verify.history import SILENCE_S, History, session_number
from capture.verify.log import Log, read_kept
from capture.verify.note import LogKey, NoteError
from capture.verify.report import Pending, Report
from capture.verify.segment import BLOCK, Segment, SegmentError
from capture.verify.tree import Tree, leaf

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from capture.verify.history import Hot, Run, Sealed
    from capture.verify.segment import Commit

_SESSION = re.compile("[0-9a-hjkmnp-tv-z]{13}")
_SEGMENT = re.compile("[0-9a-f]{8}")


def verify(
    state: Path,
    what: str = "all",
    vkey: str | None = None,
    *,
    key: Path | None = None,
    kept: Sequence[Path] = (),
) -> Report:
    """Verify the evidence in a state directory, which may be in use.

    `what`: "all", a segment (8 hex digits) or a session (13 letters); ValueError for another word.
    `vkey` is the log's verifier key; without it ledger.pub of the state directory is believed.
    `key` is the appliance's key file; without it appliance.key is used if it is there. `kept` are
    checkpoints that an auditor kept.
    """
    if what != "all" and not _SESSION.fullmatch(what) and not _SEGMENT.fullmatch(what):
        raise ValueError(f"{what!r} is neither all, nor a segment, nor a session")
    report = Report(what)
    try:
        _Check(state, what, vkey, key, kept, report).run()
    except NoteError as wrong:
        report.invalid(str(wrong), file="checkpoint")
    return report


class _Check:
    """The steps of one verification."""

    def __init__(
        self, state: Path, what: str, vkey: str | None, key: Path | None, kept: Sequence[Path],
        report: Report,
    ) -> None:  # fmt: skip
        self._report, self._what = report, what
        self._ledger = state / "evidence" / "ledger"
        self._segments = state / "evidence" / "segments"
        self._log_key = _log_key(state, vkey, report)
        self._kept = [read_kept(path, self._log_key) for path in kept]
        self._appliance_key = _appliance_key(state, key, report)
        self._content: Content | None = None
        self._history: History
        report.origin = self._log_key.name

    def run(self) -> None:
        """Do it all."""
        if not (self._ledger / "checkpoint").exists():
            self._unsigned()
            return
        log = Log(self._ledger, self._log_key, self._report)
        self._report.leaves = log.signed.size
        self._report.checkpoint = base64.b64encode(log.signed.root).decode()
        wanted = self._what if _SESSION.fullmatch(self._what) else None
        self._history = History(self._log_key.name, self._report, wanted)
        self._read(log)
        if self._appliance_key is not None:
            self._content = Content(
                self._appliance_key, self._history, log, self._report, whole=self._what == "all"
            )
        for generations in self._streams():
            for generation in generations:
                self._segment(generation, self._history.segments[generation])
            if self._content is not None:
                self._content.end(to_the_end=self._reaches_end(generations))
        self._unsealed()

    def _reaches_end(self, generations: list[int]) -> bool:
        """Say whether these are an incarnation's segments up to its last one."""
        return bool(generations) and any(
            stream and max(stream) == generations[-1] for stream in self._history.streams.values()
        )

    def _unsigned(self) -> None:
        """There is no checkpoint: say whether there ever was one."""
        if any(path.is_file() for path in self._ledger.glob("tile/**/*")):
            self._report.invalid("the checkpoint is missing", file="checkpoint")
        else:
            self._report.incomplete("nothing was signed yet")
        if self._kept:
            self._report.invalid("a checkpoint was kept of a log that is not there")
        self._history = History(self._log_key.name, self._report)
        self._unsealed()

    def _read(self, log: Log) -> None:
        """Read the whole log, and compare it with the checkpoints that were kept."""
        for old in self._kept:
            if old.size > log.signed.size:
                self._report.invalid(
                    f"the log was rolled back: a kept checkpoint has {old.size} leaves, this one "
                    f"{log.signed.size}", file="checkpoint",
                )  # fmt: skip
        for index, entry in log.leaves(self._kept):
            try:
                fields = leaves.parse(entry)
                self._history.take(index, fields)
            except ValueError as wrong:
                self._report.invalid(str(wrong), leaf=index)
        self._history.finish()

    def _streams(self) -> list[list[int]]:
        """Return the segments to check: the generations of each incarnation, in order."""
        streams = sorted(self._history.streams.values())
        if self._what == "all":
            return streams
        if _SEGMENT.fullmatch(self._what):
            generation = int(self._what, 16)
            found = [[generation] for generations in streams if generation in generations]
            if not found:
                self._report.incomplete("the log does not know the segment", segment=generation)
            return found
        wanted = self._history.wanted
        if not wanted:
            self._report.incomplete("the log does not know the session", session=self._what)
            return []
        incarnation = session_number(self._what) >> 40
        generations = self._history.streams.get(incarnation, [])
        closed = len(wanted) > 1 and self._what not in self._history.cut
        # A cut session's leaf names the segment of whoever recovered it; its own end with it.
        last = wanted[-1] if closed else generations[-1]
        return [[g for g in generations if wanted[0] <= g <= last]]

    def _segment(self, generation: int, sealed: Sealed) -> None:
        try:
            with Segment(self._segments / f"{generation:08x}.seg") as segment:
                self._report.segments += 1
                _Bytes(segment, sealed, self._history, self._content, self._report).run()
        except FileNotFoundError:
            self._lost(generation, "the segment is missing")
        except (OSError, SegmentError) as wrong:
            self._lost(generation, str(wrong))

    def _lost(self, generation: int, reason: str) -> None:
        self._report.invalid(reason, segment=generation, offset=0)
        if self._content is not None:
            self._content.lost()

    def _unsealed(self) -> None:
        """Look at the segments that the log does not know."""
        if self._what != "all" or not self._segments.is_dir():
            return
        for path in sorted(self._segments.glob("*.seg")):
            generation = int(path.stem, 16) if _SEGMENT.fullmatch(path.stem) else -1
            known = self._history.segments.get(generation)
            if known is not None and known.runs:
                continue
            try:
                with Segment(path) as segment:
                    if segment.generation != generation:
                        self._report.invalid(
                            f"it holds segment {segment.generation:08x}",
                            segment=generation,
                            offset=0,
                        )
                        continue
                    pending(segment, 0, BLOCK, self._history, self._report)
            except (OSError, SegmentError) as wrong:
                self._report.incomplete(
                    f"it cannot be read and is not sealed: {wrong}", segment=generation, offset=0
                )


class _Bytes:
    """One segment's bytes against the log."""

    def __init__(
        self, segment: Segment, sealed: Sealed, history: History, content: Content | None,
        report: Report,
    ) -> None:  # fmt: skip
        self._segment, self._sealed, self._history = segment, sealed, history
        self._content, self._report = content, report
        self._tag: bytes | None = bytes(16)
        self._tags: dict[int, tuple[int, bytes]] = {}  #: number -> (end, tag), for hot leaves

    def run(self) -> None:
        """Compare header, sealed commits, hot commits, and what follows them."""
        segment, sealed = self._segment, self._sealed
        if sha256(segment.block).digest() != sealed.header:
            self._invalid("the segment's header is not as sealed", 0)
        if (segment.incarnation, segment.stream) != (sealed.incarnation, sealed.stream):
            self._invalid("the segment's header names another stream than the log", 0)
        if self._content is not None:
            self._content.begin(segment)
        for run in sealed.runs:
            self._run(run)
        for hot in sealed.hot:
            self._hot(hot)
        last = sealed.runs[-1]
        if last.final:
            if segment.size != last.end:
                self._invalid(f"the file has {segment.size} bytes, not {last.end}", last.end)
        elif not self._history.after(segment.generation):
            self._rest(last)

    def _run(self, run: Run) -> None:
        tree, base = Tree(), run.base
        commit: Commit | None = None
        offset = run.offset
        for number in range(run.first, run.first + run.commits):
            commit = self._segment.commit(offset)
            if commit is None or commit.number != number:
                self._invalid(f"commit {number} is missing, or its header was changed", offset)
                self._tag = None
                if self._content is not None:
                    self._content.lost()
                return
            raw = self._segment.raw(commit)
            if self._tag is not None and commit.previous_tag != self._tag:
                self._invalid(f"commit {number} does not follow the one before it", offset)
            if commit.base != base:
                self._history.broken(
                    commit.base, base, recovery=run.recovery, segment=self._segment.generation,
                    offset=offset,
                )  # fmt: skip
            tree.add(leaf(sha256(raw).digest()))
            if self._content is not None:
                self._content.take(commit, raw)
            self._report.commits += 1
            self._report.size_bytes += commit.size
            self._tag, offset, base = commit.tag(raw), commit.end, commit.base + commit.plain
            if self._sealed.hot:
                self._tags[number] = offset, self._tag
        if tree.root() != run.root:
            last = run.first + run.commits - 1
            self._invalid(f"commits {run.first} to {last} are not as sealed", run.offset, run.leaf)
        if offset != run.end or base != run.position or (commit and commit.final) != run.final:
            self._invalid("the commits do not end where the leaf says", run.offset, run.leaf)

    def _hot(self, hot: Hot) -> None:
        """Compare the tags that were signed before the seal had read the commits."""
        digest, offset = sha256(), hot.offset
        for number in range(hot.first, hot.first + hot.commits):
            if number not in self._tags:
                commit = self._segment.commit(offset)
                if commit is None or commit.number != number:
                    self._invalid(f"commit {number} was there and is missing", offset, hot.leaf)
                    return
                self._tags[number] = commit.end, commit.tag(self._segment.raw(commit))
            offset, tag = self._tags[number]
            digest.update(tag)
        if digest.digest() != hot.tags:
            reason = "commits are not as they were when the seal saw them"
            self._invalid(reason, hot.offset, hot.leaf)

    def _rest(self, last: Run) -> None:
        """Look at what follows the last sealed commit of a living segment."""
        first = self._segment.commit(last.end)
        if first is None or first.number != last.first + last.commits:
            return
        if self._tag is not None and first.previous_tag != self._tag:
            self._invalid("what is not sealed yet does not follow what is", last.end)
        pending(self._segment, first.number, last.end, self._history, self._report)

    def _invalid(self, reason: str, offset: int, index: int | None = None) -> None:
        self._report.invalid(reason, segment=self._segment.generation, offset=offset, leaf=index)


def pending(segment: Segment, number: int, offset: int, history: History, report: Report) -> None:
    """Report the commits from `number` at `offset` on: they are on disk and not sealed yet."""
    commits = list(segment.commits(number, offset))
    if not commits:
        return
    size = sum(commit.size for commit in commits)
    report.pending.append(Pending(segment.generation, offset, len(commits), size))
    late = max(history.late_s(segment, commit) for commit in commits)
    if late > SILENCE_S:
        reason = f"it was not sealed for {late:.0f} s" if history.sealed_ns else "it is not sealed"
        report.incomplete(reason, segment=segment.generation, offset=offset)


def _log_key(state: Path, vkey: str | None, report: Report) -> LogKey:
    if vkey is not None:
        return LogKey.parse(vkey)
    report.notes.append("the log's key was taken from the directory itself: compare it with yours")
    try:
        return LogKey.parse((state / "ledger.pub").read_text("ascii"))
    except (OSError, UnicodeDecodeError) as wrong:
        raise NoteError(f"there is no ledger.pub in {state}") from wrong


def _appliance_key(state: Path, key: Path | None, report: Report) -> bytes | None:
    path = state / "appliance.key" if key is None else key
    try:
        found = bytes.fromhex(path.read_text("ascii").strip())
    except (OSError, ValueError) as wrong:
        if key is not None:
            raise NoteError(f"{key} is no appliance key") from wrong
        report.notes.append("there is no appliance.key: content was not opened")
        return None
    if len(found) != 32:
        raise NoteError(f"{path} is no appliance key")
    return found
