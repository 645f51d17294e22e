"""Digests of open files: each once, and only of what cannot have changed."""

import hashlib
import os
import select
import time

import pytest

from ebpf.hashing import GRAIN_NS, LARGEST, FileKey, Hasher


@pytest.fixture
def hasher():
    made = Hasher()
    yield made
    made.close()


def settle():
    time.sleep(2 * GRAIN_NS / 1e9)


def opened(path):
    fd = os.open(path, os.O_RDONLY)
    return fd, FileKey.of(fd)


def digest(hasher, path, times=1):
    """Return what each of `times` askers is told."""
    told = []
    for _ in range(times):
        hasher.submit(*opened(path), told.append)
    while len(told) < times:
        assert select.select([hasher.wakeup_fd], [], [], 10)[0]
        hasher.finished()
    return told


def test_a_file_is_read_once_for_all_who_ask(hasher, tmp_path):
    path = tmp_path / "program"
    path.write_bytes(os.urandom(3_000_001))
    settle()
    before = len(os.listdir("/proc/self/fd"))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest(hasher, path, 5) == [expected] * 5
    assert hasher.known(FileKey.of(os.open(path, os.O_RDONLY))) == expected
    assert len(os.listdir("/proc/self/fd")) == before + 1  # ours


def test_the_digest_is_of_the_open_file_whatever_the_path_names_by_now(hasher, tmp_path):
    path = tmp_path / "program"
    path.write_bytes(b"first")
    fd, key = opened(path)
    path.unlink()
    path.write_bytes(b"second")
    told = []
    hasher.submit(fd, key._replace(ctime_ns=os.fstat(fd).st_ctime_ns), told.append)
    while not told:
        assert select.select([hasher.wakeup_fd], [], [], 10)[0]
        hasher.finished()
    assert told == [hashlib.sha256(b"first").hexdigest()]


def test_a_file_that_changed_since_its_key_was_taken_has_no_digest(hasher, tmp_path):
    path = tmp_path / "program"
    path.write_bytes(b"first")
    fd, key = opened(path)
    settle()
    path.write_bytes(b"other")
    told = []
    hasher.submit(fd, key, told.append)
    while not told:
        assert select.select([hasher.wakeup_fd], [], [], 10)[0]
        hasher.finished()
    assert told == [""]
    assert hasher.known(key) is None


def test_a_file_that_just_changed_is_hashed_and_not_remembered(hasher, tmp_path):
    """It may change again within the clock's grain, and its key would be the same."""
    path = tmp_path / "program"
    path.write_bytes(b"fresh")
    fd, key = opened(path)
    os.close(fd)
    if time.time_ns() - key.ctime_ns > GRAIN_NS / 2:
        path.touch()
    found = digest(hasher, path)
    assert found == [hashlib.sha256(b"fresh").hexdigest()]
    assert hasher.known(key) is None
    settle()
    digest(hasher, path)
    assert hasher.known(opened(path)[1]) == found[0]


def test_what_cannot_be_read_has_no_digest(hasher, tmp_path):
    assert digest(hasher, tmp_path) == [""]  # a directory


def test_a_file_beyond_all_measure_is_refused_and_counted(hasher, tmp_path):
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, LARGEST + 1)
    fd, key = opened(path)
    told = []
    hasher.submit(fd, key, told.append)
    assert told == [""]
    assert hasher.refused == 1
    with pytest.raises(OSError):
        os.fstat(fd)


def test_closing_drops_what_waits(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    hasher = Hasher()
    for number in range(20):
        path = tmp_path / str(number)
        path.write_bytes(bytes(1_000_000))
        hasher.submit(*opened(path), lambda _: None)
    hasher.close()
    assert len(os.listdir("/proc/self/fd")) == before
