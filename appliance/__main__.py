"""`python -m appliance` and the `narrows` command."""

from __future__ import annotations

import io
import sys


def main() -> int:
    """Run the command line; return its exit code."""
    from appliance.cli import main as command

    if isinstance(sys.stdout, io.TextIOWrapper):  # it is not when the caller closed it
        # What a terminal cannot show is escaped; it must not end a conversation in the middle.
        sys.stdout.reconfigure(errors="backslashreplace")
    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
