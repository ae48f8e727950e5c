"""Runs the pieces of a file of answers, in a process that may hang, crash or end at any time.

``python -m teleport.check.worker FILE RESULTS SKIP…`` writes one line of JSON to ``RESULTS`` when
it is ready and one before and after each piece. `teleport.check.grading` reads them; nothing else
should start this.
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from teleport.check.engine import LOG
from teleport.check.guard import Bounded
from teleport.check.literal import cut
from teleport.check.submission import Unit, read_submission


def run(path: Path, results: TextIO, skip: set[int]) -> None:
    """Run every piece but those to skip; the pieces share their variables, as cells do."""
    units = read_submission(path)
    sys.path.insert(0, str(path.parent))
    names: dict[str, Any] = {"__name__": "submission", "display": print}
    _tell(results, {"ready": len(units)})
    for index, unit in enumerate(units):
        if index in skip:
            continue
        _tell(results, {"begin": index})
        before, stream = len(LOG), Bounded(2000)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            error = unit.syntax_error and f"SyntaxError: {unit.syntax_error}"
            error = error or _run_unit(unit, path, names)
        verdicts = [verdict.to_dict() for verdict in LOG[before:]]
        printed = stream.getvalue()
        _tell(results, {"end": index, "error": error, "verdicts": verdicts, "printed": printed})


def _run_unit(unit: Unit, path: Path, names: dict[str, Any]) -> str:
    """The reason why the piece failed, or nothing."""
    try:
        exec(compile(unit.source, f"{path.name}, {unit.place}", "exec"), names)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # exit() is a SystemExit
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "exit() was called"
    text = "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, FileNotFoundError):
        text += " (answers are run in an empty folder and should not read files)"
    return cut(text, 2000)


def _tell(results: TextIO, message: dict[str, Any]) -> None:
    results.write(json.dumps(message) + "\n")
    results.flush()


def main(arguments: list[str]) -> None:
    """Run with all output of compiled code and of other processes thrown away."""
    path, results, *skip = arguments
    with open(results, "a", encoding="utf-8") as stream, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        run(Path(path), stream, {int(index) for index in skip})


if __name__ == "__main__":
    main(sys.argv[1:])
