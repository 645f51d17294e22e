"""The sealed store: finished segments become packs, their files go, and nothing is lost by it,
whatever dies when.
"""

import os
import random
import shutil
import time
from dataclasses import replace

import pytest
from sealed_evidence import (
    REWRITE,
    close_session,
    evidence,
    one_of_each,
    open_session,
    say,
    whole_session,
)
from written_evidence import small_disk

from capture import index_query
from capture.frames import incarnation_of, session_name
from capture.index_fill import current, rebuild
from capture.keystore import SLOT, KeyStore
from capture.pack import CHUNK, PackedSegment
from capture.packing import Packer
from capture.reader import Reader, Side
from capture.sealed import RewriteSettings
from capture.sealer import Sealer
from capture.segfile import SegmentFile, SegmentHeader, boot_id
from capture.segments import open_segment
from capture.tail import SegmentReader


@pytest.fixture
def place():
    with evidence() as found:
        yield found


def write(place, sessions=60):
    """Write sessions over several segments, one of them from the first to the last."""
    writer = place.writer()
    one_of_each(writer)
    long = open_session(writer)
    at = (0, 0)
    found = [long]
    for _ in range(sessions):
        found.append(whole_session(writer, 300, 12_000))
        at = say(writer, long, 50, 3_000, at)
    close_session(writer, long, *at, sessions)
    writer.close()
    return found


def content(place, sessions, *, indexed=True):
    """Return every frame of each session, and check that nothing was left out."""
    if indexed:
        with current(place.store, place.keys) as index:
            return _content(Reader(place.store, place.keys, index), sessions)
    return _content(Reader(place.store, place.keys, None), sessions)


def _content(reader, sessions):
    found = {session: [(*f[:3], bytes(f.payload)) for f in reader.frames(session)]
             for session in sessions}  # fmt: skip
    assert not reader.damage
    reader.close()
    return found


def valid(place, **more):
    report = place.verify(**more)
    assert report.exit_code == 0, report.text()
    return report


def packs(place):
    return sorted(place.store.sealed.glob("*.pack"))


def test_what_was_rewritten_reads_as_it_did_before(place):
    sessions = write(place)
    before = content(place, sessions)
    size = sum(place.store.segment(g).stat().st_size for g in place.store.generations())
    place.rewritten()
    assert content(place, sessions) == before
    assert content(place, sessions[:3], indexed=False) == {s: before[s] for s in sessions[:3]}
    assert len(packs(place)) > len(place.store.sealed_generations()) > 2
    assert 0 < sum(pack.stat().st_size for pack in packs(place)) < size
    assert os.listdir(place.store.segments) == []
    for path in [*packs(place), *place.store.keys.iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o600


def test_one_side_of_a_session_reads_from_where_it_is_asked_to(place):
    sessions = write(place)
    place.rewritten()
    with current(place.store, place.keys) as index:
        reader = Reader(place.store, place.keys, index)
        whole = b"".join(piece.data for piece in reader.stream(sessions[0], Side.DOWN))
        for start in (0, 1, 70_000, len(whole) - 1):
            pieces = list(reader.stream(sessions[0], Side.DOWN, start))
            assert pieces[0].offset <= start
            assert b"".join(p.data for p in pieces)[start - pieces[0].offset :] == whole[start:]
        reader.close()


def test_a_commit_from_packs_is_the_commit_that_was_in_the_file(place):
    write(place)
    wanted = {}
    for generation in place.store.generations():
        with SegmentReader(place.store.segment(generation), place.keys) as segment:
            wanted[generation] = segment.header, segment.ends_final, [
                (commit, segment.load(commit, digest=True)) for commit in segment.commits()
            ]  # fmt: skip
    place.rewritten()
    assert place.store.all_generations() == list(wanted)
    for generation, expected in wanted.items():
        with open_segment(place.store, generation, place.keys) as segment:
            assert isinstance(segment, PackedSegment)
            assert expected == (segment.header, segment.ends_final, [
                (commit, segment.load(commit, digest=True)) for commit in segment.commits()
            ])  # fmt: skip


def test_a_store_without_its_index_is_whole_again_after_reindex(place):
    sessions = write(place)
    place.sealed()

    def rows():
        with current(place.store, place.keys) as index:
            tables = [name for (name,) in index.db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'search%'"
            )]  # fmt: skip
            return {t: sorted(map(repr, index.db.execute(f'SELECT * FROM "{t}"'))) for t in tables}

    before = rows()
    place.rewritten()
    for path in place.store.evidence.glob("index.sqlite*"):
        path.unlink()
    assert rebuild(place.store, place.keys) == len(sessions) + 1
    assert rows() == before


