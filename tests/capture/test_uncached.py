"""Reading past the page cache gives the same bytes as reading through it."""

import os
from pathlib import Path

import pytest

from capture.segfile import BLOCK
from capture.uncached import FIRST_BYTES, Uncached


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 * FIRST_BYTES + BLOCK + 100))
    return path


@pytest.fixture
def descriptor(written):
    fd = Uncached.open(written)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("length", "offset"),
    [(BLOCK, 0), (BLOCK, BLOCK), (FIRST_BYTES, BLOCK), (2 * FIRST_BYTES, 0), (BLOCK, FIRST_BYTES)],
)
def test_what_is_read_is_what_is_in_the_file(written, descriptor, length, offset):
    content = written.read_bytes()
    assert Uncached().read(descriptor, length, offset) == content[offset : offset + length]


def test_the_end_of_the_file_is_the_end(written, descriptor):
    content = written.read_bytes()
    found = Uncached().read(descriptor, 4 * BLOCK, 2 * FIRST_BYTES)
    assert found == content[2 * FIRST_BYTES :]


def test_memory_that_was_used_for_more_gives_no_more_than_was_asked_for(written, descriptor):
    uncached = Uncached()
    uncached.read(descriptor, 2 * FIRST_BYTES, 0)
    assert uncached.read(descriptor, BLOCK, BLOCK) == written.read_bytes()[BLOCK : 2 * BLOCK]


def test_a_file_system_without_direct_reads_is_read_plainly():
    version = Path("/proc/version")
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(version, os.O_RDONLY | os.O_DIRECT)
    fd = Uncached.open(version)
    assert Uncached().read(fd, BLOCK, 0) == version.read_bytes()
    os.close(fd)
