"""`narrows token`: made, listed, revoked, and each of it in the evidence before it is done."""

import json
import stat

import pytest

from appliance.web.tokens import FILE, Role, Tokens
from capture import index_query
from capture.records import KINDS, Decision


def decisions(narrows):
    with narrows.evidence.index() as index:
        return [
            (event.fields["action"], event.fields["reason"], event.fields["actor"])
            for event in index_query.events(index, KINDS[Decision])
        ]


@pytest.mark.parametrize("role", [role.value for role in Role])
def test_a_token_is_all_that_is_printed_and_is_good(narrows, role):
    answer = narrows("token", "create", "--role", role, "--name", "alice")
    assert (answer.code, answer.err) == (0, "")
    text = answer.out.removesuffix("\n")
    assert text.startswith("narrows_")
    assert len(text) >= 8 + 43
    state = narrows.evidence.store.state
    found = Tokens(state).find(text)
    assert (found.role.value, found.name) == (role, "alice")
    assert Tokens(state).find(text + "x") is None
    assert text not in (state / FILE).read_text()
    assert stat.S_IMODE((state / FILE).stat().st_mode) == 0o600
    [(action, reason, actor)] = decisions(narrows)
    assert (action, reason) == ("token-create", f"{found.id} {role} alice")
    assert actor.startswith("uid:0(root)")


def test_no_two_tokens_are_alike(narrows):
    texts = {narrows("token", "create", "--role", "viewer").out for _ in range(5)}
    assert len(texts) == 5


def test_tokens_are_listed_without_what_they_are(narrows):
    text = narrows("token", "create", "--role", "viewer", "--name", "bob").out.strip()
    answer = narrows("token", "list", "--json")
    [token] = answer.json()
    assert (token["name"], token["role"], token["revoked"]) == ("bob", "viewer", None)
    assert token.keys() == {"id", "name", "role", "created", "revoked"}
    table = narrows("token", "list")
    assert "bob" in table.out
    assert text not in table.out + answer.out
    assert json.dumps(token["id"]) in answer.out


def test_a_revoked_token_is_good_no_more(narrows):
    texts = [
        narrows("token", "create", "--role", "admin", "--name", name).out.strip()
        for name in ("ann", "ann", "ben")
    ]
    tokens = Tokens(narrows.evidence.store.state)
    assert all(tokens.find(text) for text in texts)
    assert narrows("token", "revoke", "ann").code == 0
    assert [tokens.find(text) is None for text in texts] == [True, True, False]
    [ben] = [token for token in tokens.all() if token.name == "ben"]
    assert narrows("token", "revoke", ben.id).code == 0
    assert tokens.find(texts[2]) is None
    assert [action for action, *_ in decisions(narrows)].count("token-revoke") == 3
    again = narrows("token", "revoke", "ann")
    assert again.code == 3
    assert "no good token is called ann" in again.err


@pytest.mark.parametrize("name", ["x" * 65, "a\nb", "\x1b[2J", "é"])
def test_a_name_that_cannot_stand_on_a_line_is_refused(narrows, name):
    answer = narrows("token", "create", "--role", "viewer", "--name", name)
    assert (answer.code, answer.out) == (2, "")
    assert Tokens(narrows.evidence.store.state).all() == []


def test_nothing_is_made_when_it_cannot_be_recorded(narrows):
    segments = narrows.evidence.store.segments
    for path in segments.iterdir():
        path.unlink()
    segments.rmdir()
    segments.write_text("in the way")
    answer = narrows("token", "create", "--role", "viewer")
    assert answer.code != 0
    assert answer.out == ""
    assert Tokens(narrows.evidence.store.state).all() == []


def test_a_file_that_others_may_read_is_refused(narrows):
    narrows("token", "create", "--role", "viewer")
    (narrows.evidence.store.state / FILE).chmod(0o644)
    answer = narrows("token", "list")
    assert answer.code == 69
    assert "chmod 600" in answer.err
