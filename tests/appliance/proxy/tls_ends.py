"""Certificates, and TLS ends that a test plays itself."""

import ipaddress
import os
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAME = "up.test"


class Certificates:
    """An authority and the certificates that it signed, as files in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key, self._name = ec.generate_private_key(ec.SECP256R1()), name_of("test authority")
        self.ca = self._write("ca", self._sign(self._name, self._key, (), ca=True), None)[0]

    def server(self, name=NAME, names=None, *, days=5):
        """Return the files of a server's (certificate, key)."""
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._sign(name_of(name), key, names or (name,), days=days)
        return self._write(f"{name}-{os.urandom(4).hex()}", signed, key)

    def _sign(self, subject, key, names, *, ca=False, days=5):
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )  # fmt: skip
        if names:
            listed = x509.SubjectAlternativeName([general(name) for name in names])
            builder = builder.add_extension(listed, critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, stem, certificate, key):
        file, key_file = self.folder / f"{stem}.pem", self.folder / f"{stem}.key"
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        if key is not None:
            key_file.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )  # fmt: skip
            key_file.chmod(0o600)
        return file, key_file


def name_of(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def general(name):
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def server_context(files, *, alpn=(), version=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if version:
        context.maximum_version = version
    return context


def client_context(ca, *, alpn=(), version=None):
    context = ssl.create_default_context(cafile=str(ca))
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if version:
        context.maximum_version = version
    return context


class End:
    """A blocking TLS end that can end one direction, say nothing at its end, or go slowly."""

    def __init__(self, sock, context, *, server=False, name=NAME):
        self.sock = sock
        sock.settimeout(20)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._in, self._out, server_side=server, server_hostname=None if server else name
        )
        self._do(self.tls.do_handshake)

    def _do(self, call, *words):
        while True:
            try:
                done = call(*words)
            except ssl.SSLWantReadError:
                self._flush()
                data = self.sock.recv(65536)
                if data:
                    self._in.write(data)
                else:
                    self._in.write_eof()
            except ssl.SSLError:
                self._flush()  # an alert
                raise
            else:
                self._flush()
                return done

    def _flush(self):
        if self._out.pending:
            self.sock.sendall(self._out.read())

    def send(self, data):
        view = memoryview(data)
        for at in range(0, len(view), 1 << 18):
            self.tls.write(view[at : at + (1 << 18)])
            self._flush()

    def recv(self, size=65536):
        """Return bytes, empty at an end that was said; ssl.SSLEOFError at one that was not."""
        try:
            return self._do(self.tls.read, size)
        except ssl.SSLZeroReturnError:
            return b""

    def read_all(self):
        found = bytearray()
        while data := self.recv(1 << 18):
            found += data
        return bytes(found)

    def say_end(self):
        """Send close_notify; the other direction goes on."""
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass  # the peer's own end is not here yet
        self._flush()

    def close(self):
        self.sock.close()


def serving(files, serve, *, connections=1, **options):
    """Return (address of a TLS server, thread); `serve(End)` gets each connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)
    context = server_context(files, **options)

    def run():
        with listener:
            for _ in range(connections):
                sock, _ = listener.accept()
                with sock:
                    try:
                        serve(End(sock, context, server=True))
                    except (ssl.SSLError, OSError):
                        pass  # what the client makes of it is what a test looks at

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return listener.getsockname(), thread
