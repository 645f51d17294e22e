"""`python -m appliance` and the `narrows` command."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; return its exit code."""
    from appliance.cli import main as command

    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
