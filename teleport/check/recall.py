"""Questions with one right answer, set in a variable."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

from teleport.check.engine import tell
from teleport.check.literal import cut
from teleport.check.verdict import Verdict


def choice(
    answer: Any,
    right: str,
    why: Mapping[str, str] | None = None,
    *,
    theorem: str = "",
    quiet: bool = False,
) -> Verdict:
    """Whether the letter that a learner chose is the right one.

    Args:
        answer: what the learner's variable holds.
        right: the right letter.
        why: for wrong letters, what is wrong with them.
        theorem: label in the book of what the question is about.
        quiet: whether to print nothing.
    """
    given = answer.strip().lower() if isinstance(answer, str) else answer
    hint = "" if why is None or not isinstance(given, str) else why.get(given, "")
    if not isinstance(given, str) or len(given) != 1:
        hint = 'Set the variable to one letter, as in answer = "a".'
    return _verdict("choice", given == right, answer, "another answer", hint, theorem, quiet)


def value(
    answer: Any,
    right: float | int,
    why: Mapping[Any, str] | None = None,
    *,
    tolerance: float = 1e-9,
    theorem: str = "",
    quiet: bool = False,
) -> Verdict:
    """Whether the number that a learner found is the right one.

    Args:
        answer: what the learner's variable holds.
        right: the right number.
        why: for numbers that usual mistakes give, what is wrong with them.
        tolerance: relative, for numbers that are not whole.
        theorem: label in the book of what the question is about.
        quiet: whether to print nothing.
    """
    if hasattr(answer, "item") and getattr(answer, "numel", lambda: 1)() == 1:
        answer = answer.item()
    number = isinstance(answer, numbers.Real) and not isinstance(answer, bool)

    def equal(other: float | int) -> bool:
        return number and math.isclose(answer, other, rel_tol=tolerance, abs_tol=tolerance)

    hints = [text for other, text in (why or {}).items() if equal(other)]
    if not number:
        hints = ["Set the variable to a number, as in answer = 7."]
    hint = hints[0] if hints else ""
    return _verdict("value", equal(right), answer, "another number", hint, theorem, quiet)


def _verdict(
    name: str,
    passed: bool,
    answer: Any,
    expected: str,
    hint: str,
    theorem: str,
    quiet: bool,
) -> Verdict:
    verdict = Verdict(
        check=name,
        passed=passed,
        theorem=theorem,
        statement="" if passed else "The answer has to be right.",
        expected="" if passed else expected,
        got="" if passed else cut(repr(answer), 100),
        hint="" if passed else hint,
    )
    return tell(verdict, quiet)
