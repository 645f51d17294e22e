"""How the code is built: lengths, names, words that do not belong, what each folder may hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("appliance", "capture", "ebpf", "bench")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONGEST_FILE = 420
LONGEST_FUNCTION = 60
BAD_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "tools"}


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, node.end_lineno - node.lineno + 1


def test_no_file_is_longer_than_a_reader_can_hold():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST_FILE}
    print(f"longest: {max(lengths.values())} lines, {len(FILES)} files")
    assert not long


def test_no_function_is_longer_than_a_screen():
    found = [(n, path, node.name) for path in FILES for node, n in functions(path)]
    counts = sorted(n for n, _, _ in found)
    over = sorted((n, str(p.relative_to(ROOT)), name) for n, p, name in found if n > 40)
    print(f"{len(counts)} functions, median {counts[len(counts) // 2]} lines; over 40: {over}")
    assert not [entry for entry in over if entry[0] > LONGEST_FUNCTION]
    assert counts[len(counts) // 2] < 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_named_for_one_thing_and_says_what_it_is(path):
    assert path.stem.strip("_") not in BAD_NAMES
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_nothing_is_left_to_be_done_later():
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b|NotImplemented" r"Error")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert not found


def test_only_the_build_of_the_blob_imports_bcc():
    imports = [
        p for p in FILES if re.search(r"^\s*(import|from) bcc\b", p.read_text(), re.MULTILINE)
    ]
    assert imports == [ROOT / "ebpf" / "build.py"]


def test_scapy_is_used_by_the_program_that_writes_pcapng_and_by_nothing_else():
    word = re.compile(r"^\s*(import|from) scapy\b", re.MULTILINE)
    users = [path.name for path in FILES if word.search(path.read_text())]
    assert users == ["pcapng.py"]
    users = [path for path in (ROOT / "tests").rglob("*.py") if word.search(path.read_text())]
    assert len(users) <= 1
