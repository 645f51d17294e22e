"""Lists, filters and text searches of the review API over very many sessions.

The sessions are generated (`bench.past`); the API is the real process, asked over HTTPS, so that
what is measured has TLS, the Access record of every read and the JSON in it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from appliance.web.tokens import Role, Tokens, make
from bench.past import ACCOUNTS, START_NS, STEP_NS, TARGETS, Past
from bench.stage import StageError
from capture.crypt import Keys
from capture.moment import rfc3339
from capture.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.report import Report

ASKED = 20  #: times that each question is asked in a round
PORT = 18443
GOAL_MS = 200.0

Questions = dict[str, dict[str, str]]


def questions(sessions: int) -> dict[str, Questions]:
    """Return what is asked, by kind."""
    hour = 3600 * 10**9
    middle = START_NS + sessions * STEP_NS // 2
    between = {"since": rfc3339(middle), "until": rfc3339(middle + hour)}
    account, target = {"account": ACCOUNTS[3]}, {"target": f"{TARGETS[7]}:5432"}
    return {
        "list": {
            "newest": {}, "a page in the middle": {"cursor": f"{middle}.0000000000000"},
        },
        "filter": {
            "account": account, "no such account": {"account": "nobody"}, "target": target,
            "protocol": {"protocol": "http1"}, "no account": {"unknown": "true"},
            "account and target": account | target, "hour": between,
            "account and protocol that never meet": account | {"protocol": "ssh"},
            "account in an hour": account | between, "running (none)": {"state": "running"},
        },
        "text": {
            "common word": {"q": "select"}, "rare word": {"q": "table2777"},
            "no such word": {"q": "nowhere"},
            "phrase": {"q": '"amount from table0007"'},
            "two common": {"q": "select amount"}, "common and rare": {"q": "select table2777"},
            "two of a hundred": {"q": "table0007 r33"}, "three": {"q": "update select table0004"},
            "two rare": {"q": "table2777 table2778"}, "common and none": {"q": "select nowhere"},
            "word and account": {"q": "table0007"} | account,
            "two common in an hour": {"q": "select amount"} | between,
            "two common, a page in the middle":
                {"q": "select amount", "cursor": f"{middle}.0000000000000"},
            "word in running (none)": {"q": "select", "state": "running"},
        },
        "text, worst cases": {
            "a beginning that a million sessions have": {"q": "tab*"},
            "two common words that never meet": {"q": "http1 postgresql"},
        },
    }  # fmt: skip


def search(report: Report, rounds: int, sessions: int) -> None:
    """Ask everything in turn, `rounds` times."""
    folder = Path(tempfile.mkdtemp(prefix="narrows-bench-", dir="/var/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="narrows-bench-", dir="/dev/shm"))
    try:
        with _api(folder, memory, sessions, report) as (connection, token):
            for _ in range(rounds):
                _round(connection, token, questions(sessions), report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
    for kind in questions(sessions):
        report.limit(f"search: {kind}", "ms p95", GOAL_MS, "api")


@contextlib.contextmanager
def _api(
    folder: Path, run: Path, sessions: int, report: Report
) -> Iterator[tuple[http.client.HTTPSConnection, str]]:
    """Generate, start the review process, and connect to it."""
    state = folder / "state"
    store, keys = _generate(Store(state, run), sessions, report)
    del keys
    config = folder / "narrows.toml"
    config.write_text(f'[paths]\nstate = "{state}"\nrun = "{run}"\n\n[review]\nport = {PORT}\n')
    text, token = make(Role.ADMIN, "bench")
    Tokens(store.state).add(token)
    argv = [sys.executable, "-m", "appliance", "serve", "review", "--config", str(config)]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        yield _connected(process, state / "review.crt"), text
    finally:
        process.terminate()
        process.wait()


def _generate(store: Store, sessions: int, report: Report) -> tuple[Store, Keys]:
    print(f"bench: generating {sessions} sessions", file=sys.stderr, flush=True)
    began = time.monotonic()
    store.prepare()
    keys = Keys.load_or_create(store.state)
    past = Past(store, keys)
    past.write(sessions)
    past.close()
    took = time.monotonic() - began
    report.machine["sessions"] = f"{sessions}, written and indexed in {took:.0f} s"
    report.machine["index"] = f"{store.index.stat().st_size / sessions:.0f} bytes a session"
    return store, keys


def _connected(process: subprocess.Popen[bytes], certificate: Path) -> http.client.HTTPSConnection:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            tls = ssl.create_default_context(cafile=certificate)
            connection = http.client.HTTPSConnection("127.0.0.1", PORT, timeout=60, context=tls)
            connection.connect()
        except OSError:
            time.sleep(0.1)
        else:
            return connection
    raise StageError("the review API does not start")


def _round(
    connection: http.client.HTTPSConnection, token: str, asked: dict[str, Questions],
    report: Report,
) -> None:  # fmt: skip
    for kind, some in asked.items():
        every: list[float] = []
        for name, query in some.items():
            taken = [_ask(connection, token, query) for _ in range(ASKED)]
            report.add(f"search: {kind}: {name}", "api", "ms p50", statistics.median(taken))
            report.add(f"search: {kind}: {name}", "api", "ms p95", _p95(taken))
            every += taken
        report.add(f"search: {kind}", "api", "ms p50", statistics.median(every))
        report.add(f"search: {kind}", "api", "ms p95", _p95(every))


def _ask(connection: http.client.HTTPSConnection, token: str, query: dict[str, str]) -> float:
    """Return the milliseconds that an answer took."""
    began = time.perf_counter()
    headers = {"Authorization": f"Bearer {token}"}
    connection.request("GET", "/api/v1/sessions?" + urlencode(query), headers=headers)
    answer = connection.getresponse()
    body: dict[str, Any] = json.loads(answer.read())
    if answer.status not in (200, 503):  # 503: the question took too long, and says so
        raise StageError(f"the review API answers {answer.status} to {query}: {body}")
    return (time.perf_counter() - began) * 1000


def _p95(taken: list[float]) -> float:
    return sorted(taken)[max(-(-len(taken) * 95 // 100) - 1, 0)]
