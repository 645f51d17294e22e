"""The verifier stands alone: it imports the standard library and `cryptography`, nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import capture.verify

FOLDER = Path(capture.verify.__file__).parent


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module


def test_no_module_of_the_verifier_imports_what_writes_evidence():
    found = {name for path in FOLDER.glob("*.py") for name in imports(path)}
    strange = {
        name
        for name in found
        if name.split(".")[0] not in sys.stdlib_module_names
        and not name.startswith(("capture.verify", "cryptography"))
    }
    assert not strange
    assert any(name.startswith("cryptography") for name in found)


def test_it_runs_where_nothing_else_of_the_appliance_is(tmp_path):
    package = tmp_path / "capture"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for path in FOLDER.glob("*.py"):
        target = package / "verify" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "-m", "capture.verify", str(tmp_path)],
        cwd=tmp_path, env={}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "ledger.pub" in done.stdout
