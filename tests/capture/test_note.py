"""Signed notes: both readings of C2SP signed-note and tlog-checkpoint agree with its vectors."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.errors import EvidenceError
from capture.note import Checkpoint, NoteSigner, NoteVerifier
from capture.verify.note import LogKey, NoteError, Signed

#: The example of golang.org/x/mod/sumdb/note, which C2SP signed-note describes.
PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
SIGNATURE = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpR"
    "Zb6KE6RyyBwJnAM=\n"
)
ENOCH = (
    "— EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33"
    "WWd1RvMc+QQ=\n"
)
NOTE = f"{TEXT}\n{SIGNATURE}".encode()


def read(vkey, note):
    """Return the text by both readings; None where both refuse."""
    try:
        first = NoteVerifier.parse(vkey).open(note)
    except EvidenceError:
        first = None
    try:
        second = LogKey.parse(vkey).text_of(note)
    except NoteError:
        second = None
    assert first == second
    return first


def test_the_published_example_is_accepted():
    assert read(PETER, NOTE) == TEXT
    assert NoteVerifier.parse(PETER).vkey() == PETER


def test_signatures_of_others_are_passed_over():
    assert read(PETER, f"{TEXT}\n{ENOCH}{SIGNATURE}".encode()) == TEXT


def test_a_note_that_only_others_signed_is_refused():
    assert read(PETER, f"{TEXT}\n{ENOCH}".encode()) is None


@pytest.mark.parametrize("at", range(0, len(NOTE), 7))
def test_a_changed_byte_anywhere_is_refused(at):
    changed = bytearray(NOTE)
    changed[at] ^= 1
    assert read(PETER, bytes(changed)) != TEXT


def test_the_text_ends_at_the_last_empty_line():
    signer = NoteSigner("log", b"s" * 32)
    text = "a\n\n— log notthis\n\nb\n"
    assert read(signer.verifier.vkey(), signer.sign(text)) == text


@pytest.mark.parametrize(
    "note", [b"", b"no signature\n", b"text\n\n", b"text\n\nnot a signature line\n", b"\n\n\n"]
)
def test_what_is_no_note_is_refused(note):
    assert read(PETER, note) is None


@pytest.mark.parametrize(
    "vkey",
    ["", "name", "a+b", "PeterNeumann+c74f20a4+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
     "PeterNeumann+c74f20a3+AhQ", "x+00000000+!!"],
)  # fmt: skip
def test_what_is_no_key_is_refused(vkey):
    with pytest.raises(EvidenceError):
        NoteVerifier.parse(vkey)
    with pytest.raises(NoteError):
        LogKey.parse(vkey)


@given(st.integers(0, 1 << 50), st.binary(min_size=32, max_size=32))
def test_a_signed_checkpoint_reads_the_same_in_both(size, root):
    signer = NoteSigner("narrows/test", b"s" * 32)
    checkpoint = Checkpoint("narrows/test", size, root)
    note = signer.sign(checkpoint.text())
    signed = Signed.read(note, LogKey.parse(signer.verifier.vkey()))
    assert (signed.size, signed.root) == (size, root)
    assert Checkpoint.parse(signer.verifier.open(note)) == checkpoint


@pytest.mark.parametrize(
    "text",
    ["narrows/test\n01\n{root}\n", "narrows/test\n-1\n{root}\n", "narrows/test\n1\nAAAA\n",
     "narrows/test\n1\n", "other\n1\n{root}\n", "narrows/test\n\u0661\n{root}\n"],
)  # fmt: skip
def test_a_signed_text_that_is_no_checkpoint_of_the_log_is_refused(text):
    signer = NoteSigner("narrows/test", b"s" * 32)
    note = signer.sign(text.format(root=base64.b64encode(bytes(32)).decode()))
    with pytest.raises(NoteError):
        Signed.read(note, LogKey.parse(signer.verifier.vkey()))
    if not text.startswith("other"):
        with pytest.raises(EvidenceError):
            Checkpoint.parse(signer.verifier.open(note))


def test_extension_lines_of_a_checkpoint_are_passed_over():
    signer = NoteSigner("narrows/test", b"s" * 32)
    text = Checkpoint("narrows/test", 7, bytes(32)).text() + "extension\n"
    key = LogKey.parse(signer.verifier.vkey())
    assert Signed.read(signer.sign(text), key).size == 7
    assert Checkpoint.parse(signer.verifier.open(signer.sign(text))).size == 7


def test_a_signer_does_not_show_its_key():
    assert "ssss" not in repr(NoteSigner("narrows/test", b"s" * 32))
