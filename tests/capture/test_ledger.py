"""The ledger: the tree of RFC 6962 as C2SP tiles, and what a kill in mid-append leaves."""

import base64
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.errors import EvidenceError
from capture.ledger import Ledger, load_signer
from capture.merkle import Frontier, leaf_hash, root_of, tile_path
from capture.note import NoteSigner
from capture.store import Store
from capture.verify.tree import Tree
from capture.verify.tree import path as second_path
from capture.verify.tree import root_of as second_root

#: The leaves and roots of the Certificate Transparency reference tests.
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
                 "606162636465666768696a6b6c6d6e6f")
]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {  # (leaf index, tree size) of the reference tests
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {  # (old size, new size)
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def mth(leaves):
    """RFC 6962, 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def included(index, size, hashed, path, root):
    """RFC 9162, 2.1.3.2."""
    node, last, result = index, size - 1, hashed
    for sibling in path:
        if last == 0:
            return False
        if node & 1 or node == last:
            result = hashlib.sha256(b"\1" + sibling + result).digest()
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            result = hashlib.sha256(b"\1" + result + sibling).digest()
        node, last = node >> 1, last >> 1
    return last == 0 and result == root


def consistent(old, new, old_root, new_root, path):
    """RFC 9162, 2.1.4.2."""
    if old == new:
        return not path and old_root == new_root
    if not path:
        return False
    if old & (old - 1) == 0:
        path = [old_root, *path]
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    first = second = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            first = hashlib.sha256(b"\1" + sibling + first).digest()
            second = hashlib.sha256(b"\1" + sibling + second).digest()
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            second = hashlib.sha256(b"\1" + second + sibling).digest()
        node, last = node >> 1, last >> 1
    return last == 0 and first == old_root and second == new_root


@pytest.fixture
def directory():
    path = Path(tempfile.mkdtemp(prefix="narrows-ledger-", dir="/var/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def signer():
    return NoteSigner("narrows/test", b"s" * 32)


def filled(directory, leaves):
    ledger = Ledger(directory, signer())
    ledger.append(leaves)
    return ledger


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_the_reference_tests(size):
    assert root_of([leaf_hash(leaf) for leaf in LEAVES[:size]]).hex() == ROOTS[size - 1]
    assert second_root(LEAVES[:size]).hex() == ROOTS[size - 1]


def test_proofs_are_those_of_the_reference_tests(directory):
    leaves = [leaf or b"\0empty" for leaf in LEAVES]  # the ledger takes no empty leaf: hash only
    ledger = filled(directory, leaves)
    ledger._edge.levels[0] = [leaf_hash(leaf) for leaf in LEAVES]
    tile = directory / tile_path(0, 0, 8)
    tile.write_bytes(b"".join(ledger._edge.levels[0]))
    for (index, size), path in INCLUSION.items():
        assert [node.hex() for node in ledger.inclusion(index, size)] == path
    for (old, new), path in CONSISTENCY.items():
        assert [node.hex() for node in ledger.consistency(old, new)] == path


@given(st.lists(st.binary(max_size=20), max_size=70))
def test_every_way_to_a_root_gives_the_same(leaves):
    frontier, second = Frontier(), Tree()
    for leaf in leaves:
        frontier.add(leaf_hash(leaf))
        second.add(leaf_hash(leaf))
    root = mth(leaves)
    assert frontier.root() == second.root() == second_root(leaves) == root
    assert root_of([leaf_hash(leaf) for leaf in leaves]) == root


@given(st.integers(0, 10**12), st.integers(1, 256), st.sampled_from([0, 5, "entries"]))
def test_both_readings_of_tile_names_agree(index, width, level):
    assert tile_path(level, index, width) == second_path(level, index, width)


def test_tile_names_are_those_of_the_specification():
    assert tile_path(0, 1234067) == "tile/0/x001/x234/067"
    assert tile_path(0, 1234067, 8) == "tile/0/x001/x234/067.p/8"
    assert tile_path("entries", 0, 1) == "tile/entries/000.p/1"
    assert tile_path(3, 999) == "tile/3/999"
    assert tile_path(3, 1000) == "tile/3/x001/000"


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.randoms())
def test_appended_leaves_are_there_with_proofs_after_any_restart(batches, chance):
    directory = Path(tempfile.mkdtemp(prefix="narrows-ledger-", dir="/var/tmp"))
    try:
        leaves, sizes = [], []
        for batch in batches:
            fresh = [b"leaf %d" % (len(leaves) + number) for number in range(batch)]
            Ledger(directory, signer()).append(fresh)
            leaves += fresh
            sizes.append(len(leaves))
        ledger = Ledger(directory, signer())
        assert list(ledger.entries()) == leaves
        assert ledger.checkpoint.root == mth(leaves)
        for _ in range(5):
            size = chance.randint(1, len(leaves))
            index = chance.randrange(size)
            root = mth(leaves[:size])
            assert ledger.root_at(size) == root
            path = ledger.inclusion(index, size)
            assert included(index, size, leaf_hash(leaves[index]), path, root)
            assert not included(index, size, leaf_hash(b"another"), path, root)
        for old in sizes:
            proof = ledger.consistency(old)
            new_root = ledger.checkpoint.root
            assert consistent(old, len(leaves), mth(leaves[:old]), new_root, proof)
            assert not consistent(old, len(leaves), mth([b"x"]), new_root, proof) or old == 0
    finally:
        shutil.rmtree(directory)


def test_entries_can_be_read_from_and_to_any_index(directory):
    leaves = [b"leaf %d" % number for number in range(600)]
    ledger = filled(directory, leaves)
    for start, end in ((0, 0), (0, 600), (255, 257), (256, 512), (599, 600), (100, 101)):
        assert list(ledger.entries(start, end)) == leaves[start:end]


def test_an_entry_that_is_empty_or_too_long_is_refused_and_changes_nothing(directory):
    ledger = filled(directory, [b"first"])
    for wrong in (b"", b"x" * 4097):
        with pytest.raises(ValueError, match="leaf"):
            ledger.append([b"good", wrong])
    assert Ledger(directory, signer()).size == ledger.size == 1
    ledger.append([b"x" * 4096])
    assert Ledger(directory, signer()).size == 2


def test_full_tiles_never_change_and_partial_ones_stay_one_checkpoint_longer(directory):
    ledger = filled(directory, [b"a"] * 300)
    full = (directory / tile_path(0, 0)).stat()
    partial = directory / tile_path(0, 1, 44)
    ledger.append([b"b"] * 10)
    assert partial.exists()
    ledger.append([b"c"] * 10)
    assert not partial.exists()
    after = (directory / tile_path(0, 0)).stat()
    assert (full.st_ino, full.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("name", ["checkpoint", "tile/0/000.p/9", "tile/entries/000.p/9"])
def test_a_ledger_that_is_not_as_signed_does_not_open(directory, name):
    filled(directory, [b"leaf %d" % number for number in range(9)])
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(EvidenceError):
        Ledger(directory, signer())


def test_a_log_of_another_key_does_not_open(directory):
    filled(directory, [b"leaf"])
    with pytest.raises(EvidenceError):
        Ledger(directory, NoteSigner("narrows/test", b"t" * 32))


def test_keys_and_origin_are_made_once_and_kept(directory):
    store = Store(directory, directory / "run")
    store.prepare()
    first = load_signer(store)
    assert first.verifier.name.startswith("narrows/")
    assert load_signer(store).verifier == first.verifier
    assert (directory / "ledger.key").stat().st_mode & 0o777 == 0o600
    assert (directory / "ledger.pub").read_text().strip() == first.verifier.vkey()


def test_a_public_key_that_was_exchanged_stops_the_seal(directory):
    store = Store(directory, directory / "run")
    store.prepare()
    load_signer(store)
    other = NoteSigner(load_signer(store).verifier.name, b"o" * 32)
    (directory / "ledger.pub").write_text(other.verifier.vkey())
    with pytest.raises(EvidenceError, match="not the public half"):
        load_signer(store)


def test_a_lost_public_key_file_is_made_again_for_the_same_log(directory):
    store = Store(directory, directory / "run")
    store.prepare()
    first = load_signer(store)
    Ledger(store.ledger, first).append([b"leaf"])
    (directory / "ledger.pub").unlink()
    assert load_signer(store).verifier == first.verifier


APPEND = """
import sys
from pathlib import Path
from capture.ledger import Ledger
from capture.note import NoteSigner
ledger = Ledger(Path(sys.argv[1]), NoteSigner("narrows/test", b"s" * 32))
print("ready", flush=True)
while True:
    ledger.append([b"leaf %d" % number for number in range(ledger.size, ledger.size + 37)])
"""


def test_a_kill_in_the_middle_of_an_append_leaves_the_last_signed_tree(directory):
    chance = random.Random(5)
    before = kills = 0
    while kills < 12 or before <= 256:  # full tiles, too, however slow the machine is
        kills += 1
        child = subprocess.Popen(
            [sys.executable, "-c", APPEND, str(directory)], stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        with child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
        ledger = Ledger(directory, signer())
        assert ledger.size >= before
        assert ledger.size % 37 == 0  # whole batches only
        leaves = [b"leaf %d" % number for number in range(ledger.size)]
        assert list(ledger.entries()) == leaves
        assert ledger.checkpoint.root == second_root(leaves)
        before = ledger.size
    ledger.append([b"last"])
    assert not [path for path in directory.rglob(".*") if path.is_file()]


def test_the_checkpoint_is_what_the_specification_says(directory):
    ledger = filled(directory, [b"leaf"])
    text, signature = ledger.note.decode().split("\n\n")
    assert text == f"narrows/test\n1\n{base64.b64encode(leaf_hash(b'leaf')).decode()}"
    assert signature.startswith("— narrows/test ")
    assert (directory / "checkpoint").read_bytes() == ledger.note
