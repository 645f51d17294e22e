"""Who may do what: every route with every role, without a token, and what of it is recorded."""

import os
import threading

import pytest

from appliance.web.openapi import BASE
from appliance.web.server import ROUTES
from appliance.web.tokens import FILE, Right, Role, Tokens
from capture import index_query
from capture.errors import KeyFileError
from capture.frames import session_name
from capture.records import KINDS, Access, Operation, Start

#: What each route needs, written down apart from the code; None: nothing.
NEEDS = {
    "GET /sessions": "viewer",
    "GET /sessions/{session}": "viewer",
    "GET /sessions/{session}/operations": "reviewer",
    "GET /sessions/{session}/records": "reviewer",
    "GET /sessions/{session}/streams/{direction}": "reviewer",
    "GET /sessions/{session}/export": "reviewer",
    "POST /sessions/{session}/kill": "responder",
    "GET /live": "viewer",
    "GET /live/events": "viewer",
    "GET /events": "viewer",
    "GET /audit": "admin",
    "GET /evidence/checkpoint": "viewer",
    "GET /evidence/leaves": "viewer",
    "GET /evidence/proofs/inclusion": "viewer",
    "GET /evidence/proofs/consistency": "viewer",
    "GET /metrics": "viewer",
    "GET /health": None,
    "GET /openapi.json": None,
}
LADDER = ["viewer", "reviewer", "responder", "admin"]
QUERY = {
    "GET /sessions/{session}/records": "?kind=gaps",
    "GET /evidence/proofs/inclusion": "?index=0",
    "GET /evidence/proofs/consistency": "?old=1",
}


@pytest.fixture(scope="module")
def one(shared):
    with shared.evidence.writer() as gate:
        number = gate.open()
        gate.record(number, Operation(1, "SELECT", "select 1", 0, 8))
        gate.commit()
        shared.name = session_name(number)
        yield shared


def status(api, route, role):
    method, path = route.split(" ")
    path = path.replace("{session}", api.name).replace("{direction}", "up") + QUERY.get(route, "")
    if route.endswith("/live/events"):
        connection = api.connection()
        headers = {"Authorization": f"Bearer {api.tokens.get(role, role)}"} if role else {}
        connection.request("GET", BASE + path, headers=headers)
        found = connection.getresponse().status
        connection.close()
        return found
    if method == "POST":
        return api.post(path, {"reason": "because"}, role).status
    return api.get(path, role).status


def test_every_route_is_in_this_matrix():
    assert {f"{route.method} {route.path}" for route in ROUTES} == NEEDS.keys()


@pytest.mark.parametrize("route", NEEDS)
@pytest.mark.parametrize("role", [*LADDER, None, "narrows_wrong"])
def test_a_route_is_open_to_its_role_and_those_above_it_only(one, route, role):
    one.server.review.failures.__init__()  # the matrix fails more often than anybody may
    found = status(one, route, role)
    needs = NEEDS[route]
    if needs is None:
        assert found == 200
    elif role not in LADDER:
        assert found == 401
    elif LADDER.index(role) < LADDER.index(needs):
        assert found == 403
    else:
        assert found not in (401, 403)


def test_a_viewer_cannot_find_out_what_is_in_a_session_by_searching(one):
    assert one.get("/sessions", "viewer", q="select").problem() == "forbidden"
    assert one.ok("/sessions", "reviewer", q="select")["items"]


def test_every_read_is_recorded_with_who_what_and_which_before_it_is_answered(one):
    before = len(one.reads())
    one.ok("/sessions", "viewer", account="ci-deployer")
    one.ok("/sessions", "reviewer", q="select")
    one.ok(f"/sessions/{one.name}", "viewer")
    one.get(f"/sessions/{one.name}/streams/up", "reviewer")
    one.get(f"/sessions/{one.name}/export", "responder")
    one.get(f"/sessions/{one.name}/streams/up", "viewer")
    one.get("/sessions?nonsense=1", "viewer")
    one.get("/health", None)
    one.get("/metrics", "viewer")
    assert one.reads()[before:] == [
        ("the-viewer", "list", [], "allowed", f"{BASE}/sessions?account=ci-deployer"),
        ("the-reviewer", "search", [], "allowed", f"{BASE}/sessions?q=select"),
        ("the-viewer", "show", [one.name], "allowed", f"{BASE}/sessions/{one.name}"),
        ("the-reviewer", "show", [one.name], "allowed",
         f"{BASE}/sessions/{one.name}/streams/up"),
        ("the-responder", "export", [one.name], "allowed", f"{BASE}/sessions/{one.name}/export"),
        ("the-viewer", "show", [one.name], "denied", f"{BASE}/sessions/{one.name}/streams/up"),
    ]  # fmt: skip


