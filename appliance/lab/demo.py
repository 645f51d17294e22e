"""The main job, shown: `./run demo`.

Real servers on the server host, three service accounts with real clients on the client host, one
of which does something that it should not. Then everything is read back through the command line
that an operator uses, and checked: every connection that the client host's kernel counted must be
a session, with the account of the very process that opened it, and the evidence must verify.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from appliance.lab import topology
from appliance.lab.interrupt import interruptible
from appliance.lab.servers import ServerError, Servers
from appliance.lab.workloads import SCHEMA, workloads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.lab.running import Lab
    from appliance.lab.workloads import Workload

COMPLETE_S = 15.0
CLIENT_S = 60.0
SHOWN = ("id", "service_account", "assurance", "owner", "client", "target", "protocol",
         "operations", "bytes_up", "bytes_down")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ran:
    """A client program that ended."""

    workload: Workload
    pid: int
    code: int


def demo(lab: Lab, *, once: bool, as_json: bool) -> int:
    """Run the story; return 0 when everything that must be true is."""
    talk = sys.stderr if as_json else sys.stdout
    interruptible(signal.SIGINT, signal.SIGTERM)
    try:
        _say(talk, "bringing up client, gate and server")
        lab.up()
        sessions, verified, wrong = _story(lab, talk)
        asked, refused = _let_in(lab)
        wrong += refused
        api = {"url": (lab.api() or {}).get("url")}
        if as_json:
            print(json.dumps({"sessions": sessions, "verify": verified, "api": api}), flush=True)
        else:
            _tell(lab, talk, sessions, verified)
        print(f"\nThe same over the review API, role reviewer:\n  {asked}", file=talk, flush=True)
        for problem in wrong:
            print(f"narrows: {problem}", file=sys.stderr)
        if not once:
            _stay(talk)
    except ServerError as failed:
        print(f"narrows: {failed}", file=sys.stderr)
        return 1
    finally:
        lab.down()
    return 1 if wrong else 0


def _say(talk: TextIO, text: str) -> None:
    print(f"demo: {text}", file=talk, flush=True)


def _story(lab: Lab, talk: TextIO) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Return (sessions, verification, what is wrong)."""
    _say(talk, "starting PostgreSQL, nginx and Redis on the server")
    servers = Servers(lab)
    servers.prepare()
    servers.nginx()
    servers.redis()
    servers.postgresql(SCHEMA)
    scripts = lab.place.folder / "scripts"
    scripts.mkdir()
    before = _opened(lab)
    ran = [_run(lab, workload, talk) for workload in workloads(scripts, sys.executable)]
    count = _opened(lab) - before
    sessions = _sessions(lab, count)
    verified, valid = _verify(lab, count)
    wrong = _wrong(ran, sessions, count)
    if not valid:
        wrong.append("the evidence is not sealed, or does not verify")
    return sessions, verified, wrong


def _run(lab: Lab, workload: Workload, talk: TextIO) -> Ran:
    _say(talk, f"{workload.account} runs {Path(workload.argv[0]).name}")
    program = lab.spawn(
        "client",
        workload.argv,
        account=workload.account,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=lab.environment | workload.environment,
    )
    try:
        program.communicate(timeout=CLIENT_S)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()
    return Ran(workload, program.pid, program.returncode)


def _opened(lab: Lab) -> int:
    """Return how many TCP connections the client host has opened, by its kernel's own count."""
    return topology.run(lab.place.topology.namespace("client"), _active_opens)


def _active_opens() -> int:
    lines = Path("/proc/thread-self/net/snmp").read_text(encoding="ascii").splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(values[names.index("ActiveOpens")])


