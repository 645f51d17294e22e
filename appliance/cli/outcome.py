"""How a command ends when it cannot do what it was asked: exit codes, and the error that has one.

Every module of the command line uses it; docs/cli.md lists the codes.
"""

from __future__ import annotations

OK = 0  #: done; for `verify`: valid
FAILED = 1  #: tried and failed; for `verify`: invalid
USAGE = 2  #: the words make no sense, or name something unknown; for `verify`: incomplete
NOT_FOUND = 3  #: no such session, token or lab; for `redirect status`: not in place
REFUSED = 4  #: nothing was shown or changed, because it could not be recorded
UNAVAILABLE = 69  #: a process, privilege or file that is needed is not there
BROKEN_PIPE = 141  #: the reader of the output is gone, as a shell says of SIGPIPE


class Refusal(Exception):
    """A command ends here, with one line for a person and an exit code for a program."""

    def __init__(self, problem: str, hint: str = "", *, code: int = FAILED) -> None:
        super().__init__(problem + (f" ({hint})" if hint else ""))
        self.code = code
