"""The errors of the evidence.

EvidenceError      evidence cannot be written, or does not authenticate: fail closed
├── KeyFileError   a key file is missing, malformed or readable by others: refuse to start
└── FormatError    bytes on disk are not what the format says: report, never delete

ExportError        a format cannot be written, and the evidence is as good as before: say why
"""

from __future__ import annotations


class EvidenceError(Exception):
    """Evidence cannot be written, or does not authenticate."""


class KeyFileError(EvidenceError):
    """A key file cannot be used."""


class FormatError(EvidenceError):
    """Bytes on disk are not what the format says."""


class ExportError(Exception):
    """An export cannot be made; the evidence is not touched by it."""
