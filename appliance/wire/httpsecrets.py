"""Where the credentials stand in an HTTP/1.1 head: header values and query parameters.

`appliance.wire.httphead` asks for whole heads, the two sides' readers for heads that are not whole
and for bytes that are no head at all. A span is (start, end, kind) and counts from the beginning of
the bytes that were given; spans do not overlap and stand in order.

Always secret: the headers and parameters named below. The configuration adds to both ([http]). A
header's value is secret from its first byte to its last. A parameter is one in a URL, wherever in
the head a URL stands (Referer, Location, X-Original-URL) and however often it is percent-encoded;
so is what stands before the @ of an authority. Bodies are not looked at.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Lower case.
HEADERS = frozenset({
    "authorization", "proxy-authorization", "cookie", "set-cookie", "cookie2", "set-cookie2",
    "api-key", "apikey", "deploy-token", "job-token", "ocp-apim-subscription-key", "private-token",
    "x-access-token", "x-amz-security-token", "x-amzn-oidc-accesstoken", "x-amzn-oidc-data",
    "x-api-key", "x-api-token", "x-apikey", "x-auth-key", "x-auth-token", "x-authorization",
    "x-client-secret", "x-consul-token", "x-csrf-token", "x-forwarded-access-token",
    "x-gitlab-token", "x-goog-api-key", "x-goog-iap-jwt-assertion", "x-jwt-assertion",
    "x-ms-copy-source-authorization", "x-ms-token-aad-access-token", "x-ms-token-aad-id-token",
    "x-ms-token-aad-refresh-token", "x-service-token", "x-session-token",
    "x-shopify-access-token", "x-subject-token", "x-token", "x-vault-token", "x-xsrf-token",
})  # fmt: skip

#: Names of parameters as `_plain` leaves them: lower case, letters and digits only.
PARAMETERS = frozenset({
    "accesstoken", "apikey", "apitoken", "assertion", "authtoken", "bearertoken", "clientassertion",
    "clientsecret", "idtoken", "jsessionid", "jwt", "oauthtoken", "passphrase", "passwd",
    "password", "phpsessid", "privatekey", "privatetoken", "pwd", "refreshtoken", "samlresponse",
    "secret", "secretkey", "sessionid", "sessiontoken", "sig", "signature", "subscriptionkey",
    "token", "xamzsecuritytoken", "xamzsignature", "xapikey", "xgoogsignature",
})  # fmt: skip

_MOST_KNOWN = 1_024
HIDDEN = b"[hidden]"  #: what a text shows in a secret's place

#: First words of a credential that a record may show: any other may be a secret itself.
_SCHEME = re.compile(
    rb"(?:AWS4-HMAC-SHA256|AWS4-ECDSA-P256-SHA256|ApiKey|Basic|Bearer|DPoP|Digest|GoogleLogin|Hawk"
    rb"|Key|MAC|NTLM|Negotiate|OAuth|SCRAM-SHA-1|SCRAM-SHA-256|SharedKey|SharedKeyLite|Splunk"
    rb"|Token|Vapid) +",
    re.IGNORECASE,
)
#: The name of a parameter and the mark before it, or user and password before an authority's @. It
#: begins with a set of bytes, so that the search for it is one pass in C.
_MARK = re.compile(
    rb"[?&;#%:](?:"
    rb"(?:(?<=[?&;#])|(?<=%)(?:25)*(?:3[Ff]|26|3[Bb]|23))"
    rb"((?:[^=&;#\s?%]|%(?!(?:25)*(?:3[DdFfBb]|2[36]))){1,128})(?:=|%(?:25)*3[Dd])"
    rb"""|(?<=:)//([^/?#@\s"<>]+)@)"""
)
#: A value ends where its URL could go on; one behind a semicolon also at the next segment.
_VALUE = re.compile(rb"""[^&#\s"<>]+""")
_MATRIX_VALUE = re.compile(rb"""[^&#\s"<>;?/]+""")
_NO_LETTER = re.compile(rb"[^a-z0-9]")

Span = tuple[int, int, str]


def scheme(value: bytes) -> bytes:
    """Return the part of a secret header's value that a record may show: "Bearer ", or nothing."""
    found = _SCHEME.match(value)
    return b"" if found is None else found[0]


def may_hold_parameters(text: bytes) -> bool:
    """Say cheaply whether `Secrets.in_text` could find anything."""
    return b"=" in text or b"%" in text or b"@" in text


def redact(text: bytes, spans: Sequence[Span]) -> bytes:
    """Return `text` with a mark in the place of each span."""
    pieces = []
    at = 0
    for start, end, _ in spans:
        pieces += [text[at:start], HIDDEN]
        at = end
    return b"".join([*pieces, text[at:]])


