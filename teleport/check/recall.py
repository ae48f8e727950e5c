"""Questions with one right answer, set in a variable.

`choice` and `value` know the answer: they stand in cells that only teachers see. `answer` knows a
digest of it, so that students can ask at once and the sheet does not tell.
"""

import hashlib
import math
import numbers
from collections.abc import Mapping
from typing import Any

from teleport.check.answers import plain
from teleport.check.engine import tell
from teleport.check.literal import shown
from teleport.check.verdict import Verdict


def choice(
    answer: Any,
    right: str,
    why: Mapping[str, str] | None = None,
    *,
    theorem: str = "",
    quiet: bool = False,
) -> Verdict:
    """Whether the letter that a learner's variable holds is the right one.

    ``why`` says of wrong letters what is wrong with them; ``theorem`` is the label in the book of
    what the question is about; ``quiet`` prints nothing.
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
    """Whether the number that a learner's variable holds is the right one.

    ``why`` says of the numbers that usual mistakes give what is wrong with them. The tolerance is
    relative, for numbers that are not whole. The rest is as of `choice`.
    """
    answer, number = _number(answer)

    def equal(other: float | int) -> bool:
        return number and math.isclose(answer, other, rel_tol=tolerance, abs_tol=tolerance)

    hint = next((text for other, text in (why or {}).items() if equal(other)), "")
    if not number:
        hint = "Set the variable to a number, as in answer = 7."
    return _verdict("value", equal(right), answer, "another number", hint, theorem, quiet)


def answer(given: Any, seal: str, think: str, *, theorem: str = "", quiet: bool = False) -> Verdict:
    """Whether a learner's answer, a letter or a number, is the sealed one.

    ``seal`` is what `seal_of` made of the right answer, and ``think`` what wrong answers are told
    to think of, which is seen before the answer is right. The rest is as of `choice`.

    Raises:
        ValueError: if the seal is none.
    """
    name, digits, _ = _parts(seal)
    given, number = _number(given)
    letter = isinstance(given, str) and len(given.strip()) == 1
    if number if digits else letter:
        passed, hint = seal_of(given, name, digits) == seal, f"Not quite: think of {think}."
    else:
        passed, hint = False, f"Set the variable to {'a number' if digits else 'one letter'}."
    return _verdict("answer", passed, given, "another answer", hint, theorem, quiet)


def seal_of(right: str | float | int, name: str, digits: int = 0) -> str:
    """The seal of an answer: a name as its salt, how many digits count, and a digest.

    The digest is slow on purpose, but there are few letters: who wants to try all of them can.

    Args:
        right: the answer, a letter or a finite number.
        name: of the exercise, without colons.
        digits: of a number that count, 1 or more; 0 for a letter.

    Raises:
        ValueError: if the name has a colon, or the digits do not fit the answer.
    """
    if ":" in name or digits < 0 or isinstance(right, str) != (digits == 0):
        raise ValueError(
            f"a seal needs a name without colons, digits >= 1 for a number and 0 for a letter; got "
            f"{name!r} and {digits} for {right!r}"
        )
    text = right.strip().lower() if isinstance(right, str) else f"{right + 0.0:.{digits - 1}e}"
    digest = hashlib.pbkdf2_hmac("sha256", text.encode(), name.encode(), 100_000).hex()[:16]
    return f"{name}:{digits}:{digest}"


def _number(answer: Any) -> tuple[Any, bool]:
    """The answer, out of its tensor or array of one element, and whether it is a number."""
    answer = plain(answer)
    return answer, isinstance(answer, numbers.Real) and not isinstance(answer, bool)


def _parts(seal: str) -> tuple[str, int, str]:
    parts = seal.split(":")
    if len(parts) != 3 or not parts[1].isdigit():
        raise ValueError(f"a seal is 'name:digits:digest', as check.seal_of makes it; got {seal!r}")
    return parts[0], int(parts[1]), parts[2]


def _verdict(
    name: str, passed: bool, answer: Any, expected: str, hint: str, theorem: str, quiet: bool
) -> Verdict:
    if passed:
        return tell(Verdict(name, True, theorem), quiet)
    got, statement = shown(answer, 100), "The answer has to be right."
    return tell(Verdict(name, False, theorem, statement, "", expected, got, hint), quiet)
