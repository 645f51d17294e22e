"""The sealer: makes ledger leaves of commits, and signs a checkpoint over them.

`capture.seal` hands it every commit that `capture.follow` gives. Theory of operation: `take`
collects leaves; `flush` appends them all, with the run of commits that they come from, in one step
of the ledger. So the `segment` leaves on disk say exactly which commits are sealed, whatever died
when. On a start, what was sealed after the last saved state is read again *quietly*: tallies grow,
no leaf is made. Nothing is sealed twice and nothing is passed over.

A checkpoint never promises what a power loss could take: segments are synced before it is signed.
"""

from __future__ import annotations

import contextlib
import os
import time
from struct import pack
from typing import TYPE_CHECKING

import orjson

from capture import entries, leaves, records
from capture.entries import Place
from capture.errors import EvidenceError
from capture.follow import Cursor, Damage, Followed
from capture.ledger import Ledger, load_signer, sync_directory
from capture.moment import rfc3339
from capture.run import Run, header_digest, hot
from capture.sealstate import Cut, SealState
from capture.segfile import boot_id
from capture.tally import Tally, read_commit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from capture.follow import Unread
    from capture.note import Checkpoint
    from capture.packing import Packed
    from capture.store import Store

SAVE_S = 30.0

_OPEN = records.KINDS[records.SessionOpen]
_CLOSE = records.KINDS[records.SessionClose]
_START = records.KINDS[records.Start]
_STOP = records.KINDS[records.Stop]
_RECOVERED = records.KINDS[records.Recovered]
_WANTED = frozenset({_OPEN, _CLOSE, *entries.KINDS})


