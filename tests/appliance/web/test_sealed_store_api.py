"""The API over the sealed store: what was rewritten while it runs is answered as before."""

import time

from review_evidence import SETTINGS

from capture.frames import incarnation_of, session_name
from capture.seal import Seal
from capture.sealed import RewriteSettings
from capture.segments import open_segment


def answers(api, session):
    """Return what the API says of a session: itself, its operations, its bytes."""
    found = [
        api.get(f"/sessions/{session}").json(),
        api.get(f"/sessions/{session}/operations").json(),
    ]
    for direction in ("up", "down"):
        path = f"/sessions/{session}/streams/{direction}"
        found.append(api.get(path).body)
        found.append(api.get(path, headers={"Range": "bytes=70000-70999"}).body)
    return found


def test_what_the_seal_rewrites_is_answered_as_before(api):
    with api.evidence.writer(settings=SETTINGS) as gate:
        session = gate.open()
        for number in range(12):
            gate.up(session, bytes([number]) * 100_000)
            gate.down(session, bytes([200 + number]) * 50_000)
            gate.commit()
        gate.close(session)
    before = answers(api, session_name(session))
    store = api.evidence.store
    written = set()
    for generation in store.generations():
        with open_segment(store, generation) as segment:
            if segment.header.incarnation == incarnation_of(session):
                written.add(generation)
    seal = Seal(store, api.evidence.keys, 0.01, RewriteSettings(after_s=-1, reserve_bytes=0))
    until = time.monotonic() + 60
    while written & set(store.generations()) and time.monotonic() < until:
        seal.step()
    seal.close()
    assert not written & set(store.generations())
    assert written <= set(store.sealed_generations())
    assert answers(api, session_name(session)) == before
    metrics = api.get("/metrics").body.decode()
    assert "narrows_seal_backlog_segments" in metrics
