"""The follower: each commit once, in the order of its stream, while it is written and after."""

import os
import struct
import time
from hashlib import sha256
from pathlib import Path

import pytest
from sealed_evidence import evidence, open_session, say, whole_session

from capture.follow import BEGINNING, ENDED, Cursor, Damage, Follower
from capture.frames import walk
from capture.segfile import BLOCK, COMMIT
from capture.tail import SegmentReader


@pytest.fixture
def place():
    with evidence() as found:
        yield found


def all_of(follower):
    found = []
    while step := follower.step():
        found += step
    return found


def assert_continuous(found):
    """Each incarnation's stream is there without a hole, and its frames fill the commits."""
    positions = {}
    for followed in found:
        assert followed.commit.base == positions.get(followed.incarnation, 0)
        positions[followed.incarnation] = followed.commit.base + followed.commit.plain_bytes
        end = 0
        for *_, payload, at in walk(followed.plaintext, followed.incarnation):
            end = at + 32 + (len(payload) + 7 & ~7)
        assert end == followed.commit.plain_bytes
    return positions


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_what_is_written_is_given_once_and_in_order_while_it_is_written(place):
    writer = place.writer()
    follower = Follower(place.store, place.keys)
    found = []
    for _ in range(60):
        whole_session(writer, 500, 20_000)
        found += follower.step()
    position = writer.position
    writer.close()
    found += all_of(follower)
    assert len({followed.generation for followed in found}) > 3
    assert assert_continuous(found)[writer.incarnation] > position  # the Stop record is there too
    assert found[-1].commit.final
    assert not follower.damage
    assert not all_of(follower)


def test_digests_are_those_of_what_lies_on_disk(place):
    writer = place.writer()
    for _ in range(40):
        whole_session(writer, 500, 20_000)
    writer.close()
    for followed in all_of(Follower(place.store, place.keys, digests=True)):
        content = place.store.segment(followed.generation).read_bytes()
        commit = followed.commit
        blocks = content[commit.offset : commit.offset + commit.total_bytes]
        assert followed.digest == sha256(blocks).digest()
    assert {f.digest for f in all_of(Follower(place.store, place.keys))} == {b""}


def test_a_follower_goes_on_from_the_cursors_it_is_given(place):
    writer = place.writer()
    cursors = {}
    first = Follower(place.store, place.keys)
    given = []
    for number in range(40):
        whole_session(writer, 100, 10_000)
        if number < 20:
            given += first.step()
    for followed in given:
        commit = followed.commit
        after = Cursor(commit.number + 1, commit.offset + commit.total_bytes)
        cursors[followed.generation] = ENDED if commit.final else after
    writer.close()
    second = Follower(place.store, place.keys, lambda g: cursors.get(g, BEGINNING))
    assert_continuous(given + all_of(second))


def test_a_segment_that_was_read_to_its_end_is_not_opened_again(place):
    place.writer().close()
    (generation,) = place.store.generations()
    size = place.store.segment(generation).stat().st_size
    with SegmentReader(place.store.segment(generation)) as reader:
        count = len(list(reader.commits()))
        incarnation = reader.header.incarnation
    for cursor in (ENDED, Cursor(count, size)):
        follower = Follower(place.store, place.keys, lambda _, cursor=cursor: cursor)
        assert not all_of(follower)
        assert not follower.following(incarnation)


def test_what_only_has_the_name_of_a_segment_is_passed_by(place):
    place.writer().close()
    follower = Follower(place.store, place.keys)
    os.mkfifo(place.store.segment(0x98))
    place.store.segment(0x99).mkdir()
    place.store.segment(0x9A).symlink_to("/dev/zero")
    assert_continuous(all_of(follower))
    assert not follower.damage


def test_writers_that_come_later_are_followed(place):
    follower = Follower(place.store, place.keys)
    assert not follower.step()
    found = []
    for stream in ("cli-1", "cli-2", "cli-3"):
        place.writer(stream).close()
        found += all_of(follower)
    assert [followed.stream for followed in found if followed.commit.final] == [
        "cli-1", "cli-2", "cli-3",
    ]  # fmt: skip


def test_the_stream_of_a_killed_writer_goes_on_in_the_segment_that_recovery_wrote(place):
    follower = Follower(place.store, place.keys)
    with place.process("write", "10") as child:
        for _ in range(6):
            child.stdout.readline()
        found = all_of(follower)
    writer = place.writer("gate-1")
    writer.close()
    found += all_of(follower)
    assert not follower.damage
    positions = assert_continuous(found)
    assert len(positions) == 2
    dead = min(positions)
    assert not follower.following(dead)
    assert [f.commit.final for f in found if f.incarnation == dead][-1]


def test_a_half_written_commit_is_waited_for_and_passed_over_when_its_writer_is_dead(place):
    with place.process("write", "10") as child:
        for _ in range(6):
            child.stdout.readline()
    newest = place.store.segment(place.store.generations()[-1])
    with SegmentReader(newest, place.keys) as reader:
        last = list(reader.commits())[-1]
    flip(newest, last.offset + 100)  # as if the end of the store had not come
    follower = Follower(place.store, place.keys)
    found = all_of(follower)
    assert found[-1].commit.number == last.number - 1
    assert not follower.damage
    place.writer("gate-1").close()
    found += all_of(follower)
    assert not follower.damage
    assert_continuous(found)