def _narrows(lab: Lab, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "appliance", *words, "--config", str(lab.place.config)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def _sessions(lab: Lab, count: int) -> list[dict[str, Any]]:
    """Return the sessions, when there are `count` and all ended, or after a while as they are."""
    until = time.monotonic() + COMPLETE_S
    while True:
        answer = _narrows(lab, ["sessions", "list", "--json", "--limit", "10000"])
        found: list[dict[str, Any]] = json.loads(answer.stdout) if answer.stdout else []
        ended = all(session["state"] != "running" for session in found)
        if (len(found) >= count and ended) or time.monotonic() > until:
            if answer.returncode:
                print(answer.stderr, end="", file=sys.stderr)
            return [{key: session.get(key) for key in SHOWN} for session in found]
        time.sleep(0.1)


def _verify(lab: Lab, count: int) -> tuple[dict[str, Any], bool]:
    """Return ({ok, leaves, checkpoint}, is it valid), once the ends of all sessions are sealed:
    what was committed in the last seconds is pending, and verifies too.
    """
    until = time.monotonic() + COMPLETE_S
    while True:
        answer = _narrows(lab, ["evidence", "verify", "all", "--json"])
        try:
            report = json.loads(answer.stdout)
        except ValueError:
            print(answer.stderr, end="", file=sys.stderr)
            report = {}
        sealed = report.get("sessions", {}).get("closed", 0) >= count
        valid = answer.returncode == 0 and bool(report.get("ok")) and sealed
        if valid or time.monotonic() > until:
            break
        time.sleep(0.3)
    return {key: report.get(key) for key in ("ok", "leaves", "checkpoint")}, valid


def _let_in(lab: Lab) -> tuple[str, list[str]]:
    """Make a token of the review API; return a line for a shell that asks it, and what is wrong
    with that line.
    """
    api = lab.api() or {"url": "", "ca_file": ""}
    made = _narrows(lab, ["token", "create", "--role", "reviewer", "--name", "demo"])
    line = shlex.join([
        "curl", "-sS", "--fail", "--cacert", api["ca_file"],
        "-H", f"Authorization: Bearer {made.stdout.strip()}",
        f"{api['url']}/api/v1/sessions?q=card_number",
    ])  # fmt: skip
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["items"]
    except (ValueError, KeyError):
        return line, [f"the review API does not answer: {done.stderr.strip()}"]
    return line, [] if found else ["the review API does not find who read card numbers"]


def _wrong(ran: list[Ran], sessions: list[dict[str, Any]], count: int) -> list[str]:
    """Say what is not as it must be: a client that failed, a session missing or misattributed."""
    wrong = [
        f"{run.workload.argv[0]} of {run.workload.account} ended with {run.code}"
        for run in ran
        if run.code
    ]
    if len(sessions) != count:
        wrong.append(f"the clients opened {count} connections, {len(sessions)} are recorded")
    by_pid = {run.pid: run.workload for run in ran}
    for session in sessions:
        workload = by_pid.get((session["owner"] or {}).get("pid", 0))
        if workload is None or session["service_account"] != workload.account:
            wrong.append(f"session {session['id']} is attributed to {session['service_account']}")
        elif session["protocol"] != workload.protocol:
            wrong.append(f"session {session['id']} was taken for {session['protocol']}")
    for run in ran:
        mine = [s for s in sessions if (s["owner"] or {}).get("pid") == run.pid]
        if run.workload.protocol == "postgresql" and not any(s["operations"] for s in mine):
            wrong.append(f"{run.workload.argv[0]} of {run.workload.account} has no operations")
    return wrong


def _tell(lab: Lab, talk: TextIO, sessions: list[dict[str, Any]], verified: dict[str, Any]) -> None:
    """Print the sessions, the one that matters as a conversation, and where to look further."""
    row = "{:13}  {:12} {:8} {:20} {:11} {:21} {:>4} {:>9} {:>9}"
    names = ("session", "account", "assured", "process", "protocol", "target", "ops", "up", "down")
    print("\n" + row.format(*names), file=talk)
    for session in sessions:
        owner = session["owner"] or {}
        process = f"{Path(owner.get('exe', '?')).name} [{owner.get('pid', '?')}]"
        account = session["service_account"] or "unknown"
        rest = [session[key] for key in ("protocol", "target", "operations")]
        size = (session["bytes_up"], session["bytes_down"])
        print(row.format(session["id"], account, session["assurance"], process, *rest, *size),
              file=talk)  # fmt: skip
    https = [session["id"] for session in sessions if session["target"].endswith(":443")]
    found = _narrows(lab, ["sessions", "list", "--json", "-q", "card_number"]).stdout
    stolen = [session["id"] for session in json.loads(found or "[]")]
    _show(lab, talk, https, "What was asked over HTTPS, which the gate opened:")
    _show(lab, talk, stolen, "Who read card numbers, over TLS, and what else was said there:")
    state = "valid" if verified["ok"] else "NOT VALID"
    print(f"evidence: {state}, {verified['leaves']} leaves", file=talk)


def _show(lab: Lab, talk: TextIO, identities: list[str], title: str) -> None:
    for identity in identities[:1]:
        shown = _narrows(lab, ["sessions", "show", identity]).stdout
        print(f"\n{title}\n\n{shown}", file=talk)


def _stay(talk: TextIO) -> None:
    print(
        "\nThe lab stays up until Ctrl-C. Look further:\n"
        "  ./run narrows sessions list\n"
        "  ./run narrows sessions list -q card_number\n"
        "  ./run narrows sessions show ID\n"
        "  ./run narrows sessions export --all --format ndjson\n"
        "  ./run narrows evidence verify\n"
        "  ./run lab exec --as report-job -- psql -h 198.51.100.10 -U report_job shop\n"
        "  ./run lab exec --as ci-deployer -- curl https://198.51.100.10/\n",
        file=talk,
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()
