"""What the evidence says of X.509 certificates that came over the wire."""

from __future__ import annotations

import hashlib
from typing import Any

from cryptography import x509

MOST_CERTIFICATES = 10
MOST_NAMES = 20
_MOST_LETTERS = 500


def described(chain: tuple[bytes, ...]) -> tuple[dict[str, Any], ...]:
    """Return {subject, issuer, names, not_after, sha256} of each DER certificate; `unreadable`
    says why one is not whole.
    """
    return tuple(_one(der) for der in chain[:MOST_CERTIFICATES])


def _one(der: bytes) -> dict[str, Any]:
    told: dict[str, Any] = {"sha256": hashlib.sha256(der).hexdigest()}
    try:
        certificate = x509.load_der_x509_certificate(der)
        told["subject"] = certificate.subject.rfc4514_string()[:_MOST_LETTERS]
        told["issuer"] = certificate.issuer.rfc4514_string()[:_MOST_LETTERS]
        told["not_after"] = certificate.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")
        listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = listed.get_values_for_type(x509.DNSName)
        names += [str(each) for each in listed.get_values_for_type(x509.IPAddress)]
        told["names"] = [name[:_MOST_LETTERS] for name in names[:MOST_NAMES]]
    except x509.ExtensionNotFound:
        told["names"] = []
    except Exception as wrong:  # noqa: BLE001 - a peer's certificate may be anything, and so may the library's word for it
        told["unreadable"] = str(wrong)[:_MOST_LETTERS] or type(wrong).__name__
    return told
