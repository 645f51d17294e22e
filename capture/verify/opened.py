"""Opens the content of one segment with the appliance's key: from its file, or from its packs.

From packs each commit is put together and encrypted again: only what was sealed gives the hash that
the log has of it. So the sealed store is proved to hold all that the segment held.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from capture.verify.packs import Packs, Slots
from capture.verify.parts import CannotOpen, PartError, Parts, sealed_again

if TYPE_CHECKING:
    from pathlib import Path

    from capture.verify.packs import AnySegment
    from capture.verify.parts import Decompress
    from capture.verify.report import Report
    from capture.verify.segment import Commit, Segment


#: Runs of frames, and where each begins in its commit's plaintext.
Runs = list[tuple[int, memoryview]]


class Opener:
    """What it takes to open segments."""

    def __init__(
        self, key: bytes, evidence: Path, decompress: Decompress | None, report: Report
    ) -> None:
        self.wrapping = AESGCM(key)
        self.key_id = sha256(b"narrows key id\0" + key).digest()[:8]
        self.evidence, self.decompress, self.report = evidence, decompress, report

    def box(self, segment: AnySegment) -> AESGCM | None:
        """Return what opens a segment's commits; None, and a finding, when nothing does."""
        context, wrapped, commitment = segment.wrapped
        where = {"segment": segment.generation, "offset": 0}
        try:
            data_key = self.wrapping.decrypt(wrapped[:12], wrapped[12:], context)
        except InvalidTag:
            self.report.invalid("its data key does not open", **where)
            return None
        if sha256(b"narrows key commitment\0" + data_key).digest() != commitment:
            self.report.invalid("its data key breaks its commitment", **where)
            return None
        return AESGCM(data_key)

    def open(self, segment: AnySegment) -> Opened | None:
        """Return a segment's content; None, and a finding or a note, when it cannot be opened."""
        if segment.key_id != self.key_id:
            self.report.incomplete(
                "it is encrypted under another appliance key", segment=segment.generation, offset=0
            )
            return None
        if isinstance(segment, Packs):
            return OpenedPacks(self, segment)
        box = self.box(segment)
        return None if box is None else OpenedFile(segment, box, self.report)


class OpenedFile:
    """The content of a segment's file."""

    def __init__(self, segment: Segment, box: AESGCM, report: Report) -> None:
        self._segment, self._box, self._report = segment, box, report
        self.missing: set[int] = set()  #: sessions whose frames are left out

    def runs(self, commit: Commit, hashed: bytes) -> Runs | None:
        """Return a commit's plaintext in one run; None, and a finding, when there is none."""
        del hashed
        raw = self._segment.recent(commit)
        nonce, ciphertext, associated = self._segment.sealed_box(raw, commit)
        try:
            plaintext = self._box.decrypt(nonce, ciphertext, associated)
        except InvalidTag:
            self._report.invalid(
                "the commit does not authenticate", segment=self._segment.generation,
                offset=commit.offset,
            )  # fmt: skip
            return None
        self._report.opened = True
        return [(0, memoryview(plaintext))]


class OpenedPacks:
    """The content of a segment's packs; one pack at a time is in memory."""

    def __init__(self, opener: Opener, segment: Packs) -> None:
        self._opener, self._segment, self._report = opener, segment, opener.report
        self._box: AESGCM | None = None
        self._first = -1
        self._parts: Parts | None = None
        self.missing: set[int] = set()  #: sessions whose frames are left out, in this pack
        if segment.wrapped[1]:
            self._box = opener.box(segment)
        elif not self._some_destroyed():
            self._report.incomplete(
                "its key was destroyed, and no session's: its commits cannot be made again",
                segment=segment.generation,
            )

    def runs(self, commit: Commit, hashed: bytes) -> Runs | None:
        """Return a commit's frames, without those of `missing` sessions; None, and a finding or a
        note, when they cannot be opened.
        """
        pack = self._segment.pack_of(commit.number)
        if pack.first != self._first:
            self._first, self._parts = pack.first, None
            self._load()
        if self._parts is None:
            return None
        runs = self._parts.runs(commit)
        plaintext = b"".join(frames for _, frames in runs)
        where = {"segment": self._segment.generation, "offset": commit.offset}
        if len(plaintext) != commit.plain:
            if not self.missing:
                self._report.invalid("the pack does not hold all of the commit", **where)
                return None
        elif self._box is not None:
            made = sealed_again(commit, self._segment.generation, plaintext, self._box)
            if made != (self._segment.tag(commit), hashed):
                self._report.invalid("the pack does not hold what the commit held", **where)
                return None
        self._report.opened = True
        return runs

    def _load(self) -> None:
        pack, opener = self._segment.pack_of(self._first), self._opener
        try:
            self._parts = Parts(
                opener.evidence, pack, self._segment.incarnation, self._segment.generation,
                opener.wrapping, opener.decompress,
            )  # fmt: skip
            self.missing = self._parts.missing
        except CannotOpen:
            note = "content of the sealed store was not opened: nothing here decompresses zstd"
            if note not in self._report.notes:
                self._report.notes.append(note)
        except (OSError, PartError) as wrong:
            place: dict[str, Any] = {"segment": self._segment.generation, "file": pack.path.name}
            self._report.invalid(str(wrong), **place)

    def _some_destroyed(self) -> bool:
        with Slots(self._opener.evidence, self._segment.incarnation) as slots:
            return any(
                not slots.get(entry.session)[0]
                for pack in self._segment.packs
                for entry in pack.entries
            )


Opened = OpenedFile | OpenedPacks
