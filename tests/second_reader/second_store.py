"""A state directory, read from docs/evidence-format.md alone: every sealed commit and session."""

import base64
import struct
from dataclasses import dataclass
from hashlib import sha256

from second_frames import DOWN, DOWN_OWN, GAP, OPERATION, UP, UP_OWN, Session, frames, printed
from second_keys import KeySlots, key_file
from second_ledger import Broken, Ledger, expect, leaf_hash, read_ledger, root_of
from second_packs import read_packs
from second_segments import FINAL, read_segment


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was read: `sessions` by number (0: outside of sessions), by generation where a segment
    was read from ("segment" or "packs"), and the (generation, commit) of which
    nobody can open everything any more."""

    ledger: Ledger
    sessions: dict
    sources: dict
    unreadable: set


def text(data):
    """Return bytes as leaves have them."""
    return base64.b64encode(data).decode()


def check_run(leaf, header, commits):
    """Compare a `segment` leaf with the commits that it seals."""
    run = commits[leaf["first"] : leaf["first"] + leaf["commits"]]
    what = f"segment {header.generation:08x}, leaf of commit {leaf['first']}"
    expect(len(run) == leaf["commits"] > 0, f"{what}: commits missing")
    found = {
        "base": run[0].position, "position": run[-1].position + run[-1].length,
        "offset": run[0].offset, "end": run[-1].offset + run[-1].block_length,
        "final": run[-1].flags == FINAL, "incarnation": header.incarnation,
        "stream": header.stream, "root": text(root_of([leaf_hash(c.digest) for c in run])),
    }  # fmt: skip
    if header.key is not None:
        digest = text(sha256(header.block).digest())
        found["header"] = digest if leaf["first"] == 0 else ""
    for name, value in found.items():
        expect(leaf[name] == value, f"{what}: {name}")


def check_positions(header, commits, position):
    """Hold a segment's stream positions together; returns where the stream stands, and whether
    bytes are missing before a commit."""
    jumped = False
    for commit in commits:
        what = f"segment {header.generation:08x}, commit {commit.number}"
        expect(position <= commit.position, f"{what}: stream position")
        jumped |= position < commit.position
        position = commit.position + commit.length
    return position, jumped


def check_gaps(sessions):
    """Hold against the records that bytes are missing in a stream."""
    gaps = [gap["reason"] for session in sessions.values() for gap in session.of(GAP)]
    expect("unreadable-chunk" in gaps, "a stream jumps forward and no record says so")


def read_generation(evidence, runs, packs, damaged, keys):
    """Return (Header, commits, source) of one segment, compared with its leaves."""
    generation, count = runs[0]["generation"], runs[-1]["first"] + runs[-1]["commits"]
    path = evidence / "segments" / f"{generation:08x}.seg"
    if path.exists():
        header, commits = read_segment(path, count, runs[-1]["end"], keys.appliance_key, damaged)
        source = "segment"
    else:
        expect(packs, f"segment {generation:08x}: neither file nor packs")
        header, commits = read_packs(evidence / "sealed", packs, keys)
        source = "packs"
    expect(len(commits) == count, f"segment {generation:08x}: commits without a leaf")
    for leaf in runs:
        check_run(leaf, header, commits)
    return header, commits, source


def collect(sessions, unreadable, header, commits):
    """Add a segment's frames to the sessions; note what cannot be opened any more."""
    for commit in commits:
        opened = 0
        for number, runs in sorted(commit.runs.items()):
            session = sessions.setdefault(number, Session(number))
            leaf = commit.digest + struct.pack("<II", header.generation, commit.number)
            for start, data in runs:
                session.frames.extend(frames(data, start))
                leaf += struct.pack("<II", start, start + len(data))
                opened += len(data)
            session.leaves.append(leaf)
        if opened < commit.length:
            unreadable.add((header.generation, commit.number))


def check_close(leaf, session):
    """Compare a `session_close` leaf with the session that was read."""
    close = {
        "bytes": [session.size(UP), session.size(DOWN)],
        "own": [session.size(UP_OWN), session.size(DOWN_OWN)],
        "frames": len(session.frames), "records": len(session.records),
        "operations": len(session.of(OPERATION)), "gaps": len(session.of(GAP)),
        "commits": len(session.leaves),
        "subroot": text(root_of([leaf_hash(data) for data in session.leaves])),
    }  # fmt: skip
    for name, value in close.items():
        expect(leaf[name] == value, f"session {leaf['session']}: {name}")


def grouped(leaves):
    """Return {generation: its leaves, in order}."""
    found = {}
    for leaf in leaves:
        found.setdefault(leaf["generation"], []).append(leaf)
    return found


def read_store(state, verifier=None):
    """Return the Evidence of a state directory, or raise Broken where it is not what was sealed."""
    keys = KeySlots(state / "evidence" / "keys", key_file(state / "appliance.key"))
    verifier = verifier or (state / "ledger.pub").read_text("utf-8")
    ledger = read_ledger(state / "evidence" / "ledger", verifier)
    packs, damaged = grouped(ledger.of("pack")), grouped(ledger.of("damaged"))
    sessions, sources, unreadable, positions, jumps = {}, {}, set(), {}, False
    for generation, runs in sorted(grouped(ledger.of("segment")).items()):
        hurt = {leaf["offset"] for leaf in damaged.get(generation, ())}
        found = read_generation(state / "evidence", runs, packs.get(generation), hurt, keys)
        header, commits, sources[generation] = found
        stands = positions.get(header.incarnation, 0)
        positions[header.incarnation], jumped = check_positions(header, commits, stands)
        jumps |= jumped
        collect(sessions, unreadable, header, commits)
    if jumps:
        check_gaps(sessions)
    known = {printed(number): session for number, session in sessions.items()}
    for leaf in ledger.of("session_close"):
        if leaf["session"] in known:
            check_close(leaf, known[leaf["session"]])
        elif not unreadable:
            raise Broken(f"session {leaf['session']}: not there")
    return Evidence(ledger, sessions, sources, unreadable)
