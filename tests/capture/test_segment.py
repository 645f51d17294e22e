"""The writer in one process: what is published is what is read, in order, through every turn of
chunks and segments.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from written_evidence import TINY, Frame, Place, place

from capture.errors import EvidenceError
from capture.records import KINDS, Gap, Start, Stop
from capture.segfile import SegmentFile, SegmentHeader, boot_id, nonce
from capture.segment import SegmentWriter
from capture.settings import COMMIT_BYTES_SOFT, SMALL, WriterSettings
from capture.store import READERS
from capture.tail import SegmentReader


@pytest.fixture
def where():
    with place() as found:
        yield found


def published(where: Place, incarnation: int) -> list[Frame]:
    """Return the frames without the writer's own first and last record."""
    first, *frames, last = where.frames(incarnation)
    assert (first.kind, last.kind) == (KINDS[Start], KINDS[Stop])
    return frames


#: (kind, session, length, whether it is received in place)
FRAMES = some.lists(
    some.tuples(
        some.integers(1, 4),
        some.integers(1, 1 << 63),
        some.one_of(some.integers(0, 100), some.integers(0, 60_000)),
        some.booleans(),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(frames=FRAMES)
def test_every_frame_is_read_as_it_was_published(frames):
    expected = []
    with place() as where:
        writer = where.writer()
        for number, (kind, session, length, in_place) in enumerate(frames):
            payload = (b"%d/%d " % (number, length) * (length // 3 + 1))[:length]
            area = writer.reserve(max(length, 1)) if in_place else None
            if area is not None and len(area) >= length:
                area[:length] = payload
                writer.publish(kind, session, number, length, 7 * number)
            else:
                writer.append(kind, session, payload, 7 * number, number)
            expected.append(Frame(kind, session, 7 * number, number, payload))
        writer.close()
        assert published(where, writer.incarnation) == expected


def test_long_data_becomes_several_frames_that_follow_each_other(where):
    data = os.urandom(3_000_001)
    writer = where.writer(SMALL)
    writer.append(1, 9, data, 1, 1000)
    writer.close()
    frames = published(where, writer.incarnation)
    assert len(frames) > 1
    at = 1000
    for frame in frames:
        assert frame.offset == at
        at += len(frame.payload)
    assert b"".join(frame.payload for frame in frames) == data


def test_a_record_that_fits_no_chunk_is_refused_and_harms_nothing(where):
    writer = where.writer()
    writer.append(1, 1, b"before", 1)
    with pytest.raises(EvidenceError, match="does not fit"):
        writer.record(0, Gap("worker", "x" * TINY.chunk_bytes), 1)
    writer.append(1, 1, b"after", 2)
    writer.close()
    assert [f.payload for f in published(where, writer.incarnation)] == [b"before", b"after"]


def test_two_chunks_are_enough_for_records(where):
    writer = where.writer(SMALL)
    records = [Gap("worker", "x" * 5000, count=n) for n in range(1000)]
    for record in records:
        writer.record(0, record, 1)
    writer.close()
    assert [r["count"] for r in where.records("Gap")] == list(range(1000))


def test_fewer_than_two_chunks_are_refused():
    with pytest.raises(ValueError, match="two chunks"):
        WriterSettings(chunk_count=1)


def test_one_chunk_is_always_kept_for_records(where):
    """Data that nobody commits stops at the last chunk; records still go on."""
    slow = WriterSettings(
        chunk_bytes=64 << 10, chunk_count=3, segment_bytes=256 << 10, commit_s=3600,
        reserve_bytes=0, spare_bytes=0,
    )  # fmt: skip
    writer = where.writer(slow)
    stopped = threading.Event()
    step, writer._committer._step = writer._committer._step, lambda: stopped.wait(0.001)
    while (area := writer.reserve(16 << 10)) is not None:
        area[:] = bytes(len(area))
        writer.publish(1, 1, 0, len(area), 1)
    assert not writer.room
    for number in range(200):
        writer.record(0, Gap("worker", "x", count=number), 1)
    writer._committer._step = step
    writer.hurry()
    until = time.monotonic() + 10
    while not writer.room:
        assert time.monotonic() < until
        time.sleep(0.001)
    assert writer.reserve(16 << 10) is not None
    writer.close()
    assert [r["count"] for r in where.records("Gap")] == list(range(200))


def test_bytes_that_are_held_are_there_while_their_chunk_lives_and_afterwards(where):
    writer = where.writer()
    held = []
    for number in range(40):
        data = os.urandom(1 + 977 * number)
        area = writer.reserve(len(data))
        while area is None:
            time.sleep(0.001)
            area = writer.reserve(len(data))
        data = data[: len(area)]
        area[: len(data)] = data
        position = writer.publish(1, 3, 0, len(data), 1)
        held.append((writer.hold(position - (-len(data) & 7), len(data)), data))
        assert bytes(held[-1][0].view()) == data
    for claim, data in held:
        assert bytes(claim.view()) == data
    for claim, data in reversed(held):
        claim.advance(len(data) // 2)
        assert bytes(claim.view()) == data[len(data) // 2 :]
        claim.release()
    assert not any(chunk.held for chunk in writer._all)
    writer.close()


def test_held_bytes_that_the_disk_does_not_give_back_are_an_evidence_error(where):
    writer = where.writer()
    area = writer.reserve(100)
    area[:] = b"x" * 100
    claim = writer.hold(writer.publish(1, 3, 0, 100, 1) - 4, 100)
    writer.append(1, 4, bytes(400_000), 1)
    writer.wait_durable()
    for generation in where.store.generations()[:-1]:
        where.store.segment(generation).unlink()
    with pytest.raises(EvidenceError):
        claim.view()
    writer.close()


def test_what_is_durable_is_in_a_commit(where):
    writer = where.writer()
    for number in range(50):
        writer.append(1, 1, b"%d" % number * 3000, number)
        writer.wait_durable()
        assert writer.durable == writer.position
        assert where.frames(writer.incarnation)[-1].payload == b"%d" % number * 3000
    writer.close()


def test_an_idle_writer_sleeps_and_wakes_for_the_next_frame(where):
    writer = where.writer()
    until = time.monotonic() + 10
    while not writer._committer.asleep or writer.durable < writer.position:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.1)
    assert writer._committer.asleep
    writer.append(1, 1, b"after a rest", 5)
    while writer.durable < writer.position:
        assert time.monotonic() < until
        time.sleep(0.01)
    writer.close()


def test_a_commit_is_cut_so_that_reading_a_little_back_costs_little(where):
    big = WriterSettings(commit_s=0.2, reserve_bytes=0, spare_bytes=0, segment_bytes=16 << 20)
    writer = where.writer(big)
    for _ in range(100):
        writer.append(1, 1, bytes(100_000), 1)
    writer.close()
    sizes = []
    for generation in where.store.generations():
        with SegmentReader(where.store.segment(generation), where.keys) as reader:
            sizes += [commit.plain_bytes for commit in reader.commits()]
    assert max(sizes) < COMMIT_BYTES_SOFT + 100_100
    assert sorted(sizes)[len(sizes) // 2] >= COMMIT_BYTES_SOFT


def test_no_nonce_is_used_twice(where):
    """Every segment has a key of its own, and its commits number upwards."""
    keys, nonces = set(), set()
    for _ in range(3):
        writer = where.writer()
        for _ in range(300):
            writer.append(1, 1, bytes(3000), 1)
        writer.close()
    segments = where.store.generations()
    for generation in segments:
        path = where.store.segment(generation)
        with SegmentReader(path, where.keys) as reader:
            keys.add(reader.header.data_key(path.read_bytes()[:4096], where.keys))
            for number, commit in enumerate(reader.commits()):
                assert commit.number == number
                nonces.add((generation, nonce(generation, number)))
    assert len(keys) == len(segments) > 3
    assert len(nonces) == sum(1 for g in segments for _ in commits_of(where, g))


def commits_of(where: Place, generation: int):
    with SegmentReader(where.store.segment(generation)) as reader:
        yield from reader.commits()


def test_a_commit_that_the_disk_refused_uses_up_its_nonce_and_ends_its_segment(where):
    """A short write leaves no second ciphertext under one nonce, and what follows can be read."""
    writer = where.writer()
    writer.append(1, 1, b"before", 1)
    writer.wait_durable()
    first = writer._committer._chain._segment
    os.truncate(first.path, 8192)  # and no more: the descriptor below takes no write
    read_only, first._fd = first._fd, os.open(first.path, os.O_RDONLY)
    writer.append(1, 1, b"refused there, stored here", 2)
    until = time.monotonic() + 10
    while writer.failed is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    while writer.failed is not None:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert first.damaged
    writer.close()
    os.close(read_only)
    assert [f.payload for f in published(where, writer.incarnation)] == [
        b"before",
        b"refused there, stored here",
    ]


def test_several_writers_at_once_keep_their_streams_apart(where):
    def write(number: int, found: dict[int, int]) -> None:
        writer = where.writer(stream=f"w{number}")
        found[number] = writer.incarnation
        for n in range(400):
            writer.append(1, number, b"%d:%d" % (number, n) * 50, n)
        writer.close()

    found: dict[int, int] = {}
    threads = [threading.Thread(target=write, args=(n, found)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found.values())) == 4
    for number, incarnation in found.items():
        payloads = [frame.payload for frame in published(where, incarnation)]
        assert payloads == [b"%d:%d" % (number, n) * 50 for n in range(400)]
    assert where.records("Recovered") == []


def test_an_orderly_end_leaves_nothing_but_final_segments(where):
    writer = where.writer()
    writer.append(1, 1, b"x", 1)
    writer.close()
    assert os.listdir(where.store.hot) == os.listdir(where.store.open) == []
    assert not list(where.store.segments.glob("*.pre"))
    for generation in where.store.generations():
        with SegmentReader(where.store.segment(generation)) as reader:
            commits = list(reader.commits())
            assert commits[-1].final
            end = commits[-1].offset + commits[-1].total_bytes
            assert end == where.store.segment(generation).stat().st_size


def test_nobody_but_the_owner_may_read_evidence_or_memory(where):
    writer = where.writer(WriterSettings(chunk_bytes=64 << 10, segment_bytes=1 << 20,
                                         reserve_bytes=1 << 20, spare_bytes=1 << 20))  # fmt: skip
    writer.append(1, 1, bytes(10_000), 1)
    writer.wait_durable()
    for top in (where.store.evidence, where.store.hot):
        assert stat.S_IMODE(top.stat().st_mode) == 0o700
        found = list(top.rglob("*"))
        assert len(found) > 4
        for path in found:
            mode = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
    writer.close()


def test_what_was_captured_is_not_on_the_disk_in_clear(where):
    secret = b"SELECT 'a secret that nobody may find on the disk'"
    writer = where.writer()
    for _ in range(2000):
        writer.append(1, 1, secret, 1)
    writer.close()
    files = [path for path in where.store.state.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert secret not in path.read_bytes()


def test_a_start_that_fails_leaves_no_memory_behind(where):
    where.store.segments.rmdir()
    where.store.segments.write_text("in the way")
    with pytest.raises(OSError):
        where.writer()
    assert os.listdir(where.store.hot) == os.listdir(where.store.open) == []


@pytest.mark.parametrize("left", ["", "zzzz", "\0" * 9, "\udcff"])
def test_a_counter_that_was_lost_is_found_again_from_the_segments(where, left):
    where.writer().close()
    newest = where.store.generations()[-1]
    counter = where.store.evidence / "generation"
    counter.write_text(left, encoding="utf-8", errors="surrogateescape")
    assert where.store.next_generation() == newest + 1
    assert counter.read_text(encoding="ascii") == f"{newest + 1:08x}\n"


@pytest.mark.parametrize("name", ["state", "run", "segments", "hot"])
def test_a_directory_that_others_may_write_to_is_not_used(where, name):
    path = getattr(where.store, name)
    where.store.prepare()
    for mode, owner in ((0o777, 0), (0o770, 0), (0o700, 65534)):
        path.chmod(mode)
        os.chown(path, owner, owner)
        with pytest.raises(EvidenceError, match=str(path)):
            where.store.prepare()
    os.chown(path, 0, 0)
    for mode in (0o755, 0o1777):  # a fresh tmpfs has the latter
        path.chmod(mode)
        where.store.prepare()


class Killed(BaseException):
    """Stands for the death of the process at this instruction."""


class DiesWhenFinal(SegmentFile):
    """A segment whose writer is killed as soon as its final commit is stored."""

    def commit(self, plaintext, base, staging, *, final=False):
        offset = super().commit(plaintext, base, staging, final=final)
        if final:
            raise Killed
        return offset


def test_a_final_commit_ends_its_file_even_when_its_writer_is_killed_right_after(where, tmp_path):
    header = SegmentHeader(7, 5, "gate-0", 1, 256 << 10, boot_id(), where.keys.key_id)
    segment = DiesWhenFinal(tmp_path / "00000007.seg", header, where.keys)
    with mmap.mmap(-1, 64 << 10) as memory, memoryview(memory) as staging:
        segment.commit(b"frames", 0, staging)
        with pytest.raises(Killed):
            segment.finish(6, staging)
    with SegmentReader(segment.path) as reader:
        *_, last = reader.commits()
    assert last.final
    assert segment.path.stat().st_size == last.offset + last.total_bytes


def test_a_writer_that_numbers_no_sessions_uses_up_none_of_their_numbers(where):
    where.writer().close()
    before = (where.store.evidence / "generation").read_bytes()
    first = SegmentWriter(where.store, where.keys, "cli", role="cli", settings=SMALL)
    first.close()
    second = SegmentWriter(where.store, where.keys, "cli", role="cli", settings=SMALL)
    second.close()
    assert (where.store.evidence / "generation").read_bytes() == before
    assert READERS < first.incarnation < second.incarnation
    (where.store.evidence / "generation.readers").unlink()
    assert where.store.next_generation(READERS) > max(where.store.generations())
    assert where.store.next_generation() < READERS


def test_how_many_numbers_are_used_is_told(where):
    assert where.store.used() == 0
    (where.store.evidence / "generation").write_text(f"{READERS * 9 // 10:08x}\n")
    assert 0.89 < where.store.used() < 0.91


def test_a_segment_that_is_old_ends_and_the_stream_goes_on_in_the_next(where):
    writer = where.writer(replace(TINY, segment_s=0.001))
    for number in range(5):
        writer.append(1, 1, b"%d" % number, number)
        writer.wait_durable()
        time.sleep(0.002)
    writer.close()
    assert len(where.store.generations()) >= 5
    payloads = [f.payload for f in published(where, writer.incarnation) if f.kind == 1]
    assert payloads == [b"0", b"1", b"2", b"3", b"4"]
    for generation in where.store.generations():
        assert any(commit.final for commit in commits_of(where, generation))
