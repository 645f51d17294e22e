"""The gate's certificate authority: its key, its certificate, and the leaves that it signs.

Made on first use, once for all processes of a state directory. Leaves are for what a client named,
or, where it named nothing, for what the server's own certificate names. One leaf key per process:
what it protects ends at the gate anyway.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from capture.errors import KeyFileError

if TYPE_CHECKING:
    from appliance.config import Config

CA_DAYS = 3650
LEAF_DAYS = 30
#: Clocks of clients may be behind.
EARLIER = timedelta(days=1)
MOST_NAMES = 100
_COMMON_NAME_LETTERS = 64


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate to show, with its chain and key, as PEM."""

    chain: bytes
    key: bytes
    sha256: str  #: of the certificate itself


class Authority:
    """Signs leaves. `certificate` is what clients must trust."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_pem = _key_pem(self._leaf_key)

    def __repr__(self) -> str:
        return f"Authority({self.certificate.subject.rfc4514_string()})"

    @classmethod
    def load_or_create(cls, config: Config) -> Authority:
        """Return the authority that the configuration names, making it in `paths.state` when that
        has none. Raises OSError, KeyFileError.
        """
        if config.tls.ca:
            return cls._load(Path(config.tls.ca), Path(config.tls.ca_key))
        config.paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls.in_folder(config.paths.state, "Narrows gate")

    @classmethod
    def in_folder(cls, folder: Path, name: str) -> Authority:
        """Return the authority whose files are ca.pem and ca.key in `folder`, making it when they
        are not there. Raises OSError, KeyFileError.
        """
        certificate, key = folder / "ca.pem", folder / "ca.key"
        if not key.exists():
            _create(key, _key_pem(ec.generate_private_key(ec.SECP256R1())), 0o600)
        if not certificate.exists():
            _create(certificate, pem(_own_certificate(_load_key(key), name)), 0o644)
        return cls._load(certificate, key)

    @classmethod
    def _load(cls, certificate: Path, key: Path) -> Authority:
        try:
            loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        except ValueError as wrong:
            raise KeyFileError(f"{certificate} is no certificate") from wrong
        private = _load_key(key)
        if loaded.public_key() != private.public_key():
            raise KeyFileError(f"{key} is not the key of {certificate}")
        return cls(loaded, private)

    def leaf(self, names: tuple[str, ...]) -> Leaf:
        """Return a certificate for host names and addresses."""
        now = datetime.now(UTC)
        first = names[0] if names and len(names[0]) <= _COMMON_NAME_LETTERS else "narrows"
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, first)]))
            .issuer_name(self.certificate.subject)
            .public_key(self._leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - EARLIER)
            .not_valid_after(min(now + timedelta(days=LEAF_DAYS), self._until))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        alternatives = [_general(name) for name in names[:MOST_NAMES]]
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        signed = builder.sign(self._key, hashes.SHA256())
        return Leaf(
            pem(signed) + pem(self.certificate), self._leaf_pem, fingerprint(signed)
        )  # fmt: skip

    @property
    def _until(self) -> datetime:
        return self.certificate.not_valid_after_utc


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256 as hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def names_of(der: bytes) -> tuple[str, ...]:
    """Return the host names and addresses that a certificate is for; its common name when it lists
    none; none at all when it cannot be read.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = _alternatives(certificate)
        if not names:
            common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            names = [str(each.value) for each in common[:1]]
    except Exception:  # noqa: BLE001 - a peer's certificate may be anything; the record says what
        return ()
    return tuple(name for name in names if name and name.isascii())[:MOST_NAMES]


def _alternatives(certificate: x509.Certificate) -> list[str]:
    try:
        listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(each) for each in listed.get_values_for_type(x509.IPAddress)]
    return [*listed.get_values_for_type(x509.DNSName), *addresses]


def read_private(path: Path) -> bytes:
    """Return the content of a key file; KeyFileError when others may read it."""
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise KeyFileError(f"{path} may be read by others (mode {mode:o}); chmod 600 it")
        return file.read()


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _own_certificate(key: ec.EllipticCurvePrivateKey, common_name: str) -> x509.Certificate:
    now = datetime.now(UTC)
    number = secrets.token_hex(4)  # two gates' authorities must not have one name
    name = x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Narrows"),
        x509.NameAttribute(NameOID.COMMON_NAME, f"{common_name} {number}"),
    ])  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except (ValueError, TypeError) as wrong:
        raise KeyFileError(f"{path} is no private key") from wrong
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{path} is no elliptic curve key")
    return key


def _create(path: Path, content: bytes, mode: int) -> None:
    """Write a file that appears whole; one that another process made first stays."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        os.link(scratch, path)
    except FileExistsError:
        pass  # another process was faster
    finally:
        scratch.unlink()
