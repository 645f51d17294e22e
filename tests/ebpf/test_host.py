"""Who this host is, and which start this is."""

import pytest

from ebpf.host import EPOCHS, AlreadyRunning, StartLock, this_host


def starts(path, count):
    found = []
    for _ in range(count):
        lock = StartLock(path)
        found.append(lock.next_epoch())
        lock.close()
    return found


def test_epochs_count_up_from_a_random_number_and_come_back_after_4096(tmp_path):
    first, *rest = starts(tmp_path / "epoch", 5)
    assert [(epoch - first) % EPOCHS for epoch in rest] == [1, 2, 3, 4]
    (tmp_path / "epoch").write_text("4095            ")
    assert starts(tmp_path / "epoch", 2) == [0, 1]
    assert len({starts(tmp_path / str(n), 1)[0] for n in range(20)}) > 10


def test_a_file_that_makes_no_sense_is_begun_anew(tmp_path):
    (tmp_path / "epoch").write_text("nonsense that is longer than a number")
    first, second = starts(tmp_path / "epoch", 2)
    assert second == (first + 1) % EPOCHS


def test_one_run_directory_has_one_sensor(tmp_path):
    lock = StartLock(tmp_path / "epoch")
    with pytest.raises(AlreadyRunning, match="another sensor holds"):
        StartLock(tmp_path / "epoch")
    lock.close()
    StartLock(tmp_path / "epoch").close()


def test_a_host_is_the_same_at_every_start_and_another_host_is_another(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    other.write_text("3d1219c7c4c5404aaa1f6d2a48adfda5\n")
    first = this_host("", 7, one)
    assert first == this_host("", 7, one)
    assert first.number != this_host("", 7, other).number
    assert 0 <= first.number < 1 << 16
    assert first.epoch == 7


def test_the_configured_name_comes_before_the_host_name(tmp_path):
    assert this_host("web1", 0, tmp_path / "absent").name == "web1"
    assert this_host("", 0, tmp_path / "absent").name
