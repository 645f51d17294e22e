"""A program: keeps a PostgreSQL server busy through whatever is in between, until its input ends.

    python pg_load.py BINARIES HOST PORT THREADS

Every thread runs statements that name it and count, in all the ways a driver has, and connects
again when it is cut off; pgbench runs beside them in its three modes, again and again.
"""

import contextlib
import itertools
import random
import subprocess
import sys
import threading
import time

import psycopg

_stop = threading.Event()


def driver(name, target):
    """Run statements until the end, over as many connections as it takes."""
    dice, numbers = random.Random(name), itertools.count()
    while not _stop.is_set():
        with (
            contextlib.suppress(psycopg.Error, OSError),
            psycopg.connect(target, autocommit=True) as connection,
        ):
            while not _stop.is_set():
                dice.choice(WAYS)(connection, f"{name}/{next(numbers)}")
        time.sleep(0.02)


def simple(connection, mark):
    connection.execute(f"SELECT 1 /* {mark} */")


def several(connection, mark):
    connection.execute(f"SELECT 1 /* {mark} a */; SELECT 2 /* {mark} b */")


def parameters(connection, mark):
    connection.execute(f"SELECT %s::int + %s /* {mark} */", (1, len(mark)))


def prepared(connection, mark):
    for _ in range(2):
        connection.execute("SELECT %s::text", (mark,), prepare=True)


def pipeline(connection, mark):
    with connection.pipeline(), connection.cursor() as cursor:
        for number in range(5):
            cursor.execute(f"SELECT %s::int /* {mark} {number} */", (number,))


def transaction(connection, mark):
    with connection.transaction():
        connection.execute(f"INSERT INTO heard VALUES ('{mark}')")


def copy(connection, mark):
    with connection.cursor().copy(f"COPY heard FROM STDIN /* {mark} */") as rows:
        rows.write(f"{mark}\n" * 20)


def wrong(connection, mark):
    with contextlib.suppress(psycopg.errors.DivisionByZero):
        connection.execute(f"SELECT 1/0 /* {mark} */")


WAYS = (simple, simple, simple, several, parameters, prepared, pipeline, transaction, copy, wrong)


def bench(binaries, host, port):
    """Run pgbench again and again."""
    for mode in itertools.cycle(("simple", "extended", "prepared")):
        if _stop.is_set():
            return
        argv = [f"{binaries}/pgbench", "-h", host, "-p", port, "-U", "postgres", "-n",
                "-M", mode, "-c", "2", "-T", "1", "-S", "shop"]  # fmt: skip
        subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        time.sleep(0.02)


def main(binaries, host, port, threads):
    target = f"host={host} port={port} user=postgres dbname=shop sslmode=disable connect_timeout=5"
    running = [threading.Thread(target=bench, args=(binaries, host, port))]
    running += [
        threading.Thread(target=driver, args=(f"driver-{n}", target)) for n in range(int(threads))
    ]
    for thread in running:
        thread.start()
    sys.stdin.read()
    _stop.set()
    for thread in running:
        thread.join()


main(*sys.argv[1:])