def test_the_sealed_store_verifies_with_and_without_key_and_library(place):
    write(place)
    place.rewritten()
    report = valid(place)
    assert report.opened
    assert report.packs == len(packs(place))
    report = valid(place, decompress=None)
    assert not report.opened
    assert any("decompresses" in note for note in report.notes)
    (place.state / "appliance.key").unlink()
    report = valid(place)
    assert not report.opened
    assert report.segments == len(place.store.all_generations())


def test_packs_that_are_not_compressed_are_opened_without_the_library(place):
    write(place)
    place.sealed()
    sealer = Sealer(place.store)
    packer = Packer(place.store, KeyStore(place.store, place.keys))
    for generation in place.store.generations():
        with SegmentReader(place.store.segment(generation), place.keys) as segment:
            sealer.packed(packer.pack(segment, list(segment.commits()), 0, compress=False))
        sealer.flush()
        place.store.segment(generation).unlink()
    report = place.verify(decompress=None)
    # Without the segments' own keys, which only a recycled segment leaves, something is missing.
    assert {finding.reason[:21] for finding in report.findings} == {"its key was destroyed"}
    assert report.opened


def test_a_seal_that_lost_its_state_reads_packs_again_and_goes_on(place):
    write(place)
    place.rewritten()
    (place.store.evidence / "seal.state").unlink()
    more = write(place, 20)
    place.rewritten()
    report = valid(place)
    assert report.sessions["open"] == 0
    assert len(content(place, more)) == 21


def test_only_what_nobody_needs_is_rewritten(place):
    """The end of a living writer's stream, and of a dead one that nobody has recovered, stays."""
    writer = place.writer()
    session = open_session(writer)
    at = (0, 0)
    while len(place.store.generations()) < 3:
        at = say(writer, session, 100, 30_000, at)
        writer.wait_durable()
    seal = place.seal(0.01, REWRITE)
    deadline = time.monotonic() + 30
    while len(place.store.generations()) > 1 and time.monotonic() < deadline:
        seal.step()
    newest = place.store.generations()
    assert len(newest) == 1
    held = writer.position
    close_session(writer, session, *at)
    writer.close()
    deadline = time.monotonic() + 30
    while place.store.generations() and time.monotonic() < deadline:
        seal.step()
    seal.close()
    assert held
    valid(place)
    frames = content(place, [session])[session]
    assert sum(len(frame[3]) for frame in frames if frame[0] == 2) == at[1]


def test_a_killed_writers_stream_is_recovered_although_its_older_segments_are_packs(place):
    with place.process("write", "10") as child:
        while len(place.store.generations()) < 3:
            child.stdout.readline()
    seal = place.seal(0.01, REWRITE)
    first = place.store.generations()[0]
    deadline = time.monotonic() + 30
    while first in place.store.generations() and time.monotonic() < deadline:
        seal.step()
    seal.close()
    left = place.store.generations()
    assert left
    assert left[0] > first
    with SegmentReader(place.store.segment(left[-1])) as segment:
        dead = segment.header.incarnation
    place.writer("gate-1").close()
    place.rewritten()
    report = valid(place)
    assert report.sessions["open"] == 0
    assert not any("position" in finding.reason for finding in report.findings)
    assert (place.store.keys / f"{dead:08x}").exists()


def test_a_segment_in_which_nothing_was_stored_goes_too(place):
    sessions = write(place, 20)
    incarnation = incarnation_of(sessions[0])
    header = SegmentHeader(
        incarnation, incarnation, "gate-0", 1, 256 << 10, boot_id(), place.keys.key_id
    )
    SegmentFile(place.store.segment(incarnation), header, place.keys).close()
    place.rewritten()
    assert incarnation not in place.store.sealed_generations()
    valid(place)


