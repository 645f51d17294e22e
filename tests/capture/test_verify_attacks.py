"""What the verifier must find: every edit, cut, reorder, omission and rollback, named."""

import base64
import json
import os
import random
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
from sealed_evidence import evidence, one_of_each, open_session, say, whole_session

from capture.ledger import Ledger, load_signer
from capture.note import NoteSigner
from capture.segfile import BLOCK
from capture.tail import SegmentReader
from capture.verify import Level
from capture.verify.canonical import dumps
from capture.verify.tree import root_of

FLIPS = 20


def make(place):
    """Fill a place with several segments, a cut session, every kind of leaf, and seal it."""
    writer = place.writer()
    one_of_each(writer)
    for _ in range(30):
        whole_session(writer, 500, 20_000)
    open_session(writer)
    writer.close()
    place.sealed()
    writer = place.writer("gate-1")
    for _ in range(100):
        whole_session(writer, 10, 10)
    writer.close()
    place.sealed()
    return place


@pytest.fixture(scope="module")
def original():
    with evidence() as found:
        yield make(found)


@pytest.fixture
def place(original):
    """A copy of the original to do harm to; it is valid as it is."""
    copy = original.copy()
    yield copy
    shutil.rmtree(copy.state)


@pytest.fixture(params=[True, False], ids=["with the key", "without a key"])
def any_place(request, place):
    if not request.param:
        (place.state / "appliance.key").unlink()
    return place


def flip(path: Path, offset: int) -> bytes:
    """Change one bit, and return the content as it was."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[offset] ^= 1 << random.randrange(8)
    path.write_bytes(changed)
    return content


def invalid(place, **more):
    report = place.verify(**more)
    assert report.exit_code == 1, report.text()
    assert not report.ok
    return [finding for finding in report.findings if finding.level is Level.INVALID]


def forge(place, change) -> None:
    """Change the list of leaves and sign the tree anew with the log's own key."""
    leaves = [json.loads(leaf) for leaf in place.leaves()]
    change(leaves)
    signer = load_signer(place.store)
    shutil.rmtree(place.store.ledger)
    Ledger(place.store.ledger, signer).append([dumps(leaf) for leaf in leaves])


def commits(place, generation):
    with SegmentReader(place.store.segment(generation)) as reader:
        return list(reader.commits())


def test_the_evidence_that_is_attacked_here_is_valid(any_place):
    report = any_place.verify()
    assert report.ok, report.text()
    assert report.segments > 3
    assert report.leaves > 256


def test_a_bit_that_was_flipped_anywhere_in_a_segment_is_found(any_place):
    for generation in any_place.store.generations():
        path = any_place.store.segment(generation)
        size = path.stat().st_size
        places = {8, 30, 76, 150, 200, 4095, BLOCK, BLOCK + 40, BLOCK + 70, size - 1, size - BLOCK}
        places |= {random.randrange(size) for _ in range(FLIPS)}
        for offset in places:
            content = flip(path, offset)
            findings = invalid(any_place, what=f"{generation:08x}")
            assert {finding.segment for finding in findings} == {generation}
            assert all(finding.offset is not None and finding.reason for finding in findings)
            assert min(finding.offset for finding in findings) <= offset
            path.write_bytes(content)
    assert any_place.verify().ok


def test_with_the_key_the_commit_that_was_changed_is_named_exactly(place):
    generation = place.store.generations()[1]
    third = commits(place, generation)[2]
    flip(place.store.segment(generation), third.offset + 100)
    assert any(
        finding.offset == third.offset and "does not authenticate" in finding.reason
        for finding in invalid(place)
    )


def test_a_bit_that_was_flipped_anywhere_in_the_ledger_is_found(any_place):
    files = [path for path in any_place.store.ledger.rglob("*") if path.is_file()]
    current = {str(path.relative_to(any_place.store.ledger)) for path in files}
    size = len(any_place.leaves())
    named = {"checkpoint", "tile/0/000", "tile/entries/000", "tile/1/000.p/1",
             f"tile/0/001.p/{size - 256}", f"tile/entries/001.p/{size - 256}"}  # fmt: skip
    assert named <= current
    for name in sorted(named):
        path = any_place.store.ledger / name
        length = path.stat().st_size
        for offset in [0, length - 1, *(random.randrange(length) for _ in range(FLIPS))]:
            content = flip(path, offset)
            files = {finding.file for finding in invalid(any_place)}
            if name != "checkpoint":
                assert name in files
            path.write_bytes(content)
    assert any_place.verify().ok


def test_bytes_that_were_added_to_a_file_of_the_ledger_are_found(any_place):
    for name in ("checkpoint", "tile/0/000", "tile/entries/000", "tile/1/000.p/1"):
        path = any_place.store.ledger / name
        content = path.read_bytes()
        path.write_bytes(content + b"\0")
        assert name in {finding.file for finding in invalid(any_place)}
        path.write_bytes(content)


