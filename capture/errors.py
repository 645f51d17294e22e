"""The errors of the evidence.

EvidenceError      evidence cannot be written, or does not authenticate: fail closed
├── KeyFileError   a key file is missing, malformed or readable by others: refuse to start
└── FormatError    bytes on disk are not what the format says: report, never delete
"""

from __future__ import annotations


class EvidenceError(Exception):
    """Evidence cannot be written, or does not authenticate."""


class KeyFileError(EvidenceError):
    """A key file cannot be used."""


class FormatError(EvidenceError):
    """Bytes on disk are not what the format says."""