def test_the_record_names_the_tokens_id_and_the_peer(one):
    one.ok("/sessions", "viewer")
    token = next(t for t in one.kept.all() if t.name == "the-viewer")
    with one.evidence.index() as index:
        *_, newest = index_query.events(index, KINDS[Access])
    assert newest.fields["actor"] == f"token:{token.id}(the-viewer) peer:127.0.0.1"


def test_no_part_of_a_token_is_in_the_evidence_or_the_file(one, caplog):
    one.ok("/sessions", "viewer")
    text = one.tokens["viewer"]
    assert text not in (one.config.paths.state / FILE).read_text()
    for _, _, _, _, _, payload in one.evidence.frames():
        assert text.encode() not in payload
    assert text not in caplog.text


def test_the_start_of_the_process_is_in_the_evidence(one):
    with one.evidence.index() as index:
        roles = [e.fields["role"] for e in index_query.events(index, KINDS[Start])]
    assert "review" in roles


def test_a_revoked_token_is_refused_at_once_and_its_listeners_end(api):
    connection = api.connection()
    connection.request("GET", BASE + "/live/events",
                       headers={"Authorization": f"Bearer {api.tokens['viewer']}"})  # fmt: skip
    answer = connection.getresponse()
    assert answer.status == 200
    assert api.get("/sessions", "viewer").status == 200
    api.kept.revoke(api.kept.chosen("the-viewer"))
    assert api.get("/sessions", "viewer").status == 401
    assert api.get("/sessions", "admin").status == 200
    assert b"workers" in answer.read(), "it ends"
    connection.close()


def test_failed_authentication_is_bounded_and_a_good_token_still_passes(api):
    found = [api.get("/sessions", "narrows_guess").status for _ in range(12)]
    assert found == [401] * 10 + [429] * 2
    limited = api.get("/sessions", None)
    assert limited.problem() == "too-many"
    assert 1 <= int(limited.headers["Retry-After"]) <= 61
    assert api.get("/sessions", "viewer").status == 200
    assert not api.reads()[1:], "what was refused read nothing"


@pytest.mark.parametrize(
    "given",
    ["", "Basic YTpi", "Bearer", "Bearer ", "Bearer a b", "Bearer \xff\xfe", "bearer x" * 400],
)
def test_no_other_credential_is_taken(api, given):
    answer = api.get("/sessions", None, headers={"Authorization": given})
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert api.get("/sessions?access_token=" + api.tokens["admin"], None).status in (400, 401)


def test_a_tokens_file_that_others_may_read_lets_nobody_in(api):
    path = api.config.paths.state / FILE
    os.chmod(path, 0o644)
    path.write_text(path.read_text() + "\n")
    assert api.get("/sessions", "admin").problem() == "unavailable"
    with pytest.raises(KeyFileError):
        Tokens(api.config.paths.state).all()
    os.chmod(path, 0o600)
    path.write_text(path.read_text() + "\n")
    assert api.get("/sessions", "admin").status == 200


def test_what_two_make_at_once_is_both_there(tmp_path):
    from appliance.web.tokens import make

    def add():
        for _ in range(10):
            Tokens(tmp_path).add(make(Role.VIEWER)[1])

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Tokens(tmp_path).all()) == 40
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_each_role_may_do_what_the_one_before_it_may():
    assert [len(role.rights) for role in Role] == [1, 2, 3, 4]
    assert Role.ADMIN.rights == frozenset(Right)


class NotDurable:
    """A writer whose records reach the disk when the test says so."""

    def __init__(self, writer):
        self._writer, self.stored = writer, threading.Event()

    def __getattr__(self, name):
        return getattr(self._writer, name)

    @property
    def durable(self):
        return self._writer.durable if self.stored.is_set() else 0


def test_no_answer_is_given_before_its_record_survives_power_loss(api):
    api.ok("/sessions")
    recorder, answers = api.server.review.recorder, []
    recorder._writer = held = NotDurable(recorder._writer)
    thread = threading.Thread(target=lambda: answers.append(api.get("/sessions").status))
    thread.start()
    thread.join(1)
    assert answers == []
    held.stored.set()
    thread.join()
    assert answers == [200]
    recorder._writer = held._writer


def test_a_read_that_cannot_be_recorded_is_not_answered(api):
    with api.evidence.writer() as gate:
        name = session_name(gate.open())
        gate.commit()
    assert api.ok("/sessions")["items"]
    recorder = api.server.review.recorder
    broken, recorder._writer = recorder._writer, None
    recorder._store, kept = None, recorder._store  # no writer can be made any more
    recorder._open = lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    answer = api.get(f"/sessions/{name}")
    assert (answer.status, answer.problem()) == (503, "not-recorded")
    assert name.encode() not in answer.body
    health = api.ok("/health", None)
    assert (health["status"], health["recording"]) == ("degraded", False)
    del recorder._open
    recorder._store, recorder._writer = kept, broken
    assert api.ok(f"/sessions/{name}")["id"] == name
