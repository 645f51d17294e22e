"""A full disk: the writer says so, keeps what was published, lets readers write down what they
read, and goes on by itself when there is space again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from written_evidence import Place, small_disk

from capture.errors import EvidenceError
from capture.settings import SMALL, WriterSettings

MIB = 1 << 20
SETTINGS = WriterSettings(
    chunk_bytes=MIB, chunk_count=4, segment_bytes=4 * MIB, commit_s=0.005, reserve_bytes=8 * MIB,
    spare_bytes=2 * MIB,
)  # fmt: skip

pytestmark = pytest.mark.system


@pytest.fixture
def where():
    run = Path(tempfile.mkdtemp(prefix="narrows-test-", dir="/dev/shm"))
    with small_disk(32 * MIB) as disk:
        yield Place(disk / "state", run)
    shutil.rmtree(run)


class Filler:
    """A file beside the evidence that takes the space."""

    def __init__(self, where: Place) -> None:
        self.path = where.store.state / "other"

    def fill(self, leave: int = 0) -> None:
        disk = os.statvfs(self.path.parent)
        with self.path.open("ab") as file:
            size = file.tell() + disk.f_bavail * disk.f_frsize - leave
            os.posix_fallocate(file.fileno(), 0, size)

    def free(self) -> None:
        self.path.unlink()


def until(true, longest_s: float = 15) -> None:
    end = time.monotonic() + longest_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def publish(writer, numbers) -> list[bytes]:
    """Publish frames until the writer says that it cannot, and return them."""
    done = []
    for number in numbers:
        until(lambda: writer.failed is not None or writer.room)
        payload = b"%d " % number * 4000
        if writer.failed is not None or (area := writer.reserve(len(payload))) is None:
            return done
        payload = payload[: len(area)]
        area[: len(payload)] = payload
        writer.publish(1, 1, 0, len(payload), number)
        done.append(payload)
    raise AssertionError("the disk is not full")


def payloads(where, writer) -> list[bytes]:
    return [frame.payload for frame in where.frames(writer.incarnation) if frame.kind == 1]


def test_nothing_that_was_published_is_lost_and_writing_goes_on_when_there_is_space(where):
    writer = where.writer(SETTINGS)
    filler = Filler(where)
    filler.fill()
    before = publish(writer, range(5000))
    assert len(before) > 100
    assert not writer.room
    assert writer.reserve(10) is None
    until(lambda: writer.durable == writer.position)  # in the space that was held back
    assert payloads(where, writer) == before
    filler.free()
    until(lambda: writer.failed is None)
    writer.append(1, 1, b"after", 1)
    writer.close()
    assert payloads(where, writer) == [*before, b"after"]
    assert os.listdir(where.store.open) == []


def test_an_orderly_stop_needs_no_more_than_what_was_held_back(where):
    writer = where.writer(SETTINGS)
    Filler(where).fill()
    before = publish(writer, range(5000))
    writer.append(1, 1, b"last words", 1)
    writer.close("stopped")
    assert payloads(where, writer) == [*before, b"last words"]
    assert [stop["reason"] for stop in where.records("Stop")] == ["stopped"]
    assert os.listdir(where.store.open) == os.listdir(where.store.hot) == []


def test_without_space_held_back_memory_keeps_what_was_published(where):
    writer = where.writer(replace(SETTINGS, reserve_bytes=0))
    filler = Filler(where)
    filler.fill()
    before = publish(writer, range(5000))
    position = writer.position
    assert writer.durable < position
    with pytest.raises(EvidenceError, match="No space"):
        writer.wait_durable()
    filler.free()
    until(lambda: writer.failed is None)
    writer.wait_durable()
    assert payloads(where, writer) == before
    writer.close()


def test_what_found_no_space_at_the_end_is_completed_by_the_next_start(where):
    writer = where.writer(replace(SETTINGS, reserve_bytes=0))
    filler = Filler(where)
    filler.fill()
    before = publish(writer, range(5000))
    writer.close()
    assert len(payloads(where, writer)) < len(before)
    filler.free()
    where.recover()
    assert payloads(where, writer) == before
    assert [r["incarnation"] for r in where.records("Recovered")] == [writer.incarnation]


def test_records_that_find_no_memory_are_refused_not_lost_silently(where):
    writer = where.writer(replace(SETTINGS, reserve_bytes=0))
    filler = Filler(where)
    filler.fill()
    before = publish(writer, range(5000))
    refused = False
    while not refused:
        try:
            writer.append(1, 1, bytes(4000), 1)
            before.append(bytes(4000))
        except EvidenceError:
            refused = True
    filler.free()
    until(lambda: writer.failed is None)
    writer.close()
    assert payloads(where, writer) == before


def test_readers_can_write_down_what_they_read_on_a_full_disk(where):
    writer = where.writer(SETTINGS)
    filler = Filler(where)
    filler.fill()
    publish(writer, range(5000))
    until(lambda: writer.durable == writer.position)
    filler.fill()
    for number in range(12):
        reader = where.writer(SMALL, f"reader-{number}")
        reader.append(20, 0, b"{}", 1)
        reader.wait_durable()
        reader.close()
        filler.fill()  # whatever it gave back is gone
        assert len(where.frames(reader.incarnation)) == 3
    writer.close()


def test_a_start_without_space_fails_and_the_next_one_with_space_works(where):
    filler = Filler(where)
    filler.fill()
    for _ in range(3):
        with pytest.raises(OSError):
            where.writer(SETTINGS)
        assert os.listdir(where.store.hot) == os.listdir(where.store.open) == []
        assert not list(where.store.segments.iterdir())
    filler.free()
    where.writer(SETTINGS).close()


def test_a_dead_writer_is_completed_later_when_there_is_no_space_for_it_now(where):
    writer = where.writer(SETTINGS)
    writer.append(1, 1, bytes(3000) * 300, 1)
    writer._committer._stopping = True
    writer.hurry()
    writer._committer._thread.join()
    writer.append(1, 1, b"only in memory" * 60_000, 1)
    writer._life.leave()
    filler = Filler(where)
    filler.fill(leave=64 << 10)
    where.recover()
    assert os.listdir(where.store.open) == [f"{writer.incarnation:08x}"]
    filler.free()
    where.recover()
    assert os.listdir(where.store.open) == []
    assert b"".join(payloads(where, writer)).endswith(b"only in memory")
    assert len(where.records("Recovered")) == 1
