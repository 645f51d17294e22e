"""The log over the API: its proofs are checked with RFC 6962's own verification, written here."""

import base64
import hashlib

import pytest

from capture.note import Checkpoint, NoteVerifier
from capture.seal import Seal


def sealed(api, *, leaves):
    """Grow the log to at least so many leaves."""
    seal = Seal(api.evidence.store, api.evidence.keys, checkpoint_s=0.01)
    while True:
        with api.evidence.writer() as gate:
            for _ in range(20):
                gate.close(gate.open())
            gate.commit()
        while seal.step():
            pass
        seal._sign_if_due()
        if seal._sealer._ledger.size >= leaves:
            break
    seal.close()


@pytest.fixture(scope="module")
def log(shared):
    sealed(shared, leaves=300)
    return shared


def node(left, right):
    return hashlib.sha256(b"\1" + left + right).digest()


def root_by_path(index, size, leaf, path):
    """RFC 9162, 2.1.3.2."""
    first, last, root = index, size - 1, leaf
    for sibling in path:
        assert last
        if first & 1 or first == last:
            root = node(sibling, root)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            root = node(root, sibling)
        first, last = first >> 1, last >> 1
    assert not last
    return root


def raw(text):
    return base64.b64decode(text, validate=True)


def test_the_checkpoint_is_signed_by_the_logs_key(log):
    told = log.ok("/evidence/checkpoint")
    key = (log.evidence.store.state / "ledger.pub").read_text().strip()
    assert told["key"] == key
    signed = Checkpoint.parse(NoteVerifier.parse(key).open(told["note"].encode()))
    assert (signed.size, signed.origin, signed.root) == (
        told["size"], told["origin"], raw(told["root"]),
    )  # fmt: skip
    assert signed.size >= 300


def test_every_leaf_is_listed_once_and_proved(log):
    checkpoint = log.ok("/evidence/checkpoint")
    start, leaves = 0, []
    while start is not None:
        page = log.ok("/evidence/leaves", start=start, limit=97)
        leaves += page["items"]
        start = page["next"]
    assert [leaf["index"] for leaf in leaves] == list(range(checkpoint["size"]))
    assert leaves[0]["leaf"]["type"] == "genesis"
    for index in (0, 1, 2, 127, 128, 255, 256, 299, checkpoint["size"] - 1):
        proof = log.ok("/evidence/proofs/inclusion", index=index)
        hashed = hashlib.sha256(b"\0" + raw(leaves[index]["data"])).digest()
        assert raw(proof["hash"]) == raw(leaves[index]["hash"]) == hashed
        found = root_by_path(index, proof["size"], hashed, [raw(p) for p in proof["path"]])
        assert found == raw(proof["root"]) == raw(checkpoint["root"])


def test_an_older_tree_is_a_beginning_of_the_newer_one(log):
    checkpoint = log.ok("/evidence/checkpoint")
    for old in (1, 2, 3, 64, 255, 256, 257, checkpoint["size"]):
        proof = log.ok("/evidence/proofs/consistency", old=old)
        path = [raw(p) for p in proof["path"]]
        assert raw(proof["new_root"]) == raw(checkpoint["root"])
        if old == checkpoint["size"]:
            assert not path
            continue
        if old & (old - 1) == 0:
            path.insert(0, raw(proof["old_root"]))
        first, last = old - 1, checkpoint["size"] - 1
        while first & 1:
            first, last = first >> 1, last >> 1
        was = now = path[0]
        for sibling in path[1:]:
            if first & 1 or first == last:
                was, now = node(sibling, was), node(sibling, now)
                while not first & 1 and first:
                    first, last = first >> 1, last >> 1
            else:
                now = node(now, sibling)
            first, last = first >> 1, last >> 1
        assert (was, now) == (raw(proof["old_root"]), raw(proof["new_root"]))


def test_a_proof_of_what_is_not_there_is_not_found(log):
    size = log.ok("/evidence/checkpoint")["size"]
    for query in ({"index": size}, {"index": 5, "size": 5}, {"index": 0, "size": size + 1}):
        assert log.get("/evidence/proofs/inclusion", **query).problem() == "not-found"
    for query in ({"old": size + 1}, {"old": 9, "new": 8}, {"old": 1, "new": size + 1}):
        assert log.get("/evidence/proofs/consistency", **query).problem() == "not-found"
    assert log.ok("/evidence/leaves", start=size + 5) == {"items": [], "next": None}


def test_a_log_that_is_not_as_signed_proves_nothing(api):
    assert api.get("/evidence/checkpoint").problem() == "unavailable", "there is none yet"
    sealed(api, leaves=20)
    assert api.ok("/evidence/checkpoint")["size"] >= 20
    [tile] = (api.evidence.store.ledger / "tile" / "0" / "000.p").glob(
        str(api.ok("/evidence/checkpoint")["size"])
    )
    changed = bytearray(tile.read_bytes())
    changed[40] ^= 1
    tile.write_bytes(changed)
    assert api.get("/evidence/proofs/inclusion", index=0).problem() == "unavailable"


def test_reading_the_log_needs_no_private_key(log):
    (log.evidence.store.state / "ledger.key").rename(log.evidence.store.state / "away")
    try:
        assert log.ok("/evidence/proofs/inclusion", index=3)["path"]
    finally:
        (log.evidence.store.state / "away").rename(log.evidence.store.state / "ledger.key")
