"""narrows ca export: the certificate, and never the key."""

import stat

from cryptography import x509


def test_the_certificate_of_the_authority_is_printed_and_stays_the_same(narrows):
    first = narrows("ca", "export")
    assert first.code == 0
    certificate = x509.load_pem_x509_certificate(first.out.encode())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert narrows("ca", "export").out == first.out
    assert "PRIVATE" not in first.out


def test_it_is_written_to_a_file(narrows, tmp_path):
    assert narrows("ca", "export", "--output", str(tmp_path / "ca.pem")).out == ""
    assert (tmp_path / "ca.pem").read_text() == narrows("ca", "export").out


def test_a_key_that_others_may_read_is_refused(narrows):
    narrows("ca", "export")
    (key,) = narrows.config.parent.rglob("ca.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.chmod(0o644)
    refused = narrows("ca", "export")
    assert refused.code == 69
    assert "chmod 600" in refused.err