def clip(spans: Sequence[Span], start: int) -> list[Span]:
    """Return what of `spans` lies at or after `start`."""
    return [(max(span[0], start), span[1], span[2]) for span in spans if span[1] > start]


class Secrets:
    """Knows the names of what is secret. One per configuration."""

    __slots__ = ("_junk", "_known", "_parameters", "headers")

    def __init__(self, headers: tuple[str, ...] = (), parameters: tuple[str, ...] = ()) -> None:
        """`headers` and `parameters` are secret besides those that always are."""
        self.headers = HEADERS | {name.lower() for name in headers}
        self._parameters = {name.encode() for name in PARAMETERS}
        self._parameters |= {_plain(name.encode()) for name in parameters}
        self._known: dict[bytes, bool] = {}
        names = b"|".join(
            re.escape(name.encode()).replace(rb"\-", b"[-_]") for name in sorted(self.headers)
        )
        value = rb"[^\r\n]+(?:[\r\n]+[ \t][^\r\n]*)*"  # obs-fold goes on with the value
        self._junk = re.compile(
            rb"(" + names + rb")[^:\r\n]{0,16}:[ \t]*(" + value + rb")", re.IGNORECASE
        )

    def in_text(self, text: bytes) -> list[Span]:
        """Return the spans of secret parameters in a request line, a header's value, or lines."""
        return self.scan(text)[0]

    def scan(self, text: bytes) -> tuple[list[Span], re.Pattern[bytes] | None]:
        """Return the spans of secret parameters, and how a value that reaches the end goes on."""
        found: list[Span] = []
        covered = 0  # up to here another value is secret already
        goes_on = None
        for match in _MARK.finditer(text):
            name = match[1]
            if match.start() < covered:
                continue
            if name is None:
                found.append((match.start(2), match.end(2), "userinfo"))
            elif self._is_secret(name):
                matrix = text[match.start()] == ord(";")
                pattern = _MATRIX_VALUE if matrix else _VALUE
                value = pattern.match(text, match.end())
                if value is not None:
                    found.append((value.start(), value.end(), "parameter"))
                    covered = covered if matrix else value.end()
                    goes_on = pattern if value.end() == len(text) else goes_on
        return (_merged(found) if len(found) > 1 else found), goes_on

    def _is_secret(self, name: bytes) -> bool:
        found = self._known.get(name)
        if found is None:
            found = _plain(name) in self._parameters
            if len(self._known) < _MOST_KNOWN:
                self._known[name] = found
        return found

    def in_line(self, line: bytes) -> list[Span]:
        """Return the spans of a field line. One that is not whole is secret as far as it goes.

        What is hidden of a byte depends on those before it only, never on how a line was cut: so a
        scheme is hidden with its credential, and trailing blanks with theirs.
        """
        key = self.header(line)
        if not key:
            return self.in_text(line)
        start = len(key) + 1
        start += len(line) - start - len(line[start:].lstrip(b" \t"))
        return [(start, len(line), key)] if start < len(line) else []

    def header(self, line: bytes) -> str:
        """Return the name of a field line when it is a secret header's, else ""."""
        key = line.partition(b":")[0].decode("latin-1").lower()
        return key if key in self.headers and len(key) < len(line) else ""

    def in_lines(self, lines: bytes) -> list[Span]:
        """Return the spans of lines, the last of which may not be whole."""
        found: list[Span] = []
        at = 0
        for line in lines.split(b"\r\n"):
            found += [(at + start, at + end, kind) for start, end, kind in self.in_line(line)]
            at += len(line) + 2
        return found

    def in_junk(self, text: bytes) -> list[Span]:
        """Return the spans of whatever looks like a secret in bytes that follow no grammar."""
        found = [
            (match.start(2), match.end(2), match[1].decode().lower().replace("_", "-"))
            for match in self._junk.finditer(text)
        ]
        return _merged(found + self.in_text(text))


def _merged(spans: list[Span]) -> list[Span]:
    """Return `spans` in order, with those that overlap made one."""
    merged: list[Span] = []
    for start, end, kind in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), merged[-1][2])
        elif end > start:
            merged.append((start, end, kind))
    return merged


def _plain(name: bytes) -> bytes:
    """Return a parameter's name as it is compared: "X%2DApi-Key" and "x_api_key" are one."""
    while b"%" in name:
        decoded = unquote_to_bytes(name)
        if decoded == name:
            break
        name = decoded
    return _NO_LETTER.sub(b"", name.lower())