def test_whatever_step_is_the_last_before_a_kill_the_next_seal_goes_on(place):
    """After each step of the seal a copy of the state is what a kill there would leave."""
    sessions = write(place, 25)
    before = content(place, sessions)
    seal = place.seal(0.01, REWRITE)
    copies = []
    deadline = time.monotonic() + 60
    while place.store.generations() and time.monotonic() < deadline:
        listed = state_of(place)
        seal.step()
        if state_of(place) != listed:
            copies.append(place.copy())
    seal.close()
    assert len(copies) > 3
    for copy in copies:
        valid(copy)
        copy.rewritten()
        valid(copy)
        assert content(copy, sessions) == before
        shutil.rmtree(copy.state)


def state_of(place):
    """Return what says how far the seal is."""
    checkpoint = place.store.ledger / "checkpoint"
    return (sorted(p.name for p in place.store.sealed.iterdir()), place.store.generations(),
            checkpoint.read_bytes() if checkpoint.exists() else b"")  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_a_seal_killed_at_any_moment_rewrites_everything_once(place, seed):
    chance = random.Random(seed)
    with place.process("write", "20"), place.process("write", "31"):
        for _ in range(4):
            with place.process("rewrite", "0.02"):
                time.sleep(chance.uniform(0.0, 0.4))
            valid(place)
    place.writer("gate-9").close()
    place.rewritten()
    report = valid(place)
    assert report.opened
    assert report.sessions["open"] == 0
    assert report.sessions["opened"] > 10
    with current(place.store, place.keys) as index:
        ids = [number for (number,) in index.db.execute("SELECT id FROM session")]
        assert len(ids) == report.sessions["opened"]
        assert all(_content(Reader(place.store, place.keys, index), ids).values())


def test_a_file_that_lost_its_name_and_was_not_removed_goes_at_the_next_start(place):
    write(place)
    place.sealed()
    place.rewritten()
    left = place.store.segments / "00000001.gone"
    left.write_bytes(b"x" * 8192)
    (place.store.sealed / "00000001.00000000.new").write_bytes(b"half")
    place.seal(0.01, REWRITE).close()
    assert os.listdir(place.store.segments) == []
    assert all(path.suffix == ".pack" for path in place.store.sealed.iterdir())


