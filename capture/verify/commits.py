"""The commits of one segment against the log, whether they lie in its file or in packs."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from capture.verify.history import SILENCE_S
from capture.verify.report import Pending
from capture.verify.segment import Segment
from capture.verify.tree import Tree, leaf

if TYPE_CHECKING:
    from capture.verify.content import Content
    from capture.verify.history import History, Hot, Run, Sealed
    from capture.verify.packs import AnySegment
    from capture.verify.report import Report
    from capture.verify.segment import Commit


class Bytes:
    """One segment's bytes against the log."""

    def __init__(
        self, segment: AnySegment, sealed: Sealed, history: History, content: Content | None,
        report: Report,
    ) -> None:  # fmt: skip
        self._segment, self._sealed, self._history = segment, sealed, history
        self._content, self._report = content, report
        self._tag: bytes | None = bytes(16)
        self._tags: dict[int, tuple[int, bytes]] = {}  #: number -> (end, tag), for hot leaves

    def run(self) -> None:
        """Compare header, sealed commits, hot commits, and what follows them."""
        segment, sealed = self._segment, self._sealed
        if segment.block is not None and sha256(segment.block).digest() != sealed.header:
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
            hashed = self._segment.digest(commit)
            if self._tag is not None and commit.previous_tag != self._tag:
                self._invalid(f"commit {number} does not follow the one before it", offset)
            if commit.base != base:
                self._history.broken(
                    commit.base, base, recovery=run.recovery, segment=self._segment.generation,
                    offset=offset,
                )  # fmt: skip
            tree.add(leaf(hashed))
            if self._content is not None:
                self._content.take(commit, hashed)
            self._report.commits += 1
            self._report.size_bytes += commit.size if isinstance(self._segment, Segment) else 0
            self._tag, offset, base = (
                self._segment.tag(commit), commit.end, commit.base + commit.plain,
            )  # fmt: skip
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
                self._tags[number] = commit.end, self._segment.tag(commit)
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


def pending(
    segment: AnySegment, number: int, offset: int, history: History, report: Report
) -> None:
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
