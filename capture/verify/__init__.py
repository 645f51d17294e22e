"""The offline verifier: checks segments and ledger of a state directory, or of a copy of one.

`python -m capture.verify STATE_DIR`, and `narrows evidence verify`. It imports the standard library
and `cryptography` only, and shares no code with what writes the evidence: it is a second reading of
docs/evidence-format.md. It never changes a file, and may run while the appliance does.

What the log proves is checked without any key but the log's public one. With the appliance's key
commits are opened too, and every leaf is compared with the record that it stands for.
"""

from capture.verify.check import verify
from capture.verify.report import Finding, Level, Pending, Report

__all__ = ["Finding", "Level", "Pending", "Report", "verify"]
