"""The ``teleport`` command: a module for every group of its commands.

What a command computes with is imported when it runs: ``teleport --help`` waits for nothing.
"""

import os
import sys
from collections.abc import Sequence

from teleport.cli.loading import loading


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code (130 after Ctrl-C, 1 after an error)."""
    with loading():
        import shlex

        from teleport.cli.commands import app
        from teleport.cli.options import COMMAND_LINE
        from teleport.errors import TeleportError
        from teleport.runtime.cores import wait_without_spinning

    given = sys.argv[1:] if arguments is None else arguments
    # What `bench` times is what a user's own process pays, whose threads spin.
    if "torch" not in sys.modules and "bench" not in given[:1]:
        wait_without_spinning()
    try:
        COMMAND_LINE.set(shlex.join(["teleport", *given]))
        app(given)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except (TeleportError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:  # a full disk, a name too long, a folder that is another's
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror or error}{where}\n")
        _give_up_output()
        return 1
    return 0


def _give_up_output() -> None:
    """What could not be written is not tried again when the process ends, which would say so."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