def test_a_segment_that_was_cut_is_found(any_place):
    for generation in any_place.store.generations():
        path = any_place.store.segment(generation)
        content = path.read_bytes()
        for length in (0, 100, BLOCK, BLOCK + 10, len(content) - BLOCK, len(content) - 1):
            path.write_bytes(content[:length])
            assert generation in {finding.segment for finding in invalid(any_place)}
        path.write_bytes(content + bytes(BLOCK))
        assert "bytes" in invalid(any_place)[0].reason
        path.write_bytes(content)


def test_a_segment_that_was_removed_is_found(any_place):
    for generation in any_place.store.generations():
        path = any_place.store.segment(generation)
        content = path.read_bytes()
        path.unlink()
        (finding,) = invalid(any_place)
        assert (finding.segment, finding.reason) == (generation, "the segment is missing")
        path.write_bytes(content)


def test_two_commits_that_were_swapped_are_found(any_place):
    for generation in any_place.store.generations():
        found = commits(any_place, generation)
        pairs = [(a, b) for a in found for b in found
                 if a.number < b.number and a.total_bytes == b.total_bytes]  # fmt: skip
        for first, second in pairs[:3]:
            path = any_place.store.segment(generation)
            content = path.read_bytes()
            changed = bytearray(content)
            a = slice(first.offset, first.offset + first.total_bytes)
            b = slice(second.offset, second.offset + second.total_bytes)
            changed[a], changed[b] = content[b], content[a]
            path.write_bytes(changed)
            assert any(finding.offset == first.offset for finding in invalid(any_place))
            path.write_bytes(content)
            break
        else:
            continue
        return
    pytest.fail("there were no two commits of one size")


def test_two_segments_that_were_swapped_are_found(any_place):
    first, second = any_place.store.generations()[1:3]
    a, b = any_place.store.segment(first), any_place.store.segment(second)
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    assert {finding.segment for finding in invalid(any_place)} >= {first, second}


def test_a_state_without_its_whole_ledger_is_invalid_as_long_as_anything_knows_of_it(any_place):
    checkpoint = any_place.state / "kept"
    shutil.copy(any_place.store.ledger / "checkpoint", checkpoint)
    shutil.rmtree(any_place.state / "evidence" / "ledger")
    assert any_place.verify().exit_code == 1  # the seal's state
    (any_place.store.evidence / "seal.state").unlink()
    assert any_place.verify(kept=[checkpoint]).exit_code == 1
    report = any_place.verify()
    assert report.exit_code == 2
    assert {finding.reason for finding in report.findings} == {
        "nothing was signed yet", "it is not sealed"
    }  # fmt: skip


def test_a_pipe_in_place_of_a_segment_is_named_and_not_waited_for(any_place):
    pipe = any_place.store.segment(0x98)
    os.mkfifo(pipe)
    assert any_place.verify().exit_code == 2
    first = any_place.store.segment(any_place.store.generations()[0])
    pipe.rename(first)
    assert any_place.verify().exit_code == 1


def test_a_segment_under_a_number_that_is_not_its_own_is_found(any_place):
    shutil.copy(any_place.store.segment(any_place.store.generations()[0]),
                any_place.store.segment(0x77))  # fmt: skip
    (finding,) = invalid(any_place)
    assert finding.segment == 0x77


def test_leaves_that_were_reordered_are_found(any_place):
    entries = any_place.leaves()
    path = any_place.store.ledger / "tile/entries/000"
    a, b = 8, 9
    changed = [*entries[:a], entries[b], entries[a], *entries[b + 1 : 256]]
    path.write_bytes(b"".join(len(e).to_bytes(2, "big") + e for e in changed))
    assert {f.leaf for f in invalid(any_place) if f.file == "tile/entries/000"} >= {a, b}


@pytest.mark.parametrize(
    "name",
    ["tile/0/000", "tile/entries/000", "tile/1/000.p/1", "tile/0/001.p/W", "tile/entries/001.p/W"],
)
def test_a_file_of_the_ledger_that_was_removed_is_found(any_place, name):
    name = name.replace("W", str(len(any_place.leaves()) - 256))
    (any_place.store.ledger / name).unlink()
    assert name in {finding.file for finding in invalid(any_place)}


def test_a_ledger_without_its_checkpoint_is_not_taken_for_a_new_one(any_place):
    (any_place.store.ledger / "checkpoint").unlink()
    assert invalid(any_place)[0].reason == "the checkpoint is missing"


