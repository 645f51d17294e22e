"""Real clients show their credentials to real servers through a real gate; afterwards the
credentials are looked for everywhere.

What was sent is read from the wire by tcpdump on the client host, where some of it is in the clear:
it has what no client tells, like SCRAM's proofs. Each secret is searched for in many forms, and so
are words that are no secret: they must be found, or the search is blind.
"""

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import psycopg
import pytest
from planting import Place, files, index_words, leaks, needles, plaintexts, secret
from staging import Stage, own_place, wait_for

sys.path.append(str(Path(__file__).parents[1] / "contract"))
sys.path.append(str(Path(__file__).parents[1] / "capture"))

from dissected import dissect, said
from pgserver import PASSWORD, PgServer

from appliance.lab.topology import SERVER4

pytestmark = pytest.mark.system
ACCOUNT = "report-job"
KINDS = ("facts", "gaps", "alarms", "hidden", "withheld", "decisions")
SECRETS = {name: secret(name) for name in (
    "basic", "bearer", "cookie", "api key", "parameter", "userinfo", "set-cookie", "location",
    "proxy", "smuggled", "unfinished",
)} | {"postgresql": PASSWORD}  # fmt: skip
#: No secrets: the first three must be found in all evidence and exports.
OPEN = {"path": secret("path"), "statement": secret("statement"), "answer": secret("answer")}
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 80; listen 443 ssl; ssl_certificate {certificate}; ssl_certificate_key {key};
    location / {{
      add_header Set-Cookie "sid={cookie}; Path=/" always;
      add_header Location "https://server.lab/?access_token={location}&x=1" always;
      return 200 "{answer}\\n";
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def stage():
    """A lab whose segments go into the sealed store as soon as they are finished."""
    made = Stage(own_place())
    try:
        made.up("[evidence]\nrewrite_s = 0\n")
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def told(stage, tmp_path_factory):
    """Return the secrets, after every client has shown what it knows and all of it is sealed."""
    folder = tmp_path_factory.mktemp("planted")
    wire = folder / "wire.pcap"
    words = ["tcpdump", "-U", "--immediate-mode", "-i", "any", "-w", str(wire), "tcp"]
    dump = stage.spawn("client", words, stderr=subprocess.PIPE, text=True)
    while "listening on" not in dump.stderr.readline():
        assert dump.poll() is None, "tcpdump ended"
    serve_http(stage, folder)
    with PgServer(15, host=SERVER4, port=5432, run=on_server(stage),
                  settings=tls_settings(stage)) as server:  # fmt: skip
        speak_http(stage)
        speak_postgresql(stage, server)
    exchanged = wait_for(lambda: exchanges(wire.read_bytes()), what="what tcpdump saw")
    dump.terminate()
    dump.wait(10)
    planted = SECRETS | exchanged | {"API token": stage.status()["api"]["token"]}
    seen = {name for _, name, _ in leaks([Place("wire", wire.read_bytes())], planted)}
    assert seen == set(planted) - {"API token"}, "not everything was sent"
    wait_for(lambda: all(s["state"] != "running" for s in stage.sessions()), what="the ends")
    for pid in stage.pids("gate"):
        os.kill(pid, signal.SIGKILL)  # its segments are finished
    wait_for(lambda: sealed(stage), what="the sealed store")
    return planted


def sealed(stage):
    """Say whether everything that the clients did is in the sealed store."""
    found = plaintexts(stage.store, stage.keys, stage.store.sealed_generations())
    return {name for _, name, _ in leaks(found, OPEN)} == set(OPEN)


def on_server(stage):
    def start(argv, **options):
        return stage.spawn("server", argv, group="postgresql", **options)

    return start


def tls_settings(stage):
    """PostgreSQL insists on a key of its own."""
    settings = {"ssl": "on"}
    certificates = stage.place.certificates
    for setting, file in (("ssl_cert_file", certificates.server),
                          ("ssl_key_file", certificates.server_key)):  # fmt: skip
        own = stage.place.folder / f"postgresql-{file.name}"
        own.touch(mode=0o600)
        own.write_bytes(file.read_bytes())
        shutil.chown(own, "postgres")
        settings[setting] = own
    return settings


def serve_http(stage, folder):
    config, certificates = folder / "nginx.conf", stage.place.certificates
    config.write_text(
        NGINX.format(
            folder=folder, certificate=certificates.server, key=certificates.server_key,
            cookie=SECRETS["set-cookie"], location=SECRETS["location"], answer=OPEN["answer"],
        )
    )  # fmt: skip
    argv = ["nginx", "-g", "user root;", "-e", str(folder / "error.log"), "-c", str(config)]
    stage.spawn("server", argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text(), what="nginx")


def speak_http(stage):
    """Show every secret of HTTP, in the clear and in TLS that the gate opens."""
    for base, account in product(("http://server.lab", "https://server.lab"), (None, ACCOUNT)):
        for words in (
            ["-u", f"ann:{SECRETS['basic']}", f"{base}/{OPEN['path']}"],
            ["-H", f"Authorization: Bearer {SECRETS['bearer']}", base],
            ["-b", f"sid={SECRETS['cookie']}; theme=dark", base],
            ["-H", f"X-Api-Key: {SECRETS['api key']}", base],
            ["-H", f"Proxy-Authorization: Basic {SECRETS['proxy']}", base],
            ["-e", f"{base}/?q=1&api_key={SECRETS['parameter']}", base],
            [f"{base}/a?access_token={SECRETS['parameter']}&n=1", f"{base}/b"],
            [base.replace("//", f"//ann:{SECRETS['userinfo']}@")],
        ):
            curl(stage, *words, account=account)
    two_ways = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"
    smuggled = f"{two_ways}Authorization: Bearer {SECRETS['smuggled']}\r\n\r\n0\r\n\r\n"
    for request in (
        f"POST / HTTP/1.1\r\nHost: x\r\n{smuggled}",
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRETS['unfinished']}",
    ):
        with stage.connect(SERVER4, 80) as sock:
            sock.sendall(request.encode())
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass


def curl(stage, *words, account=None):
    where = [word for port in (80, 443) for word in ("--resolve", f"server.lab:{port}:{SERVER4}")]
    done = stage.client(
        ["curl", "-sS", "--max-time", "20", *where, *words], account=account, env=stage.environment
    )
    assert OPEN["answer"] in done.stdout


def speak_postgresql(stage, server):
    """Show the password in every way that the server asks for it."""
    psql = [str(server.programs / "psql"), "-X", "-At", "-c", f"SELECT '{OPEN['statement']}'"]
    for user, mode in product(("plain", "hashed", "scram"), ("disable", "require")):
        where = f"host={SERVER4} user={user} dbname=shop sslmode={mode}"
        done = stage.client(
            [*psql, where], account=ACCOUNT, env=stage.environment | {"PGPASSWORD": PASSWORD}
        )
        assert OPEN["statement"] in done.stdout
        stage.client([*psql, f"{where} password={PASSWORD}"])
    stage.client([*psql, f"postgresql://scram:{PASSWORD}@{SERVER4}/shop"], account=ACCOUNT)

    def drive():
        with psycopg.connect(host=SERVER4, user="scram", password=PASSWORD, dbname="shop",
                             sslmode="require") as connection:  # fmt: skip
            connection.execute("SELECT %s", (OPEN["statement"],))

    stage.on("client", drive)


def exchanges(wire):
    """Return what SCRAM and MD5 exchanged in the clear, by name; empty until all of it is there."""
    found = {}
    for name, pattern in (
        ("SCRAM proof", rb"c=[A-Za-z0-9+/=]+,r=[!-+\--~]+,p=([A-Za-z0-9+/=]{44})"),
        ("SCRAM nonce", rb"c=[A-Za-z0-9+/=]+,r=([!-+\--~]{30,}),p="),
        ("SCRAM signature", rb"v=([A-Za-z0-9+/=]{44})"),
        ("SCRAM salt", rb",s=([A-Za-z0-9+/=]{24}),i="),
        ("MD5 answer", rb"md5([0-9a-f]{32})"),
    ):
        texts = sorted(set(re.findall(pattern, wire)))
        found |= {f"{name} {number}": text.decode() for number, text in enumerate(texts)}
        if not texts:
            return {}
    return found


def api(stage, *paths):
    """Yield what the API answers to an administrator."""
    access = stage.status()["api"]
    for path in paths:
        argv = ["curl", "-sS", "-i", "--cacert", access["ca_file"]]
        argv += ["-H", f"Authorization: Bearer {access['token']}", f"{access['url']}/api/v1{path}"]
        done = stage.on("gate", lambda: subprocess.run(
            argv, capture_output=True, check=True, timeout=60  # noqa: B023 - called at once
        ))  # fmt: skip
        assert done.stdout.startswith(b"HTTP/1.1 200"), (path, done.stdout[:300])
        yield Place(f"API {path}", done.stdout)


def paths(sessions):
    yield from ("/sessions?limit=1000", "/events?limit=1000", "/audit?limit=1000", "/live",
                "/health", "/metrics", "/openapi.json", "/evidence/checkpoint",
                "/evidence/leaves?limit=1000")  # fmt: skip
    for name in sessions:
        one = f"/sessions/{name}"
        yield from (one, f"{one}/operations", f"{one}/export", f"{one}/export?format=pcapng")
        yield from (f"{one}/records?kind={kind}" for kind in KINDS)
        yield from (f"{one}/streams/{way}" for way in ("up", "down", "gate-up", "gate-down"))


def commands(stage, sessions):
    """Yield what the command line prints."""
    words = [["sessions", "list"], ["sessions", "list", "--json"], ["sessions", "export", "--all"],
             ["live", "--json"], ["evidence", "verify", "--json"]]  # fmt: skip
    words += [["evidence", "log"], ["evidence", "log", "--json"]]
    for name in sessions:
        words.append(["sessions", "show", name, "--all", "--bytes"])
        words.append(["sessions", "show", name, "--json"])
    for each in words:
        done = stage.narrows(*each)
        yield Place(f"narrows {' '.join(each)}", (done.stdout + done.stderr).encode())


def exports(stage, folder):
    """Yield the files of every export of everything; capture files as one, which is quicker."""
    for form in ("ndjson", "raw"):
        out = folder / form
        stage.narrows("sessions", "export", "--all", "--format", form, "--output", str(out))
        yield from files(out)
    whole = folder / "pcapng" / "all.pcapng"
    whole.parent.mkdir()
    argv = [sys.executable, "-m", "appliance", "sessions", "export", "--all", "--format", "pcapng",
            "--output", "-", "--config", str(stage.place.config)]  # fmt: skip
    with whole.open("wb") as file:
        assert stage.spawn("gate", argv, stdout=file).wait(60) == 0
    yield from files(whole.parent)


def nothing_of(planted, places):
    found = leaks(places, planted)
    assert not found, "\n".join(f"{name} ({how}) in {place}" for place, name, how in found[:60])


def test_no_secret_is_on_disk_in_memory_or_in_a_log(stage, told):
    place = stage.place
    kept = list(files(place.folder, place.disk, place.memory, without=(place.token,)))
    assert len(kept) > 10
    nothing_of(told, kept)


def test_no_secret_is_in_a_decrypted_segment_or_the_sealed_store(stage, told):
    found = list(plaintexts(stage.store, stage.keys, stage.store.all_generations()))
    assert {name for _, name, _ in leaks(found, OPEN)} == set(OPEN)
    nothing_of(told, found)


def test_no_secret_is_in_the_index(stage, told):
    stage.sessions()
    found = list(index_words(stage.store.index))
    assert {name for _, name, _ in leaks(found, OPEN)} >= {"path", "statement"}
    nothing_of(told, found)
    assert stage.sessions("-q", OPEN["statement"])


def test_no_secret_is_in_an_export(stage, told, tmp_path):
    found = list(exports(stage, tmp_path))
    for form in ("ndjson", "raw", "pcapng"):
        mine = [place for place in found if form in Path(place.name).parts]
        assert {name for _, name, _ in leaks(mine, OPEN)} >= {"path", "statement"}, form
    nothing_of(told, found)


def some(sessions):
    """Return the oldest session of every kind, whose operations hold the words that are open."""
    kinds = {}
    for session in sessions:  # the newest first
        key = session["protocol"], session["target"], session["service_account"]
        kinds[key] = session["id"]
    return list(kinds.values())


def test_no_secret_is_in_an_answer_of_the_api(stage, told):
    found = list(api(stage, *paths(some(stage.sessions()))))
    assert {name for _, name, _ in leaks(found, OPEN)} >= {"path", "statement"}
    nothing_of(told, found)


def test_no_secret_is_printed_by_the_command_line(stage, told):
    found = list(commands(stage, some(stage.sessions())[::2]))
    assert {name for _, name, _ in leaks(found, OPEN)} >= {"path", "statement"}
    nothing_of(told, found)


@pytest.mark.parametrize(
    ("port", "field", "word"),
    [(80, "http.request.uri", "path"), (443, "http.request.uri", "path"),
     (5432, "pgsql.query", "statement")],
)  # fmt: skip
@pytest.mark.usefixtures("told")
def test_capture_files_are_dissected_also_where_tls_was_opened(stage, tmp_path, port, field, word):
    target = f"{SERVER4}:{port}"
    found = [s for s in stage.sessions() if s["target"] == target]
    mine = [s["id"] for s in found if s["operations"] and not s["counts"]["denied"]]
    words = ["--format", "pcapng", "--output", str(tmp_path)]
    stage.narrows("sessions", "export", mine[0], mine[-1], *words)  # the last, and the first
    opened, told = 0, []
    for file in tmp_path.iterdir():
        packets = dissect(file)
        told += said(packets, field)
        opened += b"TLS was opened by the gate" in file.read_bytes()
        assert not said(packets, "_ws.malformed")
        assert not any("tls" in each.split(":") for each in said(packets, "frame.protocols"))
    assert any(OPEN[word] in each for each in told), told
    assert opened or port == 80


def test_a_secret_is_found_in_every_form():
    text = secret("anything")
    around = [b"", b"a", b"ab", b"abc"]
    for form, coded in needles(text).items():
        assert len(coded) >= len(text), form
    for before, behind in product(around, around):
        for content in (before + text.encode() + behind, (before + text.encode() + behind).hex(),
                        base64.b64encode(before + text.encode() + behind),
                        text.encode("utf-16"), text.upper()):  # fmt: skip
            content = content if isinstance(content, bytes) else content.encode()  # noqa: PLW2901 - one form of it
            assert leaks([Place("here", content)], {"it": text}), content
    assert leaks([Place("here", text[:-1].encode())], {"it": text}) == []
