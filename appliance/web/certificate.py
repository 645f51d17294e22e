"""The review API's certificate: the one that was configured, or one that it makes for itself.

A self-signed one is made once, on the first start, and kept: clients pin it (`--cacert`).
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import socket
import ssl
import stat
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from capture.errors import KeyFileError
from capture.ledger import sync_directory, write_file

if TYPE_CHECKING:
    from pathlib import Path

    from appliance.config import Config

DAYS = 3650


def files(config: Config) -> tuple[Path, Path]:
    """Return the paths of the certificate and its key."""
    state, review = config.paths.state, config.review
    return state / (review.certificate or "review.crt"), state / (review.key or "review.key")


def context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the server's TLS: 1.2 or newer; KeyFileError when the files cannot be used."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2; all of 1.3 are as good
    made.options |= ssl.OP_NO_RENEGOTIATION
    made.set_alpn_protocols(["http/1.1"])
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
        if mode & 0o077:
            raise KeyFileError(f"{key} may be read by others (mode {mode:o}); chmod 600 it")
        made.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as wrong:
        raise KeyFileError(f"{certificate} and {key} cannot be used: {wrong}") from wrong
    return made


def ensure(certificate: Path, key: Path, address: str) -> None:
    """Make a self-signed certificate for `address` and this host's name, unless one is there."""
    if certificate.exists() and key.exists():
        return
    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    made = _certificate(private, address)
    write_file(key, pem)
    write_file(certificate, made.public_bytes(serialization.Encoding.PEM), mode=0o644)
    os.chmod(certificate, 0o644)  # whatever the umask: clients are given it
    sync_directory(certificate.parent)


def _certificate(private: ec.EllipticCurvePrivateKey, address: str) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Narrows review API")])
    now = dt.datetime.now(dt.UTC)
    public = private.public_key()
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=False, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName(_names(address)), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(private, hashes.SHA256())
    )


def _names(address: str) -> list[x509.GeneralName]:
    """Return what clients may call this host: its address, its name, and itself."""
    found: dict[x509.GeneralName, None] = {}
    for text in (address, "127.0.0.1", "::1"):
        parsed = ipaddress.ip_address(text)
        if not parsed.is_unspecified:
            found[x509.IPAddress(parsed)] = None
    for name in ("localhost", socket.gethostname()):
        if name.isascii() and name:
            found[x509.DNSName(name)] = None
    return list(found)