def test_a_tree_that_another_key_signed_is_found(any_place):
    vkey = (any_place.state / "ledger.pub").read_text()
    signer = load_signer(any_place.store)
    other = NoteSigner(signer.verifier.name, b"o" * 32)
    leaves = any_place.leaves()
    shutil.rmtree(any_place.store.ledger)
    Ledger(any_place.store.ledger, other).append(leaves)
    (any_place.state / "ledger.pub").write_text(other.verifier.vkey())
    assert "did not sign" in invalid(any_place, vkey=vkey)[0].reason
    assert any_place.verify().ok  # the directory alone cannot show it: keys are kept elsewhere
    assert any_place.verify().notes


def test_an_older_copy_of_everything_is_found_by_a_kept_checkpoint(original, any_place):
    newer = original.copy()
    writer = newer.writer("gate-2")
    whole_session(writer)
    writer.close()
    newer.sealed()
    kept = newer.store.ledger / "checkpoint"
    assert newer.verify(kept=[kept]).ok
    assert any_place.verify().ok
    findings = invalid(any_place, kept=[kept])
    assert "rolled back" in findings[0].reason
    shutil.rmtree(newer.state)


def test_an_older_ledger_beside_newer_segments_is_found(original, any_place):
    """Without a kept checkpoint it looks like a seal that has stopped: that is named too."""
    writer = any_place.writer("gate-2")
    whole_session(writer)
    writer.close()
    report = any_place.verify()
    assert report.pending
    late = any_place.copy()
    late.state.joinpath("appliance.key").unlink(missing_ok=True)
    path = late.store.segment(report.pending[0].segment)
    content = bytearray(path.read_bytes())
    moment = int.from_bytes(content[BLOCK + 32 : BLOCK + 40], "little") + 10**12
    content[BLOCK + 32 : BLOCK + 40] = moment.to_bytes(8, "little")
    path.write_bytes(content)
    assert late.verify().exit_code == 2
    shutil.rmtree(late.state)


def test_a_history_that_was_rewritten_and_signed_anew_is_found_by_a_kept_checkpoint(any_place):
    kept = Path(tempfile.mkdtemp(dir="/var/tmp", prefix=f"{any_place.state.name}.kept"))
    shutil.copy(any_place.store.ledger / "checkpoint", kept / "checkpoint")

    def without_the_access(leaves):
        del leaves[next(i for i, leaf in enumerate(leaves) if leaf["type"] == "access")]
        leaves.append(leaves[-1])

    forge(any_place, without_the_access)
    findings = invalid(any_place, kept=[kept / "checkpoint"])
    assert any("does not continue the kept" in finding.reason for finding in findings)
    shutil.rmtree(kept)


def set_field(kind, name, value):
    def change(leaves):
        leaf = next(leaf for leaf in leaves if leaf["type"] == kind)
        leaf[name] = value(leaf[name]) if callable(value) else value

    return change


FORGED = {
    "bytes": lambda old: [old[0] + 1, old[1]],
    "own": [1, 0],
    "declared": [5, 5, 5],
    "frames": 7000,
    "records": 1,
    "operations": 9,
    "gaps": 5,
    "commits": 9,
    "reason": "timeout",
    "by": "gate",
    "opened": "2026-01-01T00:00:00.000000000Z",
    "subroot": "A" * 43 + "=",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_session_close_that_was_forged_by_who_has_the_log_key_is_found(place, name):
    forge(place, set_field("session_close", name, FORGED[name]))
    assert any(finding.session and f"says {name} " in finding.reason for finding in invalid(place))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("access", "action", "show"), ("decision", "action", "nothing"), ("gap", "packets", 1),
     ("heartbeat", "accepted", 1000), ("heartbeat", "kernel_accepted", 0), ("start", "role", "cli"),
     ("stop", "reason", "other"), ("config", "sha256", "00" * 32),
     ("session_open", "time", "2026-01-01T00:00:00.000000000Z")],
)  # fmt: skip
def test_any_leaf_that_was_forged_by_who_has_the_log_key_is_found(place, kind, name, value):
    def change(leaves):
        leaf = next(le for le in leaves if le["type"] == kind and le.get("generation"))
        leaf[name] = value

    forge(place, change)
    assert any(f"says {name} " in finding.reason for finding in invalid(place))


@pytest.mark.parametrize("kind", ["access", "decision", "session_open", "session_close", "stop"])
def test_a_record_whose_leaf_was_left_out_is_found(place, kind):
    def change(leaves):
        del leaves[next(i for i, le in enumerate(leaves) if le["type"] == kind)]

    forge(place, change)
    assert any(f"a {kind} record has no leaf" in finding.reason for finding in invalid(place))


def test_a_leaf_without_a_record_is_found(place):
    def change(leaves):
        at = next(i for i, leaf in enumerate(leaves) if leaf["type"] == "access")
        leaves.insert(at, leaves[at])

    forge(place, change)
    assert any("no record" in finding.reason for finding in invalid(place))


