"""The ``teleport`` command: a module for every group of its commands.

What a command computes with is imported when it runs: ``teleport --help`` waits for nothing.
"""

import shlex
import sys
from collections.abc import Sequence

from teleport.cores import wait_without_spinning
from teleport.errors import TeleportError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code (130 after Ctrl-C, 1 after an error)."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        from teleport.cli.commands import app  # late: Ctrl-C during imports ends quietly, too
        from teleport.cli.options import COMMAND_LINE

        if "torch" not in sys.modules:
            wait_without_spinning()
        COMMAND_LINE.set(shlex.join(["teleport", *given]))
        app(given)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except (TeleportError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