def test_files_stay_while_somebody_verifies(place):
    import fcntl

    write(place)
    place.sealed()
    folder = os.open(place.store.segments, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    before = place.store.generations()
    seal = place.seal(0.01, REWRITE)
    until = time.monotonic() + 20
    while time.monotonic() < until and place.store.sealed_generations() != before:
        seal.step()
    for _ in range(20):
        seal.step()
    assert place.store.generations() == before
    valid(place)
    os.close(folder)
    seal.close()
    place.rewritten()


def test_a_damaged_segment_stays_as_it_is(place):
    write(place)
    first = place.store.generations()[0]
    with SegmentReader(place.store.segment(first)) as segment:
        commit = list(segment.commits())[1]
    with place.store.segment(first).open("r+b") as file:
        file.seek(commit.offset + 100)
        file.write(b"\xff\x00\xff")
    seal = place.seal(0.01, REWRITE)
    until = time.monotonic() + 20
    while len(place.store.generations()) > 1 and time.monotonic() < until:
        seal.step()
    for _ in range(10):
        seal.step()
    seal.close()
    assert place.store.generations() == [first]


@pytest.mark.system
def test_a_full_disk_is_made_free_by_rewriting_from_the_space_held_back(place):
    with small_disk(32 << 20) as disk:
        state = disk / "state"
        full = type(place)(state, place.run)
        rewrite = replace(REWRITE, window_bytes=1 << 20, reserve_bytes=6 << 20)
        seal = full.seal(0.01, rewrite)
        seal.step()
        sessions = write(full)
        with (disk / "other").open("wb") as other:
            while seal.step() and not full.store.sealed_generations():
                pass
            free = os.statvfs(disk)
            os.posix_fallocate(other.fileno(), 0, free.f_bavail * free.f_frsize)
        until = time.monotonic() + 60
        while full.store.generations() and time.monotonic() < until:
            seal.step()
        assert full.store.generations() == []
        (disk / "other").unlink()
        seal.close()
        valid(full)
        assert len(content(full, sessions)) == len(sessions)


def test_without_any_space_nothing_is_lost_and_the_seal_goes_on_later(place):
    """A disk that refuses packs: something else is where they are made."""
    sessions = write(place)
    before = content(place, sessions)
    generations = place.store.generations()
    seal = place.seal(0.01, REWRITE)
    for generation in generations:
        place.store.pack(generation, 0).with_suffix(".new").mkdir()
    for _ in range(30):
        seal.step()
    assert place.store.generations() == generations
    for generation in generations:
        place.store.pack(generation, 0).with_suffix(".new").rmdir()
    seal.close()
    place.rewritten()
    valid(place)
    assert content(place, sessions) == before


def destroyed(place, session):
    generations = []
    with current(place.store, place.keys) as index:
        generations = sorted({e.generation for e in index_query.extents(index, session)})
    KeyStore(place.store, place.keys).destroy(session, generations)
    return generations


def test_a_destroyed_key_makes_its_session_incomplete_and_nothing_else(place):
    sessions = write(place)
    place.rewritten()
    before = content(place, sessions)
    for gone in (sessions[5], sessions[0]):
        destroyed(place, gone)
        report = place.verify()
        assert report.exit_code == 2
        assert session_name(gone) in {finding.session for finding in report.findings}
        assert {f.reason for f in report.findings} == {"its data key was destroyed"}
    assert {f.session for f in report.findings} == {
        session_name(sessions[5]), session_name(sessions[0])
    }  # fmt: skip
    assert place.verify(session_name(gone)).exit_code == 2
    assert place.verify(session_name(sessions[7])).exit_code == 0
    left = [session for session in sessions[1:] if session != sessions[5]]
    assert content(place, left) == {session: before[session] for session in left}
    with current(place.store, place.keys) as index:
        reader = Reader(place.store, place.keys, index)
        assert list(reader.frames(gone)) == []
        assert "destroyed" in reader.damage[0].reason
        reader.close()
    assert rebuild(place.store, place.keys) == len(left) + 1
    (place.store.evidence / "seal.state").unlink()
    place.sealed()
    assert place.verify().exit_code == 2


def test_the_records_outside_of_sessions_have_a_key_of_their_own(place):
    sessions = write(place)
    place.rewritten()
    path = place.store.keys / f"{incarnation_of(sessions[0]):08x}"
    with path.open("r+b") as file:
        file.write(bytes(SLOT))
    (place.store.keys / "segments.0000").unlink()
    report = place.verify()
    assert report.exit_code == 2, report.text()
    told = {(finding.session, finding.reason[:21]) for finding in report.findings}
    assert told == {("0" * 13, "its data key was dest"), (None, "its key was destroyed")}


def test_a_key_that_is_being_destroyed_is_not_written_back(place):
    store = KeyStore(place.store, place.keys)
    keys = store.ensure(7, [7 << 40 | n for n in range(1, 200, 3)] + [0])
    assert len(set(keys.values())) == len(keys) == 68
    store.destroy(7 << 40 | 4, [])
    assert store.get(7, 7 << 40 | 4) is None
    again = store.ensure(7, [0, 7 << 40 | 1, 7 << 40 | 2])
    assert again[7 << 40 | 1] == keys[7 << 40 | 1]
    assert again[0] == keys[0]
    assert store.get(7, 7 << 40 | 4) is None


def reasons(place):
    report = place.verify()
    assert report.exit_code == 1, report.text()
    return " ".join(f"{finding.reason} {finding.file or ''}" for finding in report.findings)


def test_a_byte_changed_anywhere_in_a_pack_is_found(place):
    write(place, 12)
    place.rewritten()
    path = packs(place)[0]
    sound = path.read_bytes()
    with PackedSegment(place.store, place.store.all_generations()[0]) as segment:
        pack = segment.packs[0]
        edges = [e.offset for e in pack.entries.values()]
    for at in [0, 8, 12, 20, 30, 40, 70, 100, 150, 191, 200, 260, edges[0] - 40, edges[0],
               edges[0] + 40, edges[-1] + 5, len(sound) - 1]:  # fmt: skip
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        assert path.name in reasons(place) or at < 180
    path.write_bytes(sound[:-1])
    reasons(place)
    path.write_bytes(sound + b"\0")
    reasons(place)
    path.write_bytes(sound)
    valid(place)


def test_a_pack_that_is_missing_added_or_of_another_segment_is_found(place):
    write(place)
    place.rewritten()
    first, second = packs(place)[:2]
    content = first.read_bytes()
    first.unlink()
    assert "the pack is missing" in reasons(place)
    first.write_bytes(second.read_bytes())
    reasons(place)
    first.write_bytes(content)
    valid(place)
    shutil.copy(first, place.store.pack(0x777, 0))
    assert "does not know the pack" in reasons(place)


def test_a_wrapped_key_that_was_changed_or_moved_is_found(place):
    sessions = write(place)
    place.rewritten()
    path = place.store.keys / f"{incarnation_of(sessions[0]):08x}"
    sound = path.read_bytes()
    path.write_bytes(sound[: SLOT + 20] + b"\x77" + sound[SLOT + 21 :])
    assert "does not open" in reasons(place)
    path.write_bytes(sound[SLOT : 2 * SLOT] + sound[SLOT:])
    assert "does not open" in reasons(place)


def test_who_has_every_key_cannot_put_other_content_into_a_pack(place):
    """The attack: after a segment was sealed, its pack is made of another plaintext, with leaves
    that are signed by the log's own key, and the file is let go.
    """
    write(place)
    place.sealed()
    sealer = Sealer(place.store)
    generation = place.store.generations()[0]
    keystore = KeyStore(place.store, place.keys)

    class Lies(SegmentReader):
        def open(self, raw, commit):
            plaintext = super().open(raw, commit)
            return plaintext.replace(b"192.0.2.10", b"192.0.2.99")

    with Lies(place.store.segment(generation), place.keys) as segment:
        commits = list(segment.commits())
        digests = [segment.digest(segment.raw(commit)) for commit in commits]
        made = Packer(place.store, keystore).pack(segment, commits, 0, digests)
    sealer.packed(made)
    sealer.flush()
    from capture.recycle import recycle

    assert recycle(place.store, keystore, generation)
    assert "does not hold what the commit held" in reasons(place)


def test_a_pack_that_leaves_out_a_session_is_found(place):
    sessions = write(place)
    place.sealed()
    sealer = Sealer(place.store)
    generation = place.store.generations()[0]
    keystore = KeyStore(place.store, place.keys)

    class Forgets(Packer):
        def _add(self, made, session, held, data_key, *, compress):
            if session != sessions[3]:
                super()._add(made, session, held, data_key, compress=compress)

    with SegmentReader(place.store.segment(generation), place.keys) as segment:
        made = Forgets(place.store, keystore).pack(segment, list(segment.commits()), 0)
    sealer.packed(made)
    sealer.flush()
    from capture.recycle import recycle

    assert recycle(place.store, keystore, generation)
    assert "does not hold all of the commit" in reasons(place)


def test_a_ledger_that_is_gone_is_not_begun_anew_beside_packs(place):
    from capture.errors import EvidenceError

    write(place)
    place.rewritten()
    shutil.rmtree(place.store.ledger)
    assert place.verify().exit_code == 1
    (place.store.evidence / "seal.state").unlink()
    assert place.verify().exit_code == 1
    place.store.prepare()
    with pytest.raises(EvidenceError, match="log is gone"):
        place.seal()


def test_parts_of_any_length_come_back(place):
    writer = place.writer()
    session = open_session(writer)
    at = (0, 0)
    for length in (1, CHUNK - 40, CHUNK, CHUNK + 1, 3 * CHUNK):
        at = say(writer, session, 1, length, at)
    close_session(writer, session, *at, 5)
    writer.close()
    before = content(place, [session])
    place.rewritten()
    assert content(place, [session]) == before


def test_what_is_in_the_sealed_store_is_not_there_in_clear(place):
    write(place)
    place.rewritten()
    for path in place.store.evidence.rglob("*"):
        if path.is_file() and "index" not in path.name:
            assert b"192.0.2.10" not in path.read_bytes()


def test_a_counter_that_was_lost_is_not_begun_anew_beside_packs(place):
    write(place)
    place.rewritten()
    newest = place.store.all_generations()[-1]
    (place.store.evidence / "generation").unlink()
    assert place.store.next_generation() > newest


def test_the_backlog_is_told(place):
    write(place)
    place.sealed()
    seal = place.seal(0.01, RewriteSettings(after_s=3600, reserve_bytes=0))
    seal.step()
    told = (place.store.evidence / "seal.backlog").read_text()
    seal.close()
    assert f'"segments":{len(place.store.generations())}' in told
