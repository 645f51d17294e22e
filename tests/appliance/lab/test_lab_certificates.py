"""The lab's certificate is for the names that the documents promise, by OpenSSL's own judgement."""

import ssl

import pytest

from appliance.lab.certificates import SERVER_NAMES, Certificates


def judged(files, name):
    """Return what a client says of the server's certificate for `name`; "" when it is taken."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.server, files.server_key)
    client = ssl.create_default_context(cafile=files.ca)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(10):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as wrong:
                return wrong.verify_message
            ends.remove(end)
    assert not ends, "the handshake goes on for ever"
    return ""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = Certificates(tmp_path_factory.mktemp("lab") / "tls")
    made.make()
    return made


@pytest.mark.parametrize("name", SERVER_NAMES)
def test_every_name_of_the_servers_certificate_is_one_that_a_client_accepts(files, name):
    assert judged(files, name.replace("*", "db")) == ""


def test_another_name_is_refused(files):
    assert "db.lab" in judged(files, "db.lab")
