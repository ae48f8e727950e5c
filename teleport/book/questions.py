"""The questions of the sheets for course systems, as QTI 1.2 packages that text2qti writes.

A question is an exercise whose graded cell calls `check.choice` or `check.value`. The right answer
and what is said to wrong ones are what the cell hands to them: it runs with recorders in their
place. The packages hold the answers.
"""

import ast
import inspect
import math
import re
import tempfile
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from teleport.book.extras import needed
from teleport.book.manifest import Book
from teleport.check import recall
from teleport.check.exercises import SheetExercise, exercises
from teleport.check.units import checks_called
from teleport.errors import BookError

_KIND = re.compile(r"\A\*[^*\n]+\*\n+")  # *Recall, ★, 1 point*
_OPTION = re.compile(r"^- \*\*(\w)\*\*: (.+(?:\n  .+)*)\n?", re.MULTILINE)
_ROLE = re.compile(r"\{[\w:.-]+\}(`[^`]+`)")  # {prf:ref}`thm-newton`
_SET = re.compile(r"Set `\w+` to the (?:letter|number)\.\s*")
_ROUNDING = 5e-5  # text2qti writes four decimals


def write_questions(book: Book, out: Path) -> dict[str, int]:
    """Write a package for every sheet that has questions into a new folder, all or none.

    Returns:
        How many questions the package of each file name has.

    Raises:
        BookError: if the folder exists, text2qti is missing, or a question cannot be read.
        CheckError: if a sheet is not a notebook of exercises.
    """
    if out.exists():
        raise BookError(f"{out} exists: delete it, or name another folder with --out")
    made = {f"{c.exercises.stem}.zip": package(c.exercises) for c in book.chapters if c.exercises}
    counts = {name: count for name, (_, count) in made.items() if count}
    if not counts:
        raise BookError(f"{book.file}: no exercise of its sheets calls check.choice or check.value")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            new = Path(scratch) / "questions"
            new.mkdir()
            for name in counts:
                (new / name).write_bytes(made[name][0])
            new.rename(out)
    except OSError as error:
        raise BookError(f"cannot write {out}: {error}; name another folder with --out") from error
    return counts


def package(sheet: Path) -> tuple[bytes, int]:
    """A QTI 1.2 package of a sheet's questions, and how many there are; errors as above."""
    config, quiz, qti = (
        needed(f"text2qti.{name}", "questions", "writing questions")
        for name in ("config", "quiz", "qti")
    )

    texts, bank = [f"Quiz title: {sheet.stem}"], b""
    for exercise in exercises(sheet):
        try:
            if handed := _handed(exercise.graded):
                texts.append(_question(exercise, handed))
                # The configuration is not loaded: that would write a file into the user's home.
                whole = quiz.Quiz("\n\n".join(texts), config=config.Config())
                bank = qti.QTI(whole).zip_bytes()
        except Exception as error:  # whatever the cell raises, and text2qti
            what = f"{sheet}: {exercise.title!r} cannot be made a question: {type(error).__name__}"
            raise BookError(f"{what}: {error}") from error
    return bank, len(texts) - 1


def _handed(graded: str) -> dict[str, Any]:
    """What a graded cell hands to the checks of `recall`, by parameter; nothing if to none."""
    tree, found = ast.parse(graded), dict[str, Any]()
    if not {"choice", "value"} & set(checks_called(tree)):
        return {}

    def record(name: str, *given: Any, **options: Any) -> bool:
        bound = inspect.signature(getattr(recall, name)).bind(*given, **options)
        bound.apply_defaults()
        found.update(bound.arguments)
        return True

    check = SimpleNamespace(**{n: partial(record, n) for n in ("answer", "choice", "value")})
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    mine = [call.args[0].id for call in calls if call.args and isinstance(call.args[0], ast.Name)]
    known = {"check": check, "teleport": SimpleNamespace(check=check), "math": math}
    exec(compile(tree, "<graded>", "exec"), dict.fromkeys(mine) | known)
    return found


def _question(exercise: SheetExercise, handed: dict[str, Any]) -> str:
    """A question in the language of text2qti."""
    right, why = handed["right"], handed["why"] or {}
    text = _SET.sub("", _KIND.sub("", "\n\n".join(exercise.question)))
    hints = [f"Not quite: think of {handed['think']}."] if "think" in handed else []
    answers = []
    if isinstance(right, str):
        for letter, option in _OPTION.findall(text):
            answers.append(_part(f"{'*' * (letter == right)}{letter})", option))
            answers += [_part("...", why[letter])] if letter in why else []
        text = _OPTION.sub("", text)
    else:  # text2qti has no feedback for a single number
        hints += [f"{number:.6g}: {reason}" for number, reason in why.items()]
        margin = max(handed["tolerance"] * max(1.0, abs(right)), _ROUNDING)
        exact = isinstance(right, int) and margin == _ROUNDING
        answers.append(f"=   {right}" if exact else f"=   {float(right)!r} +- {margin!r}")
    head = [f"Title: {exercise.title}", f"Points: {exercise.about['points']}"]
    wrong = [_part("-", "\n\n".join(hints))] if hints else []
    return "\n".join([*head, _part("1.", _ROLE.sub(r"\1 of the book", text)), *wrong, *answers])


def _part(mark: str, text: str) -> str:
    """A mark and the text behind it, all lines of which are indented by four."""
    return f"{mark:<4}{textwrap.indent(text.strip(), '    ')[4:]}"
