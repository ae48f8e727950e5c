"""Runs the pieces of a file of answers, in a process that may hang, crash or end at any time.

``python -m teleport.check.worker FILE RESULTS SKIP…`` writes one line of JSON to ``RESULTS`` when
it is ready and one before and after each piece. `teleport.check.grading` reads them; nothing else
should start this.
"""

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from teleport.check.engine import hearing
from teleport.check.guard import Bounded
from teleport.check.session import Session
from teleport.check.submission import read_submission


def run_pieces(path: Path, results: TextIO, skip: set[int]) -> None:
    """Run every piece but those to skip; the pieces share their variables, as cells do."""
    submission = read_submission(path)
    sys.path.insert(0, str(path.parent))
    session = Session(submission)
    _tell(results, {"ready": len(submission.units)})
    for index, unit in enumerate(submission.units):
        if index in skip:
            continue
        _tell(results, {"begin": index})
        stream = Bounded()
        quiet = contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream)
        with quiet[0], quiet[1], hearing() as heard:
            error = unit.fault or session.run(unit.tree)
        verdicts = [asdict(verdict) for verdict in heard]
        _tell(results, {"end": index, "error": error, "verdicts": verdicts})


def _tell(results: TextIO, message: dict[str, Any]) -> None:
    results.write(json.dumps(message) + "\n")
    results.flush()


def main(arguments: list[str]) -> None:
    """Run with all output of compiled code and of other processes thrown away."""
    path, results, *skip = arguments
    with open(results, "a", encoding="utf-8") as stream, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        run_pieces(Path(path), stream, {int(index) for index in skip})


if __name__ == "__main__":
    main(sys.argv[1:])
