"""One verification: the log first, then the bytes on disk against it, then what is not sealed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib
import os
import re
from typing import TYPE_CHECKING, Any

from capture.verify import leaf as leaves
from capture.verify.commits import Bytes, pending
from capture.verify.content import Content
from capture.verify.history import History, session_number
from capture.verify.log import Log, read_kept
from capture.verify.note import LogKey, NoteError
from capture.verify.opened import Opener
from capture.verify.packs import Pack, Packs
from capture.verify.report import Report
from capture.verify.segment import BLOCK, Segment, SegmentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from capture.verify.history import Sealed
    from capture.verify.packs import AnySegment
    from capture.verify.parts import Decompress

_SESSION = re.compile("[0-9a-hjkmnp-tv-z]{13}")
_SEGMENT = re.compile("[0-9a-f]{8}")


def verify(
    state: Path,
    what: str = "all",
    vkey: str | None = None,
    *,
    key: Path | None = None,
    kept: Sequence[Path] = (),
    decompress: Decompress | None = None,
) -> Report:
    """Verify the evidence in a state directory, which may be in use.

    `what`: "all", a segment (8 hex digits) or a session (13 letters); ValueError for another word.
    `vkey` is the log's verifier key; without it ledger.pub of the state directory is believed.
    `key` is the appliance's key file; without it appliance.key is used if it is there. `kept` are
    checkpoints that an auditor kept. `decompress` gives back the bytes that a zstd frame was made
    of, whose number it is told; without it that of Python 3.14 is used, if this is one.
    """
    if what != "all" and not _SESSION.fullmatch(what) and not _SEGMENT.fullmatch(what):
        raise ValueError(f"{what!r} is neither all, nor a segment, nor a session")
    report = Report(what)
    try:
        with _unchanged(state / "evidence" / "segments"):
            _Check(state, what, vkey, key, kept, report, decompress or _own_zstd()).run()
    except NoteError as wrong:
        report.invalid(str(wrong), file="checkpoint")
    return report


@contextlib.contextmanager
def _unchanged(segments: Path) -> Iterator[None]:
    """Keep the seal from letting go of files while they are checked: it needs this lock for it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a copy may lie where nothing can be locked
            folder = os.open(segments, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_SH)
        yield


def _own_zstd() -> Decompress | None:
    """Return the decompression of Python's own library, which has one from 3.14 on."""
    try:
        zstd = importlib.import_module("compression.zstd")
    except ImportError:
        return None
    return lambda data, _size: bytes(zstd.decompress(data))


class _Check:
    """The steps of one verification."""

    def __init__(
        self, state: Path, what: str, vkey: str | None, key: Path | None, kept: Sequence[Path],
        report: Report, decompress: Decompress | None,
    ) -> None:  # fmt: skip
        self._report, self._what, self._decompress = report, what, decompress
        self._evidence = state / "evidence"
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
            opener = Opener(self._appliance_key, self._evidence, self._decompress, self._report)
            self._content = Content(opener, self._history, log, self._what)
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
        packs = any((self._evidence / "sealed").glob("*.pack"))
        if any(path.is_file() for path in self._ledger.glob("tile/**/*")):
            self._report.invalid("the checkpoint is missing", file="checkpoint")
        elif packs or (self._evidence / "seal.state").exists():
            self._report.invalid("there was a log, and it is gone", file="checkpoint")
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
        self._packs(generation, sealed)
        try:
            with self._open(generation, sealed) as segment:
                self._report.segments += 1
                Bytes(segment, sealed, self._history, self._content, self._report).run()
        except FileNotFoundError:
            self._lost(generation, "the segment is missing")
        except (OSError, SegmentError) as wrong:
            self._lost(generation, str(wrong))

    def _open(self, generation: int, sealed: Sealed) -> AnySegment:
        try:
            return Segment(self._segments / f"{generation:08x}.seg")
        except FileNotFoundError:
            if not sealed.packs:
                raise
            if not sealed.packs[-1].last:
                reason = "the segment is missing, and its packs are not signed to its end"
                raise SegmentError(reason) from None
            return Packs(self._evidence, generation)

    def _packs(self, generation: int, sealed: Sealed) -> None:
        """Compare each pack that the log names with the log, byte for byte."""
        for named in sealed.packs:
            name = f"{generation:08x}.{named.first:08x}.pack"
            where: dict[str, Any] = {"segment": generation, "file": name, "leaf": named.leaf}
            try:
                pack = Pack(self._evidence / "sealed" / name)
                faults = list(pack.faults())
            except (OSError, SegmentError) as wrong:
                missing = isinstance(wrong, FileNotFoundError)
                self._report.invalid("the pack is missing" if missing else str(wrong), **where)
                continue
            self._report.packs += 1
            self._report.size_bytes += pack.size
            said = (named.commits, named.parts, named.last, named.digest, named.size)
            if (pack.commits, len(pack.entries), pack.last, pack.digest, pack.size) != said:
                self._report.invalid("the pack's head is not as sealed", **where)
            for fault in faults:
                self._report.invalid(fault, **where)

    def _unknown_packs(self) -> None:
        """Packs that no leaf names are being made, as long as their segment's file is there."""
        for path in sorted((self._evidence / "sealed").glob("*.pack")):
            words = path.name.split(".")
            if len(words) != 3 or not all(map(_SEGMENT.fullmatch, words[:2])):
                continue
            generation, first = int(words[0], 16), int(words[1], 16)
            sealed = self._history.segments.get(generation)
            named = sealed is not None and any(pack.first == first for pack in sealed.packs)
            if not named and not (self._segments / f"{words[0]}.seg").exists():
                self._report.invalid(
                    "the log does not know the pack", segment=generation, file=path.name
                )

    def _lost(self, generation: int, reason: str) -> None:
        self._report.invalid(reason, segment=generation, offset=0)
        if self._content is not None:
            self._content.lost()

    def _unsealed(self) -> None:
        """Look at the segments that the log does not know."""
        if self._what != "all" or not self._segments.is_dir():
            return
        self._unknown_packs()
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
