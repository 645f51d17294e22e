"""The keys of a route that say what happens to TLS are as strict as all others."""

import pytest

from appliance.config import ConfigError, load

ROUTE = '[[route]]\nname = "all"\n'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('tls = "intercept"\ntls_verify = "pinned"', "tls_verify"),
        ('tls = "intercept"\ntls_ca = "/a"', "tls_ca"),
        ('tls = "intercept"\ntls_verify = "pinned"\ntls_ca = "a"', "tls_ca"),
        ('tls = "intercept"\ntls_certificate = "/a"', "tls_certificate"),
        ('tls = "intercept"\ntls_key = "/a"', "tls_key"),
        ('tls_upstream = "plain"', "tls_upstream"),
        ('tls_certificate = "/a"\ntls_key = "/b"', "tls_certificate"),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_name(tmp_path, text, key):
    file = tmp_path / "narrows.toml"
    file.write_text(ROUTE + text + "\n")
    with pytest.raises(ConfigError) as refused:
        load(file)
    assert refused.value.key == f"route.{key}"
    assert refused.value.line > 0


def test_a_word_that_is_none_is_refused(tmp_path):
    file = tmp_path / "narrows.toml"
    file.write_text(ROUTE + 'tls = "open"\n')
    with pytest.raises(ConfigError, match=r"tls: 'open' is not allowed"):
        load(file)


def test_an_authority_is_given_with_its_key_or_not_at_all(tmp_path):
    file = tmp_path / "narrows.toml"
    file.write_text('[tls]\nca = "/a"\n' + ROUTE)
    with pytest.raises(ConfigError, match="go together"):
        load(file)


def test_tls_passes_through_unless_the_route_says_otherwise(tmp_path):
    file = tmp_path / "narrows.toml"
    file.write_text(ROUTE)
    assert load(file).route[0].tls == "passthrough"