def test_a_commit_that_was_changed_is_named_and_the_others_are_given(place):
    writer = place.writer()
    for _ in range(5):
        whole_session(writer)
        writer.wait_durable()
    writer.close()
    (generation,) = place.store.generations()
    with SegmentReader(place.store.segment(generation)) as reader:
        commits = list(reader.commits())
    flip(place.store.segment(generation), commits[2].offset + 200)
    follower = Follower(place.store, place.keys)
    found = all_of(follower)
    assert follower.damage == [Damage(generation, commits[2].offset, "commit")]
    assert [followed.commit.number for followed in found] == list(range(len(commits)))
    assert [followed.commit.number for followed in found if not followed.plaintext] == [
        2, commits[-1].number,
    ]  # fmt: skip


def test_a_segment_whose_header_was_changed_is_named_and_others_are_given(place):
    place.writer("cli-1").close()
    place.writer("cli-2").close()
    first = place.store.generations()[0]
    flip(place.store.segment(first), 30)
    follower = Follower(place.store, place.keys)
    found = all_of(follower)
    assert follower.damage == [Damage(first, 0, "unreadable")]
    assert {followed.stream for followed in found} == {"cli-2"}


def test_a_break_in_the_chain_of_a_finished_segment_is_named(place):
    writer = place.writer()
    for _ in range(60):
        whole_session(writer, 500, 20_000)
    writer.close()
    first = place.store.generations()[0]
    with SegmentReader(place.store.segment(first)) as reader:
        third = list(reader.commits())[2]
    flip(place.store.segment(first), third.offset)  # the magic of its header
    follower = Follower(place.store, place.keys)
    found = all_of(follower)
    assert Damage(first, third.offset, "chain") in follower.damage
    assert found[-1].commit.final  # later segments are still given


def test_a_writer_that_leaves_a_segment_without_an_end_is_followed_into_the_next(place):
    """A disk that refuses a commit makes a writer go on elsewhere, and it may be idle then."""
    writer = place.writer()
    session = open_session(writer)
    while len(place.store.generations()) < 2:
        say(writer, session, 100, 5_000)
    writer.wait_durable()
    first = place.store.segment(place.store.generations()[0])
    with SegmentReader(first) as reader:
        *_, before, final = reader.commits()
        position = before.base + before.plain_bytes
    assert final.final
    with first.open("r+b") as file:
        file.truncate(final.offset)
    found = all_of(Follower(place.store, place.keys))
    assert {followed.generation for followed in found} >= set(place.store.generations()[:2])
    assert assert_continuous(found)[writer.incarnation] > position
    writer.close()


def test_a_step_is_bounded_and_no_stream_waits_for_another(place):
    for stream in ("cli-1", "cli-2"):
        writer = place.writer(stream)
        session = open_session(writer)
        for _ in range(40):
            say(writer, session, 100, 30_000)
        writer.close()
    follower = Follower(place.store, place.keys)
    most = max(f.commit.total_bytes for f in all_of(Follower(place.store, place.keys)))
    streams = []
    while step := follower.step(64 << 10):
        assert sum(followed.commit.total_bytes for followed in step) < (64 << 10) + most
        streams.append({followed.stream for followed in step})
    assert streams[0] != streams[1]


def open_segments(place):
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    names = [path.readlink() for path in links]
    return len([name for name in names if name.parent == place.store.segments])


def test_an_idle_step_reads_next_to_nothing_and_holds_only_living_segments_open(place):
    for number in range(20):
        place.writer(f"cli-{number}").close()
    writer = place.writer()
    open_session(writer)
    writer.wait_durable()
    before_fds = open_segments(place)
    follower = Follower(place.store, place.keys)
    all_of(follower)
    time.sleep(1.1)  # the directory's time is older than its listing can be
    follower.step()

    def read_bytes():
        fields = Path("/proc/self/io").read_text().split()
        return int(fields[fields.index("rchar:") + 1])

    before = read_bytes()
    for _ in range(100):
        assert not follower.step()
    assert read_bytes() - before < 100 * COMMIT.size + 1000  # a commit's header each; and ourselves
    # Two of the follower's: one for heads, one past the page cache.
    assert open_segments(place) - before_fds == 2
    follower.close()
    writer.close()


def test_commits_that_were_not_given_are_named_by_their_tags(place):
    writer = place.writer()
    session = open_session(writer)
    for _ in range(10):
        say(writer, session, 100, 3_000)
        writer.wait_durable()
    follower = Follower(place.store, place.keys)
    given = follower.step(1)
    (unread,) = follower.unread()
    assert unread.first == len(given)
    with SegmentReader(place.store.segment(unread.generation)) as reader:
        commits = list(reader.commits())[unread.first : -1]
        tags = [reader.raw(c)[COMMIT.size + c.plain_bytes :][:16] for c in commits]
    assert (unread.offset, unread.tags) == (commits[0].offset, tags)
    follower.close()
    writer.close()


def test_a_file_that_is_no_segment_stops_nothing(place):
    place.store.segment(0x77).write_bytes(b"junk")
    place.store.segment(0x78).write_bytes(struct.pack("<8sI", b"NARSEG01", 9).ljust(BLOCK, b"\0"))
    place.writer().close()
    follower = Follower(place.store, place.keys)
    assert all_of(follower)
    assert [damage.generation for damage in follower.damage] == [0x77, 0x78]
