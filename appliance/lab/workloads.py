"""What the demo's service accounts do: real clients, run from the accounts' own cgroups.

Some speak TLS and verify the server, as they would without the gate; some do not.
`appliance.lab.demo` starts each `Workload` in the client namespace. One of them does something it
should not: the report job reads card numbers that no report needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SERVER = "198.51.100.10"
DATABASE = "shop"

#: What the database holds before the accounts start; run on the server's own socket, not through
#: the gate.
SCHEMA = """
CREATE ROLE ci_deployer LOGIN PASSWORD 'ci-pass-7f1';
CREATE ROLE backup_job LOGIN PASSWORD 'backup-pass-2c9';
CREATE ROLE report_job LOGIN PASSWORD 'report-pass-e40';
CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL, card_number text NOT NULL);
CREATE TABLE orders (
  id serial PRIMARY KEY, customer int REFERENCES customers, total numeric(10, 2), at timestamptz
);
INSERT INTO customers SELECT n, 'customer ' || n, '4000-0000-0000-' || to_char(n, 'FM0000')
  FROM generate_series(1, 50) n;
INSERT INTO orders (customer, total, at)
  SELECT 1 + n % 50, n * 1.25, now() FROM generate_series(1, 500) n;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO backup_job, report_job;
GRANT ALL ON ALL TABLES IN SCHEMA public TO ci_deployer;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO ci_deployer;
GRANT CREATE ON SCHEMA public TO ci_deployer;
"""

DEPLOY = """
BEGIN;
CREATE TABLE IF NOT EXISTS releases (version text PRIMARY KEY, at timestamptz DEFAULT now());
INSERT INTO releases (version) VALUES ('2026.11.1');
UPDATE orders SET total = total * 1.19 WHERE id = 7;
COMMIT;
SELECT count(*) FROM no_such_table;
"""

#: The script that `pgbench -f` runs for the report job.
REPORT = """\\set customer random(1, 50)
SELECT sum(total) FROM orders WHERE customer = :customer;
"""

#: The driver script of the report job: bound parameters, and then what it should not do.
DRIVER = """
import sys
import psycopg

with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    connection.execute("SELECT name FROM customers WHERE id = %s", (7,)).fetchall()
    total = connection.execute(
        "SELECT sum(total) FROM orders WHERE customer = ANY(%s)", ([1, 2, 3],)
    ).fetchone()
    print("three customers ordered for", total[0])
    stolen = "COPY (SELECT name, card_number FROM customers) TO STDOUT"
    with connection.cursor().copy(stolen) as copy:
        rows = sum(1 for _ in copy.rows())
    print("and", rows, "card numbers left the building")
"""

#: A raw client for the cache: no library, just the words.
RAW = """
import socket
import sys

with socket.create_connection((sys.argv[1], 6379), timeout=10) as cache:
    cache.sendall(b"SET backup:last 2026-11-24\\r\\nGET backup:last\\r\\nQUIT\\r\\n")
    answer = b""
    while piece := cache.recv(4096):
        answer += piece
print(answer.decode().split())
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """One client program of one account; `argv` runs in the client namespace."""

    account: str
    argv: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    protocol: str = "postgresql"


def workloads(scripts: Path, python: str) -> list[Workload]:
    """Write the scripts into `scripts` and return what the three accounts run, in order."""
    files = {"deploy.sql": DEPLOY, "report.sql": REPORT, "driver.py": DRIVER, "raw.py": RAW}
    for name, text in files.items():
        (scripts / name).write_text(text, encoding="utf-8")
    ci = _database("ci_deployer", "ci-pass-7f1")
    backup = _database("backup_job", "backup-pass-2c9", tls="disable")
    report = _database("report_job", "report-pass-e40")
    page = ("curl", "-sS", "--fail")
    psql = ("psql", "-X", "-q")
    bench = ("pgbench", "-n", "-c", "4", "-j", "2", "-t", "25", "-M", "prepared")
    return [
        Workload("ci-deployer", (*psql, "-f", str(scripts / "deploy.sql")), ci),
        Workload("ci-deployer", (*page, f"http://{SERVER}/"), {}, "http1"),
        Workload("ci-deployer", (*page, f"https://{SERVER}/"), {}, "http1"),
        Workload("backup-job", (*psql, "-o", "/dev/null", "-c", "COPY orders TO STDOUT"), backup),
        Workload("backup-job", (python, str(scripts / "raw.py"), SERVER), {}, "opaque"),
        Workload(
            "report-job",
            (*bench, "-f", str(scripts / "report.sql"), DATABASE),
            {**report, "PGSSLMODE": "disable"},
        ),
        Workload("report-job", (python, str(scripts / "driver.py"), ""), report),
    ]


def _database(user: str, secret: str, *, tls: str = "verify-full") -> dict[str, str]:
    return {
        "PGHOST": SERVER,
        "PGDATABASE": DATABASE,
        "PGUSER": user,
        "PGPASSWORD": secret,
        "PGSSLMODE": tls,
        "PGCONNECT_TIMEOUT": "10",
    }
