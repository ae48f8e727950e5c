"""Grading a file of answers: every exercise on its own, whatever the others do.

The answers run in a process of their own, in an empty folder. A piece that hangs or ends the
process is left out, and the rest is run again without it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from teleport.check.draw import hypothesis
from teleport.check.submission import read_submission
from teleport.check.units import Unit, bound
from teleport.check.verdict import Verdict
from teleport.errors import CheckError

Told = Callable[[int, int], None]
"""Is told how many pieces have ended, and of how many."""

START_LIMIT = 120.0
"""Seconds for the process to start: importing PyTorch on a busy machine takes a while."""


@dataclass(frozen=True)
class Exercise:
    """What an exercise got.

    Attributes:
        passed: whether it got all its points; of none, whether it would have got them.
        reason: why it failed, beside what its verdicts say.
    """

    name: str
    place: str
    points: float
    possible: float
    passed: bool
    reason: str = ""
    verdicts: tuple[Verdict, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Grades:
    """What a file of answers got; print it."""

    path: str
    exercises: tuple[Exercise, ...]

    @property
    def points(self) -> float:
        """Points of all exercises together."""
        return sum(exercise.points for exercise in self.exercises)

    @property
    def possible(self) -> float:
        """Points that all exercises together could get."""
        return sum(exercise.possible for exercise in self.exercises)

    @property
    def passed(self) -> bool:
        """Whether every exercise got all its points."""
        return all(exercise.passed for exercise in self.exercises)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        totals = {"points": self.points, "possible": self.possible, "passed": self.passed}
        return {"path": self.path, **totals, "exercises": [asdict(e) for e in self.exercises]}


@dataclass
class _Run:
    """What the processes have told so far; a piece without an entry has not ended."""

    ended: dict[int, dict[str, Any]] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)


def grade(path: Path, time_limit: float = 10.0, ran: Told = lambda done, of: None) -> Grades:
    """Grade a ``.py`` or ``.ipynb`` file, with ``time_limit`` seconds for each cell or statement.

    ``ran`` is told how many of them have ended, and of how many.

    Raises:
        CheckError: if the file cannot be graded at all, or Hypothesis is not installed.
    """
    hypothesis()
    units = read_submission(path).units
    run = _Run()
    with tempfile.TemporaryDirectory(prefix="teleport-check-") as folder:
        while not _run_rest(path.resolve(), Path(folder), units, time_limit, run, ran):
            pass
    return Grades(str(path), tuple(_graded(units, run)))


def _run_rest(
    path: Path, folder: Path, units: list[Unit], limit: float, run: _Run, ran: Told
) -> bool:
    """Run all pieces but the broken ones; whether the process came to its end."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    results = folder / "results"
    results.write_text("")
    command = [sys.executable, "-m", "teleport.check.worker", str(path), str(results)]
    command += [str(index) for index in run.broken]
    nothing = subprocess.DEVNULL
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        command,
        cwd=work,
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        env=environment,
        start_new_session=True,
    )
    try:
        return _follow(process, results, len(units), limit, run, ran)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, and where there are process groups, what it started."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _follow(
    process: subprocess.Popen[bytes], results: Path, count: int, limit: float, run: _Run, ran: Told
) -> bool:
    """Read what the process tells until it ends or takes too long."""
    current, started, seen, allowed = -1, time.monotonic(), 0, START_LIMIT
    run.ended.clear()
    while True:
        alive = process.poll() is None
        lines = results.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines[seen:]:
            if not line.endswith("\n"):
                break
            seen += 1
            message = json.loads(line)
            started, allowed = time.monotonic(), limit
            current = message.get("begin", current)
            if "end" in message:
                run.ended[message["end"]] = message
                current = -1
                ran(len(run.ended) + len(run.broken), count)
        if len(run.ended) + len(run.broken) == count:
            return True
        if alive and time.monotonic() - started <= allowed:
            time.sleep(0.02)
            continue
        code = process.returncode
        if current < 0:
            how = "did not start in time" if alive else f"ended with code {code}"
            raise CheckError(f"the process that runs the answers {how}")
        late = f"no end after {limit:g} seconds (--time-limit gives more)"
        run.broken[current] = late if alive else f"it ended the process ({_how(code)})"
        return False


def _how(code: int | None) -> str:
    """How a process ended, in words."""
    if code == -9:  # the signal that nothing can hold up
        return "killed, as where the memory does not suffice"
    return f"exit code {code}"


@dataclass(frozen=True)
class _Tried:
    """A piece that grades an exercise, and what came of it."""

    unit: Unit
    passed: bool
    reason: str
    verdicts: tuple[Verdict, ...]


def _graded(units: list[Unit], run: _Run) -> list[Exercise]:
    found: dict[str, list[_Tried]] = {}
    failures: list[str] = []
    for index, unit in enumerate(units):
        message = run.ended.get(index, {"error": run.broken.get(index, ""), "verdicts": []})
        verdicts = tuple(Verdict(**fields) for fields in message["verdicts"])
        error = message["error"]
        if not unit.exercise:
            if error:
                failures.append(f"{unit.place}: {error}")
            continue
        missed = set(unit.calls) - {verdict.check for verdict in verdicts}
        if missed and not error:
            error = f"check.{min(missed)} was not called"
        passed = not error and all(verdicts)
        # The text of a verdict that an assertion repeats is in the verdict already.
        reason = "" if passed or (verdicts and not all(verdicts)) else error
        said = " ".join([error, *(verdict.got for verdict in verdicts)])
        missing = re.search(r"NameError: .*'(\w+)'", said)
        if missing:
            later = [other.place for other in units[index + 1 :] if missing[1] in bound(other.tree)]
            more = [
                "earlier, in " + "; in ".join(failures) if failures else "",
                f"{missing[1]} is only made in {later[0]}, and cells run in order" if later else "",
            ]
            reason = "\n".join(filter(None, [reason, *more]))
        found.setdefault(unit.exercise, []).append(_Tried(unit, passed, reason, verdicts))
    return [_exercise(name, tried) for name, tried in found.items()]


def _exercise(name: str, tried: list[_Tried]) -> Exercise:
    """One exercise, whose graded cell may have been copied: its points are there once.

    A copy is tried like the cell that it is of. Where the two differ, nobody knows which is the
    teacher's, so both have to pass.
    """
    contents: dict[str, list[_Tried]] = {}
    for one in tried:
        contents.setdefault(one.unit.source, []).append(one)
    best = [next((one for one in same if one.passed), same[0]) for same in contents.values()]
    shown = next((one for one in best if not one.passed), best[0])
    places = [one.unit.place for one in tried]
    notes = [f"{one.unit.place} is not as it was handed out" for one in tried if one.unit.changed]
    if len(tried) > 1:
        listed = f"{', '.join(places[:-1])} and {places[-1]}"
        notes.append(f"{listed} grade this exercise: it counts once")
    if len(best) > 1:
        notes[-1] += ", and only if every one of the different cells passes; delete the copies"
    unit, passed, note = shown.unit, shown.passed, "; ".join(notes)
    points = unit.points if passed else 0.0
    return Exercise(
        name, unit.place, points, unit.points, passed, shown.reason, shown.verdicts, note
    )
