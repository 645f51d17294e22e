"""Who a session belongs to, in words: the comment of a capture file's section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capture.moment import rfc3339

if TYPE_CHECKING:
    from capture.export.packets import Known
    from capture.index_query import Session

MOST_LETTERS = 4_000  #: of one comment
#: Ports on which a dissector looks for a protocol by itself, as far as we decode it.
_USUAL = {"postgresql": ("5432", "pgsql"), "http1": ("80", "http"), "tls": ("443", "tls")}


def shown(text: str) -> str:
    """Return text as printable ASCII: peers choose much of it."""
    return "".join(
        letter if " " <= letter <= "~" else letter.encode("unicode_escape").decode()
        for letter in text.encode("utf-8", "backslashreplace").decode()
    )


def lines(session: Session, known: Known) -> list[str]:
    """Return what a reader of the packets must know, a line each."""
    who = session.account or f"unknown ({session.unknown or 'not recorded'})"
    told = [
        f"Narrows session {session.name}",
        f"service account: {who}",
        f"assurance: {session.assurance or 'none'}, attributed by: {session.how or 'none'}",
        f"owner: {_owner(session.owner)}",
        f"client {session.client or 'unknown'}, target {session.target or 'unknown'}",
        f"route: {session.route or 'unknown'}, protocol: {session.protocol or 'unknown'}",
        f"started {rfc3339(session.started)}, {session.state.value}"
        + (f": {session.reason} by {session.ended_by}" if session.reason else ""),
        "TCP is synthetic, made from the recorded bytes of the client's side",
        "hidden bytes (credentials) are zero and named in packet comments",
        *_secrets(session),
        *_tls(known),
        *_hint(session),
    ]
    return [shown(line)[:MOST_LETTERS] for line in told]


def _secrets(session: Session) -> list[str]:
    if session.secrets != "unparsed":
        return []
    return ["secrets: unparsed, so that credentials may be in these bytes"]


def _owner(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "unknown"
    words = [f"{owner.get('exe', '?')} pid {owner.get('pid', '?')}"]
    for name in ("uid", "host", "unit", "container", "pod", "cgroup", "exe_sha256"):
        if owner.get(name) not in (None, ""):
            words.append(f"{name} {owner[name]}")
    return ", ".join(words)


def _tls(known: Known) -> list[str]:
    if not known.tls:
        return []
    last = known.tls[-1]
    server = f", server name {last['sni']}" if last["sni"] else ""
    if known.opened:
        return [
            "TLS was opened by the gate: this is the decrypted stream as plain TCP",
            f"TLS with the client: {_version(known)}{server}; what was said before it is left out",
        ]
    return [f"TLS was not opened ({last['mode']}, {last['stage']}): these are its records{server}"]


def _version(known: Known) -> str:
    found = [tls["client_version"] for tls in known.tls if tls["client_version"]]
    return str(found[-1]) if found else "unknown version"


def _hint(session: Session) -> list[str]:
    port, dissector = _USUAL.get(session.protocol or "", ("", ""))
    used = (session.target or "").rpartition(":")[2]
    if not dissector or used in (port, ""):
        return []
    return [f"to have it dissected: Decode As, or tshark -d tcp.port=={used},{dissector}"]