class Sealer:
    """The ledger's only writer; the caller sees to it that there is only one."""

    def __init__(self, store: Store, pace_s: float = 5.0) -> None:
        """Open the ledger, or begin one, and find out how far it is.

        EvidenceError when the ledger on disk is not the one that was signed last.
        """
        self._store = store
        self._pace_s = pace_s
        self._boot = boot_id().hex()
        self._ledger = Ledger(store.ledger, load_signer(store))
        self._path = store.evidence / "seal.state"
        self._state, size = SealState.load(self._path, self._ledger)
        self._saved_at = time.monotonic()
        self._sealed: dict[int, Cursor] = {}  #: ends of what was sealed after the saved state
        self._over: set[str] = set()  #: sessions that were cut after the saved state
        self._replay(size)
        self._runs: dict[int, Run] = {}
        self._made: list[bytes] = []  #: leaves of records, in the order of the commits
        self._unsigned: list[bytes] = []  #: leaves that the disk did not take yet
        self._settling: list[Cut] = []
        self._digests: dict[int, bytearray] = {}  #: SHA-256 of the commits, from the first on
        self._unsigned_packs: set[int] = set()  #: segments whose packs have no signed leaf yet
        self._quiet = False
        self._begin()

    def cursor(self, generation: int) -> Cursor:
        """Return the next commit that the sealer needs of a segment."""
        return self._state.cursor(generation)

    @property
    def waiting(self) -> int:
        """Return how many leaves wait for the next checkpoint."""
        return len(self._made) + len(self._runs) + len(self._unsigned)

    def take(self, followed: Followed) -> None:
        """Make the leaves of the next commit of a segment; earlier commits are passed over.

        Its `digest` is needed.
        """
        commit, generation = followed.commit, followed.generation
        if commit.number < self._state.cursor(generation).number:
            return
        sealed = self._sealed.get(generation)
        self._quiet = sealed is not None
        if not self._quiet:
            run = self._runs.get(generation)
            if run is None:
                path = self._store.segment(generation)
                header = header_digest(path) if commit.number == 0 else ""
                run = self._runs[generation] = Run(followed, header)
            run.add(followed)
        self._note(generation, commit.number, followed.digest)
        if followed.plaintext:
            self._read(followed)
        after = Cursor(commit.number + 1, commit.offset + commit.total_bytes)
        self._state.advance(generation, after, final=commit.final)
        if sealed is not None and after.number >= sealed.number:
            del self._sealed[generation]

    def _note(self, generation: int, number: int, digest: bytes) -> None:
        """Keep the digest for `capture.packing`, which would have to hash all of it again."""
        known = self._digests.setdefault(generation, bytearray())
        if len(known) == number * 32:
            known += digest

    def digests(self, generation: int, commits: int) -> list[bytes]:
        """Return the SHA-256 of each commit of a segment; none when they are not all known."""
        known = self._digests.get(generation, b"")
        if len(known) != commits * 32:
            return []
        return [bytes(known[at : at + 32]) for at in range(0, len(known), 32)]

    def whole(self, generation: int) -> bool:
        """Say whether every commit that was taken of a segment is in the signed log, undamaged."""
        return (
            generation not in self._runs
            and generation not in self._sealed
            and not self._unsigned
            and all(damaged != generation for damaged, _ in self._state.damaged)
        )

    def unpacked(self, generation: int) -> int:
        """Return the number of the first commit of a segment that is in no pack; -1: all are."""
        if generation in self._state.packed:
            return -1
        return self._state.packing.get(generation, 0)

    def packed(self, made: Packed) -> None:
        """Make the leaf of a pack that is on disk; the next one of its segment follows it."""
        leaf = leaves.Pack(
            commits=made.commits, digest=leaves.base64_of(made.digest), first=made.first,
            generation=made.generation, last=made.last, parts=made.parts, size=made.size,
            time=rfc3339(time.time_ns()),
        )  # fmt: skip
        self._made.append(leaves.pack(leaf))
        self._state.pack(made.generation, made.first + made.commits, last=made.last)
        self._unsigned_packs.add(made.generation)
        if made.last:
            self._digests.pop(made.generation, None)

    def replaced(self, generation: int) -> bool:
        """Say whether signed leaves name packs for all of a segment: its file is not needed."""
        return generation in self._state.packed and generation not in self._unsigned_packs

    def damaged(self, damage: Damage) -> None:
        """Put on record that a segment is not as it was written; once for each place."""
        place = damage.generation, damage.offset
        if place not in self._state.damaged:
            self._state.damaged.add(place)
            leaf = leaves.Damaged(
                generation=damage.generation, offset=damage.offset, reason=damage.reason,
                time=rfc3339(time.time_ns()),
            )  # fmt: skip
            self._made.append(leaves.pack(leaf))

    def settle(self, following: Callable[[int], bool]) -> None:
        """Cut the sessions of dead incarnations that were read to their end.

        Call it after the commits of each step of the follower. A Recovered record is settled in the
        second call after it was taken at the earliest: by then the follower has looked for all
        segments that were there when the record was written.
        """
        self._quiet = False
        for cut in self._settling:
            if not following(cut.incarnation):
                place = Place(cut.generation, cut.commit, 0, cut.time_ns)
                self._cut(self._state.tallies.pop(cut.incarnation, {}), place, "recovery")
                self._state.cuts.remove(cut)
        self._settling = list(self._state.cuts)

    def flush(self, unread: Iterable[Unread] = ()) -> Checkpoint:
        """Seal what was taken, with one `hot` leaf for each segment in `unread`.

        OSError when the disk refuses: nothing is lost, the next call tries again.
        """
        self._sync()
        self._unsigned += [run.leaf() for run in self._runs.values()]
        self._unsigned += self._made
        self._runs, self._made = {}, []
        now = rfc3339(time.time_ns())
        for entry in unread:
            if entry.generation not in self._sealed:
                self._unsigned.append(hot(entry, now))
        self._unsigned.append(self._heartbeat(now))
        # All of it stays as it is until the disk has taken it: a checkpoint may have become visible
        # although its writing failed, and the next one must continue it.
        checkpoint = self._ledger.append(self._unsigned)
        self._unsigned = []
        self._unsigned_packs.clear()
        if not self._sealed and time.monotonic() - self._saved_at >= SAVE_S:
            with contextlib.suppress(OSError):  # it saves time only; the next one will do
                self._save()
        return checkpoint

    def caught_up(self) -> None:
        """Everything on disk was given: what was sealed and did not come is not there any more."""
        for generation, end in self._sealed.items():
            self._state.advance(generation, end, final=False)
        self._sealed.clear()

    def close(self) -> None:
        """Seal what was taken and the seal's own stop, and save the state."""
        stop = leaves.Stop(commit=0, generation=0, reason="stopped", time=rfc3339(time.time_ns()))
        self._made.append(leaves.pack(stop))
        self.flush()
        if not self._sealed:
            self._save()

    def _begin(self) -> None:
        if self._ledger.size == 0:
            _refuse_remains(self._store)
            genesis = leaves.Genesis(
                boot=self._boot, origin=self._ledger.checkpoint.origin, time=rfc3339(time.time_ns())
            )
            self._ledger.append([leaves.pack(genesis)])
        start = leaves.Start(
            boot=self._boot, commit=0, generation=0, role="seal", time=rfc3339(time.time_ns())
        )
        self._made.append(leaves.pack(start))

    def _replay(self, size: int) -> None:
        """Take over what the ledger says since the saved state."""
        for entry in self._ledger.entries(size):
            leaf = orjson.loads(entry)
            match leaf["type"]:
                case "segment":
                    end = Cursor(leaf["first"] + leaf["commits"], leaf["end"])
                    self._sealed[leaf["generation"]] = end
                case "pack":
                    commits = leaf["first"] + leaf["commits"]
                    self._state.pack(leaf["generation"], commits, last=leaf["last"])
                case "session_close" if leaf["by"] == "recovery":
                    self._over.add(leaf["session"])
                case "config":
                    self._state.config = leaf["sha256"]
                case "damaged":
                    self._state.damaged.add((leaf["generation"], leaf["offset"]))

    def _read(self, followed: Followed) -> None:
        """Tally the commit's frames, and make the leaves of its records."""
        commit, generation = followed.commit, followed.generation
        tallies = self._state.tallies.setdefault(followed.incarnation, {})
        where = followed.digest + pack("<II", generation, commit.number)

        def found(kind: int, session: int, time_ns: int, payload: bytes) -> None:
            place = Place(generation, commit.number, session, time_ns)
            try:
                self._record(kind, place, payload, tallies, where)
            except (ValueError, KeyError, TypeError):
                self.damaged(Damage(generation, commit.offset, "record"))

        touched, end = read_commit(
            followed.plaintext, followed.incarnation, tallies, _WANTED, found
        )
        for tally in touched:
            tally.fold(where)
        if end != len(followed.plaintext):
            self.damaged(Damage(generation, commit.offset, "frames"))
        if not tallies:
            del self._state.tallies[followed.incarnation]

    def _record(
        self, kind: int, place: Place, payload: bytes, tallies: dict[int, Tally], where: bytes
    ) -> None:
        if kind == _OPEN:
            tally = tallies.get(place.session)
            if tally is not None:
                tally.opened_ns = place.time_ns
                self._make(entries.session_open, place, tally.name)
        elif kind == _CLOSE:
            tally = tallies.pop(place.session, None)
            if tally is not None:
                tally.fold(where)
                self._make(entries.session_close, place, tally, orjson.loads(payload))
        else:
            fields = orjson.loads(payload)
            self._make(entries.KINDS[kind], place, fields)
            if kind == _START:
                self._configured(place, fields["config_sha256"])
            elif kind == _STOP:
                for tally in tallies.values():
                    tally.fold(where)
                self._cut(tallies, place, "stop")
            elif kind == _RECOVERED:
                cut = Cut(fields["incarnation"], place.generation, place.commit, place.time_ns)
                self._state.cuts.append(cut)

    def _configured(self, place: Place, digest: str) -> None:
        if digest and digest != self._state.config and not self._quiet:
            self._state.config = digest
            self._make(entries.config, place, digest)

    def _cut(self, tallies: dict[int, Tally], place: Place, by: str) -> None:
        """End every session of a writer that ended without closing them."""
        for tally in tallies.values():
            if tally.name not in self._over:
                self._make(entries.session_cut, place, tally, by)
        tallies.clear()

    def _make(self, maker: Callable[..., leaves.Leaf | None], *given: object) -> None:
        if not self._quiet:
            leaf = maker(*given)
            if leaf is not None:
                self._made.append(leaves.pack(leaf))

    def _sync(self) -> None:
        """Make the commits of the runs, and the names of new segments, survive power loss."""
        for generation, run in self._runs.items():
            with contextlib.suppress(FileNotFoundError):  # the verifier will miss it
                fd = os.open(self._store.segment(generation), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # A final run's leaf promises the file's length, which fdatasync may leave out.
                    (os.fsync if run.ends else os.fdatasync)(fd)
                finally:
                    os.close(fd)
        if any(run.begins for run in self._runs.values()):
            sync_directory(self._store.segments)

    def _heartbeat(self, now: str) -> bytes:
        return leaves.pack(
            leaves.SealHeartbeat(
                boot=self._boot, mono_ms=time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000,
                open=self._state.open, pace_ms=int(self._pace_s * 1000), time=now,
            )
        )  # fmt: skip

    def _save(self) -> None:
        self._state.save(self._path, self._ledger)
        self._saved_at = time.monotonic()


def _refuse_remains(store: Store) -> None:
    """EvidenceError when a log without a checkpoint has more than a killed first append leaves."""
    first = {"tile/0/000.p/1", "tile/entries/000.p/1"}
    for path in store.ledger.glob("tile/**/*"):
        name = str(path.relative_to(store.ledger))
        if path.is_file() and not path.name.startswith(".") and name not in first:
            raise EvidenceError(f"{store.ledger} has tiles and no checkpoint; run evidence verify")
    if store.sealed_generations():
        raise EvidenceError(f"{store.sealed} has packs, and their log is gone; run evidence verify")
