"""Secrets on command lines: hidden however a program is told them, and nothing else with them."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.wire.argvsecrets import blanked
from appliance.wire.httpsecrets import Secrets

SECRETS = Secrets()


def shown(line):
    return shlex.join(blanked(shlex.split(line), SECRETS))


@pytest.mark.parametrize(
    "line",
    [
        "curl -u ann:s3cr3t https://shop/",
        "/usr/bin/curl --user ann:s3cr3t x", "curl -uann:s3cr3t x",
        "curl --user=ann:s3cr3t x", "curl -U ann:s3cr3t x", "curl --proxy-user ann:s3cr3t x",
        "curl -H 'Authorization: Bearer s3cr3t' x", "curl '-HAuthorization: Basic s3cr3t' x",
        "curl --header 'X-Api-Key: s3cr3t' x", "curl -H 'Cookie: sid=s3cr3t; a=b' x",
        "curl -b sid=s3cr3t x", "curl -bsid=s3cr3t x", "curl --cookie sid=s3cr3t x",
        "curl --cookie=sid=s3cr3t x", "curl --oauth2-bearer s3cr3t x",
        "curl https://ann:s3cr3t@shop/", "curl 'https://shop/?a=1&access_token=s3cr3t&b=2'",
        "curl -e 'https://shop/?api_key=s3cr3t' x", "curl -d 'user=ann&password=s3cr3t' x",
        """curl -d '{"user": "ann", "password": "s3cr3t"}' x""",
        """curl -d '{"token":"s3cr3t"}' x""",
        "wget --password=s3cr3t x", "wget --http-password s3cr3t x",
        "psql 'host=db user=ann password=s3cr3t dbname=shop'",
        "psql postgresql://ann:s3cr3t@db/shop",
        "psql 'postgresql://db/shop?user=ann&password=s3cr3t'",
        "psql \"host=db password='s3cr3t with space' dbname=shop\"",
        "env PGPASSWORD=s3cr3t psql -h db", "docker run -e MYSQL_ROOT_PASSWORD=s3cr3t mysql",
        "sh -c 'PGPASSWORD=s3cr3t psql -h db'", "bash -c 'curl -u ann:s3cr3t https://shop/'",
        "sh -c \"curl -H 'Authorization: Bearer s3cr3t' https://shop/\"",
        "sh -c 'curl -b sid=s3cr3t https://shop/'", "sh -c 'tool --api-key s3cr3t run'",
        "sh -c 'tool --password \"s3cr3t and more\" run'", "mysql -ps3cr3t shop",
        "mariadb-dump -u ann -ps3cr3t shop", "mysql --password=s3cr3t", "redis-cli -a s3cr3t ping",
        "redis-cli -u redis://ann:s3cr3t@db:6379", "sshpass -p s3cr3t ssh x",
        "sshpass -ps3cr3t ssh x",
        "mongosh -u ann -p s3cr3t", "ldapsearch -D cn=ann -w s3cr3t", "tool --client-secret s3cr3t",
        "tool --secret_key=s3cr3t", "tool -Dspring.datasource.password=s3cr3t",
        "vault login token=s3cr3t", "AWS_SECRET_ACCESS_KEY=s3cr3t aws s3 ls",
        "openssl rsa -passin pass:x --passphrase s3cr3t", "kubectl --token=s3cr3t get pods",
        "git clone https://oauth2:s3cr3t@git/x.git", "tool ACCESS_TOKEN:s3cr3t",
    ],
)  # fmt: skip
def test_a_secret_is_hidden_and_its_place_is_marked(line):
    told = shown(line)
    assert "s3cr3t" not in told
    assert "[hidden]" in told
    assert len(blanked(shlex.split(line), SECRETS)) == len(shlex.split(line))


@pytest.mark.parametrize(
    "line",
    [
        "psql -h db -U report -d shop -c 'SELECT 1'", "pgbench -c 4 -T 10 shop", "curl -sS https://shop/",
        "curl -H 'Accept: text/html' https://shop/?page=2", "mysql -p shop", "mysql -u ann shop",
        "python3 -m tokenizer --words=5", "tool --token-file=/run/token --password-file /x",
        "git checkout -b feature", "ssh -p 2222 ann@host", "redis-cli -h db -p 6379 get a:b",
        "tool --keyring x --monkey=banana", "curl -o passwords.txt https://shop/", "",
    ],
)  # fmt: skip
def test_what_is_no_secret_stands_as_it_was(line):
    assert shown(line) == shlex.join(shlex.split(line))


def test_the_rest_of_a_word_stands():
    assert blanked(["curl", "https://ann:s3cr3t@shop/a?token=s3cr3t&n=1"], SECRETS) == [
        "curl", "https://[hidden]@shop/a?token=[hidden]&n=1",
    ]  # fmt: skip
    assert blanked(["psql", "host=db password=s3cr3t dbname=x"], SECRETS) == [
        "psql", "host=db password=[hidden] dbname=x",
    ]  # fmt: skip
    assert blanked(["curl", "-u", "ann:a:b"], SECRETS) == ["curl", "-u", "ann:[hidden]"]


@given(st.lists(st.text(st.characters(exclude_categories=[]), max_size=60), max_size=6))
def test_any_words_stay_so_many_words(argv):
    assert len(blanked(argv, SECRETS)) == len(argv)


@pytest.mark.parametrize("word", ["a" * 4096, "-" * 4096, "password" * 512, "password=" * 455,
                                  "curl " * 800, "-u " * 1300, 'token\\"' * 600])  # fmt: skip
def test_a_long_word_is_looked_at_in_bounded_work(word):
    assert len(blanked(["x", word], SECRETS)) == 2
