"""What the TLS handshakes of one gate worker share: contexts, leaves, the authority.

Contexts are kept by what makes them differ, within bounds: a client can choose names and protocols
at will. No session is ever resumed (no tickets): every session shows its certificate.
"""

from __future__ import annotations

import os
import ssl
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509

from appliance.proxy.tls.authority import LEAF_DAYS, Authority, Leaf, fingerprint, read_private
from appliance.proxy.tls.stream import SCRATCH_BYTES
from appliance.wire import tlsrecords

if TYPE_CHECKING:
    from appliance.config import Config, Route

MOST_CONTEXTS = 256
_RENEWED_NS = LEAF_DAYS // 3 * 86_400 * 10**9
_SYSTEM_CERTIFICATES = Path("/etc/ssl/certs")


class UpstreamObject(ssl.SSLObject):
    """The gate as a client: remembers what the server's handshake shows."""

    certificates: tuple[bytes, ...] = ()  #: DER, the server's own first
    certificate_asked = False

    def seen(self, kind: int, message: bytes, *, thirteen: bool) -> None:
        """Look at one handshake message of the server, header included."""
        if kind == tlsrecords.CERTIFICATE_REQUEST:
            self.certificate_asked = True
        elif kind == tlsrecords.CERTIFICATE:
            self.certificates = tlsrecords.certificates(message[4:], thirteen=thirteen)


def _look(
    tls: UpstreamObject, direction: str, version: int, content: int, kind: int, data: bytes
) -> None:
    if direction == "read" and content == tlsrecords.HANDSHAKE and isinstance(tls, UpstreamObject):
        try:
            tls.seen(int(kind), data, thirteen=version == ssl.TLSVersion.TLSv1_3)
        except tlsrecords.NotTls:
            pass  # OpenSSL says so itself


class Terminator:
    """Makes contexts; raises OSError, ssl.SSLError or KeyFileError at the start when a file that a
    route names cannot be used.
    """

    def __init__(self, config: Config) -> None:
        intercepting = [route for route in config.route if route.tls == "intercept"]
        self.authority = Authority.load_or_create(config) if intercepting else None
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        #: a context without observers, for streams whose handshake is over
        self.quiet = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._leaf = lru_cache(MOST_CONTEXTS)(self._make_leaf)
        self._near = lru_cache(MOST_CONTEXTS)(_near)
        self._far = lru_cache(MOST_CONTEXTS)(_far)
        self._own = {route.name: _own(route) for route in intercepting if route.tls_certificate}
        for route in intercepting:
            self.upstream(route, (), named=True)

    def upstream(self, route: Route, alpn: tuple[str, ...], *, named: bool) -> ssl.SSLContext:
        """Return a context for the server's side. `named`: the certificate must be for the name
        that is asked for.
        """
        return self._far(route.tls_verify, route.tls_ca, alpn, named)

    def presented(self, route: Route, names: tuple[str, ...], now: int) -> Leaf:
        """Return the certificate that a client of `route` is shown; one that the authority signs is
        made anew long before it expires. `now` is nanoseconds since 1970.
        """
        own = self._own.get(route.name)
        return own if own is not None else self._leaf(names, now // _RENEWED_NS)

    def client(self, leaf: Leaf, alpn: str) -> ssl.SSLContext:
        """Return a context for the client's side."""
        return self._near(leaf, alpn)

    def _make_leaf(self, names: tuple[str, ...], _period: int) -> Leaf:
        assert self.authority is not None
        return self.authority.leaf(names)


def _own(route: Route) -> Leaf:
    chain = Path(route.tls_certificate).read_bytes()
    key = read_private(Path(route.tls_key))
    leaf = Leaf(chain, key, fingerprint(x509.load_pem_x509_certificates(chain)[0]))
    _near(leaf, "")  # that they fit is known now, not with the first client
    return leaf


def _near(leaf: Leaf, alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    if alpn:
        context.set_alpn_protocols([alpn])
    file = os.memfd_create("narrows-leaf", os.MFD_CLOEXEC)
    try:
        os.write(file, leaf.key + leaf.chain)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    return context


def _far(verify: str, ca: str, alpn: tuple[str, ...], named: bool) -> ssl.SSLContext:  # noqa: FBT001 - lru_cache keys
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.check_hostname = named and verify != "off"
    if verify == "off":
        context.verify_mode = ssl.CERT_NONE
    elif verify == "pinned":
        context.load_verify_locations(ca)
    else:
        _system(context)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    observed: Any = context
    observed.sslobject_class = UpstreamObject
    # The only way to see a certificate that was refused, or that one was asked for.
    observed._msg_callback = _look  # noqa: SLF001 - Python has it for tests and debugging
    return context


def _system(context: ssl.SSLContext) -> None:
    """Trust what the machine trusts: by a hashed folder where there is one, which is read when it
    is needed and not with every context.
    """
    if _SYSTEM_CERTIFICATES.is_dir():
        context.load_verify_locations(capath=str(_SYSTEM_CERTIFICATES))
    else:
        context.set_default_verify_paths()