@pytest.mark.parametrize(
    ("name", "value"),
    [("root", "A" * 43 + "="), ("commits", lambda n: n - 1), ("commits", lambda n: n + 1),
     ("first", 1), ("offset", 8192), ("end", lambda n: n + BLOCK), ("base", 8),
     ("position", lambda n: n + 8), ("final", lambda flag: not flag), ("header", ""),
     ("header", "A" * 43 + "="), ("incarnation", lambda n: n + 1), ("stream", "other")],
)  # fmt: skip
def test_a_segment_leaf_that_was_forged_is_found_without_the_key(place, name, value):
    (place.state / "appliance.key").unlink()
    forge(place, set_field("segment", name, value))
    assert any(finding.segment is not None for finding in invalid(place))


def test_a_changed_tag_breaks_the_chain_even_when_the_log_was_signed_anew_for_it(place):
    (place.state / "appliance.key").unlink()
    generation = place.store.generations()[0]
    found = commits(place, generation)
    path = place.store.segment(generation)
    flip(path, found[1].offset + 64 + found[1].plain_bytes + 5)
    content = path.read_bytes()
    blocks = [content[c.offset : c.offset + c.total_bytes] for c in found]
    root = root_of([sha256(block).digest() for block in blocks])

    def change(leaves):
        leaf = next(le for le in leaves if le.get("header") and le["generation"] == generation)
        assert leaf["commits"] == len(found)
        leaf["root"] = base64.b64encode(root).decode()

    forge(place, change)
    (finding,) = invalid(place)
    assert (finding.segment, finding.offset) == (generation, found[2].offset)
    assert "does not follow" in finding.reason


def test_a_leaf_that_is_not_canonical_or_not_known_is_found(place):
    leaves = place.leaves()
    signer = load_signer(place.store)
    shutil.rmtree(place.store.ledger)
    strange = [b'{"b":1,"a":1}', b'{"type":"more","v":1}', b"junk"]
    Ledger(place.store.ledger, signer).append([*leaves, *strange])
    assert {f.leaf for f in invalid(place)} == set(range(len(leaves), len(leaves) + 3))


def test_a_second_genesis_and_another_origin_are_found(place):
    forge(place, lambda leaves: leaves.append(leaves[0]))
    assert any("genesis" in finding.reason for finding in invalid(place))
    forge(place, lambda leaves: leaves.pop())
    assert place.verify().ok
    forge(place, set_field("genesis", "origin", "narrows/other"))
    assert any("another log" in finding.reason for finding in invalid(place))


def test_what_the_seal_saw_before_it_read_it_is_bound_by_its_hot_leaf():
    from capture.follow import Follower
    from capture.sealer import Sealer

    with evidence() as place:
        writer = place.writer()
        session = open_session(writer)
        for _ in range(20):
            say(writer, session, 100, 9_000)
            writer.wait_durable()
        sealer = Sealer(place.store)
        follower = Follower(place.store, place.keys, sealer.cursor, digests=True)
        for followed in follower.step(1):
            sealer.take(followed)
        sealer.flush(follower.unread())
        follower.close()
        (place.state / "appliance.key").unlink()
        report = place.verify()
        assert report.ok
        assert report.pending
        generation = place.store.generations()[0]
        late = commits(place, generation)[5]
        path = place.store.segment(generation)
        at = late.offset + 64 + late.plain_bytes + 3  # in its tag
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        assert any("when the seal saw them" in finding.reason for finding in invalid(place))
        writer.close()


def test_silence_that_no_restart_explains_is_incomplete(place):
    def change(leaves):
        beats = [leaf for leaf in leaves if leaf["type"] == "seal_heartbeat"]
        last = json.loads(json.dumps(beats[-1]))
        last["mono_ms"] += 3_600_000
        leaves.append(last)

    forge(place, change)
    report = place.verify()
    assert report.exit_code == 2
    assert "nothing was signed for" in report.text()


def test_bytes_that_were_changed_before_they_were_sealed_are_named_for_ever():
    with evidence() as place:
        writer = place.writer()
        for _ in range(5):
            whole_session(writer)
            writer.wait_durable()
        writer.close()
        generation = place.store.generations()[0]
        third = commits(place, generation)[2]
        flip(place.store.segment(generation), third.offset + 100)
        place.sealed()
        (place.state / "appliance.key").rename(place.state / "away")
        (finding,) = invalid(place)
        assert (finding.segment, finding.offset) == (generation, third.offset)
        assert "damaged before it was sealed" in finding.reason
        (place.state / "away").rename(place.state / "appliance.key")
        assert any("does not authenticate" in finding.reason for finding in invalid(place))
