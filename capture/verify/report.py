"""What the verifier found, for people and programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

#: So many findings are kept in full; the rest is only counted.
MOST_FINDINGS = 1000


class Level(Enum):
    """How bad a finding is."""

    INVALID = "invalid"  #: something is not as it was sealed
    INCOMPLETE = "incomplete"  #: nothing contradicts the log, but something is not there


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. What does not apply is None."""

    level: Level
    reason: str
    segment: int | None = None  #: generation
    offset: int | None = None  #: in the segment's file
    leaf: int | None = None  #: index in the ledger
    session: str | None = None
    file: str | None = None  #: path below the ledger's directory, or name of a pack

    def text(self) -> str:
        """Return one line, without a newline."""
        where = []
        if self.file is not None:
            where.append(self.file)
        if self.segment is not None:
            where.append(f"segment {self.segment:08x}")
        if self.offset is not None:
            where.append(f"offset {self.offset}")
        if self.session is not None:
            where.append(f"session {self.session}")
        if self.leaf is not None:
            where.append(f"leaf {self.leaf}")
        return f"{self.level.value}: {', '.join(where) or 'ledger'}: {self.reason}"

    def json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "level": self.level.value,
            "segment": None if self.segment is None else f"{self.segment:08x}",
            "offset": self.offset,
            "leaf": self.leaf,
            "session": self.session,
            "file": self.file,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Pending:
    """What lies in one segment after the last sealed commit."""

    segment: int
    offset: int
    commits: int
    size_bytes: int

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "segment": f"{self.segment:08x}",
            "offset": self.offset,
            "commits": self.commits,
            "bytes": self.size_bytes,
        }


@dataclass(slots=True)
class Report:
    """The outcome of one verification."""

    what: str = "all"
    origin: str = ""
    leaves: int = 0  #: size of the signed tree
    checkpoint: str = ""  #: its root, base64; empty when there is none
    sealed: str = ""  #: time of the last checkpoint, as its heartbeat says
    segments: int = 0  #: checked against the bytes on disk
    packs: int = 0  #: of the sealed store, checked against the bytes on disk
    commits: int = 0
    size_bytes: int = 0
    sessions: dict[str, int] = field(
        default_factory=lambda: {"opened": 0, "closed": 0, "cut": 0, "open": 0}
    )
    gaps: int = 0  #: recorded gaps: the log itself says that something was not recorded
    opened: bool = False  #: whether content was decrypted and compared with the log
    findings: list[Finding] = field(default_factory=list)
    unlisted: int = 0  #: findings beyond the first thousand
    pending: list[Pending] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Return 0 for valid, 1 for invalid, 2 for incomplete."""
        levels = {finding.level for finding in self.findings}
        if Level.INVALID in levels:
            return 1
        return 2 if levels else 0

    @property
    def ok(self) -> bool:
        """Say whether there is nothing to find fault with."""
        return not self.findings

    def invalid(self, reason: str, **where: Any) -> None:
        """Add a finding: something is not as it was sealed."""
        self._add(Finding(Level.INVALID, reason, **where))

    def incomplete(self, reason: str, **where: Any) -> None:
        """Add a finding: something is not there."""
        self._add(Finding(Level.INCOMPLETE, reason, **where))

    def _add(self, finding: Finding) -> None:
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(finding)
        else:
            self.unlisted += 1
            if finding.level is Level.INVALID and self.exit_code != 1:
                self.findings[-1] = finding

    def json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "ok": self.ok,
            "exit": self.exit_code,
            "what": self.what,
            "origin": self.origin,
            "leaves": self.leaves,
            "checkpoint": self.checkpoint,
            "sealed": self.sealed,
            "segments": self.segments,
            "packs": self.packs,
            "commits": self.commits,
            "bytes": self.size_bytes,
            "sessions": self.sessions,
            "gaps": self.gaps,
            "opened": self.opened,
            "findings": [finding.json() for finding in self.findings],
            "unlisted": self.unlisted,
            "pending": [entry.json() for entry in self.pending],
            "notes": self.notes,
        }

    def text(self) -> str:
        """Return the report for a person."""
        word = {0: "valid", 1: "INVALID", 2: "incomplete"}[self.exit_code]
        lines = [
            f"{word}: {self.what}",
            f"  log {self.origin or '-'}: {self.leaves} leaves, root {self.checkpoint or '-'}",
            f"  last sealed {self.sealed or 'never'}",
            f"  {self.segments} segments with {self.commits} commits, {self.size_bytes} bytes",
            f"  {self.packs} packs",
            f"  content {'opened and compared' if self.opened else 'not opened'}",
            "  sessions: " + ", ".join(f"{count} {name}" for name, count in self.sessions.items()),
        ]
        if self.gaps:
            lines.append(f"  {self.gaps} gaps are recorded")
        if self.pending:
            commits = sum(entry.commits for entry in self.pending)
            lines.append(f"  pending: {commits} commits in {len(self.pending)} segments")
        lines += [f"  {finding.text()}" for finding in self.findings]
        if self.unlisted:
            lines.append(f"  and {self.unlisted} findings more")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
