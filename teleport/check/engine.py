"""One definition of what is right, for learners and for the library's own tests.

A `Check` holds a way to draw cases, the right answer, the properties it has to have, each with its
theorem, and the mistakes that are usually made. Called with a function it tries the function on
cases, shrinks a failing one, and compares *all* answers with what each mistake would have given:
a hint is a finding, not a guess.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from teleport.check.answers import alike, factor, finite, misfit, transposed
from teleport.check.draw import Draw, hypothesis
from teleport.check.guard import CALL_SECONDS, Outcome, Watch, call, copied
from teleport.check.literal import cut, literal, shown, statements
from teleport.check.verdict import Verdict

CASES = 40
"""Cases of the survey that decides; shrinking a failing one tries more."""

SMALLER = 80
"""Cases that the search for a smaller one may try."""

ROUGH = 1e-3
"""Of answers that are wrong by no more, relative to the largest entry, rounding is the cause."""

BUDGET = 4.0
"""Seconds after which no new case is tried, see `Watch`."""

Case = Mapping[str, Any]
Answer = Any
Wrong = Callable[[], Answer]


@dataclass(frozen=True)
class Property:
    """Something that holds for right answers.

    Attributes:
        theorem: its label in the book.
        holds: of the case and the answer, which is of the right kind and finite; None is for the
            property of being the right answer, where there is only one.
    """

    theorem: str
    holds: Callable[[Case, Answer], bool] | None = None

    def fails(self, case: Case, answer: Answer, right: Answer) -> bool:
        """Whether the answer does not have it."""
        if self.holds is None:
            return not alike(answer, right)
        return not self.holds(case, answer)


@dataclass(frozen=True)
class Check:
    """Checks a function that a learner wrote; call it with the function.

    Attributes:
        takes: the arguments by name, in order, with their shape or kind.
        gives: shape or kind of the answer.
        cases: draws a case: the values of the arguments.
        properties: by what they state, in the order in which they are tried, the most telling
            first.
        mistakes: of the arguments, what usual mistakes answer, by the hint to who makes them;
            several may share one. Nothing is computed before it is asked for.
        fits: what is wrong with the kind of an answer, if it need not look like the right one.
        view: what of an answer is unique, for comparisons with mistakes.
    """

    name: str
    takes: Mapping[str, str]
    gives: str
    cases: Callable[[Draw], Case]
    answer: Callable[..., Answer]
    properties: Mapping[str, Property]
    mistakes: Callable[..., Mapping[str, Wrong | Sequence[Wrong]]]
    fits: Callable[[Case, Answer, Answer], tuple[str, str] | None] = lambda case, answer, right: (
        misfit(answer, right)
    )
    view: Callable[[Answer], Answer] = field(default=lambda answer: answer)

    def __call__(self, fn: Any, *, quiet: bool = False) -> Verdict:
        """Try ``fn``, print the verdict unless ``quiet``, and return it.

        Raises:
            CheckError: if Hypothesis is not installed.
        """
        return tell(examine(self, fn), quiet)

    @property
    def theorem(self) -> str:
        """The theorem that the check is mainly about."""
        return next(iter(self.properties.values())).theorem

    @property
    def signature(self) -> str:
        """What the function takes and returns."""
        arguments = ", ".join(f"{name} {kind}" for name, kind in self.takes.items())
        return f"{self.name}({arguments}) -> {self.gives}"


_HEARD: ContextVar[list[Verdict] | None] = ContextVar("_HEARD", default=None)


@contextmanager
def hearing() -> Iterator[list[Verdict]]:
    """The verdicts that are told meanwhile; `teleport check` reads them."""
    heard: list[Verdict] = []
    before = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(before)


def tell(verdict: Verdict, quiet: bool) -> Verdict:
    """Print a verdict unless ``quiet``, let `hearing` know it, and return it."""
    heard = _HEARD.get()
    if heard is not None:
        heard.append(verdict)
    if not quiet:
        print(verdict)  # noqa: T201
    return verdict


@dataclass(frozen=True)
class Problem:
    """Why an attempt is wrong; ``order`` is that of the property it lacks, -1 for the kind."""

    theorem: str
    statement: str
    expected: str
    got: str
    advice: str = ""
    order: int = -1


@dataclass(frozen=True)
class Trial:
    """A case, what came of it, and what is wrong with that."""

    case: Case
    outcome: Outcome
    problem: Problem | None

    @property
    def size(self) -> tuple[bool, int, str]:
        """For the smallest counterexample: the shortest code, and no empty tensor."""
        code = "".join(
            line for name, value in self.case.items() for line in statements(name, value)
        )
        return "torch.empty" in code, len(code), code

    @property
    def order(self) -> int | float:
        """Of the property that fails; infinite if none does."""
        return self.problem.order if self.problem else math.inf


class _FailingError(Exception):
    """Tells Hypothesis that a case is worth shrinking."""


class _Enough(BaseException):
    """Ends a search at once; Hypothesis lets it pass."""


def examine(check: Check, fn: Any) -> Verdict:
    """The verdict on a function.

    Raises:
        CheckError: if Hypothesis is not installed.
    """
    refused = _unusable(check, fn)
    if refused is not None:
        return refused
    # Cases lie on the CPU and their answers need gradients, whatever a notebook has set.
    away = torch.get_default_device().type != "cpu"
    usual = torch.device("cpu") if away else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), usual:
        return _tried(check, fn)


def _tried(check: Check, fn: Callable[..., Any]) -> Verdict:
    watch = Watch(BUDGET)
    survey: list[Trial] = []
    _search(check, fn, survey, watch)
    first = min(attempt.order for attempt in survey)
    if first == math.inf:
        return Verdict(check.name, True, check.theorem, cases=len(survey))
    attempts = list(survey)
    if not any(attempt.outcome.timed_out for attempt in survey):
        _search(check, fn, attempts, watch, shrink=first)
    failures = [attempt for attempt in attempts if attempt.order == first]
    return _told(check, fn, min(failures, key=lambda attempt: attempt.size), survey)


def _search(
    check: Check,
    fn: Callable[..., Any],
    attempts: list[Trial],
    watch: Watch,
    shrink: int | float | None = None,
) -> None:
    """Try cases and append what came; with ``shrink``, smaller ones that lack this property."""
    library = hypothesis()
    phase = library.Phase
    phases = (phase.generate,) if shrink is None else (phase.generate, phase.shrink)
    most = len(attempts) + (CASES if shrink is None else SMALLER)

    def attempt(case: Case) -> None:
        if attempts and (watch.over or len(attempts) >= most):
            raise _Enough
        attempts.append(_attempt(check, fn, case))
        if attempts[-1].outcome.timed_out:
            raise _Enough
        if attempts[-1].order == shrink:
            raise _FailingError

    cases = library.strategies.composite(lambda draw: check.cases(Draw(draw)))
    options = library.settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(library.HealthCheck),
        verbosity=library.Verbosity.quiet,
    )
    try:
        options(library.given(cases())(attempt))()
    except (_Enough, _FailingError, library.errors.Flaky):
        # A function that answers differently each time is flaky to Hypothesis, and wrong to us.
        return


def _attempt(check: Check, fn: Callable[..., Any], case: Case) -> Trial:
    outcome = call(fn, case)
    return Trial(case, outcome, _problem(check, case, outcome))


def _problem(check: Check, case: Case, outcome: Outcome) -> Problem | None:
    right = check.answer(*map(copied, case.values()))
    expected, main = literal(right), next(iter(check.properties))

    def problem(got: str, advice: str = "") -> Problem:
        return Problem(check.theorem, main, expected, got, advice)

    if outcome.timed_out:
        got = f"no answer after {CALL_SECONDS:g} s"
        advice = "Look for a loop whose condition never becomes false."
        return Problem("", "An answer comes in time.", expected, got, advice)
    if outcome.raised is not None:
        return problem(*_exception(outcome.raised))
    if outcome.changed:
        names = " and ".join(f"`{name}`" for name in outcome.changed)
        advice = f"Work on a copy, {outcome.changed[0]}.clone(), or write x = x + y for x += y."
        got = f"{names} changed in place"
        return Problem("", "The arguments stay as they are.", expected, got, advice)
    wrong_kind = check.fits(case, outcome.value, right)
    if wrong_kind is not None:
        return problem(f"{wrong_kind[0]}: {literal(outcome.value)}", wrong_kind[1])
    if not finite(outcome.value):
        advice = "NaN comes from 0/0, infinity from a division by 0: which divisor can be 0 here?"
        return problem(literal(outcome.value), advice)
    for order, (statement, prop) in enumerate(check.properties.items()):
        if prop.fails(case, outcome.value, right):
            return Problem(prop.theorem, statement, expected, literal(outcome.value), order=order)
    return None


def _exception(error: BaseException) -> tuple[str, str]:
    """What was raised, and advice where its cause is certain."""
    text = cut(str(error).split("\n")[0], 200)
    raised = f"{type(error).__name__}: {text}" if text else type(error).__name__
    advice = ""
    if isinstance(error, SystemExit):
        raised = "exit() was called"
        advice = "Leave a function with `return`; exit() and sys.exit() end the whole program."
    elif isinstance(error, EOFError):
        advice = "Nobody is there to answer an input(): work with the arguments alone."
    elif isinstance(error, NotImplementedError):
        advice = "Replace the line that raises NotImplementedError by your answer."
    elif isinstance(error, ModuleNotFoundError):
        advice = "The exercises need nothing but torch, numpy and the standard library."
    elif isinstance(error, RuntimeError) and "dtype" in text:
        advice = (
            "Two tensors of different dtype meet. The inputs are float64: give new tensors the "
            "dtype of the inputs, as in torch.eye(n, dtype=x.dtype) or x.new_ones(n)."
        )
    elif isinstance(error, RuntimeError) and "requires grad" in text:
        advice = "Differentiate by copies that ask for it: w.detach().clone().requires_grad_()."
    return raised, advice


def _unusable(check: Check, fn: Any) -> Verdict | None:
    """The verdict on what cannot be called with the arguments of the check."""
    takes = f"The function is {check.signature}."

    def wrong(got: str, hint: str) -> Verdict:
        return Verdict(check.name, False, check.theorem, takes, "", check.signature, got, hint)

    if not callable(fn):
        got = f"{type(fn).__name__} {shown(fn, 60)}"
        return wrong(got, f"Pass the function itself: check.{check.name}(my_function).")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # compiled functions have no signature to look at
        return None
    try:
        signature.bind(*check.takes)
    except TypeError as error:
        hint = f"It is called with {len(check.takes)} arguments, in this order."
        return wrong(f"{_name(fn)}{signature}: {error}", hint)
    return None


def _told(check: Check, fn: Callable[..., Any], worst: Trial, survey: list[Trial]) -> Verdict:
    """The verdict on a wrong function, from its smallest counterexample."""
    problem = worst.problem
    assert problem is not None
    lines = ["import torch", ""]
    for name, value in worst.case.items():
        lines += statements(name, value)
    lines.append(f"got = {_name(fn)}({', '.join(worst.case)})")
    lines.append(f"expected = {problem.expected}")
    return Verdict(
        check=check.name,
        passed=False,
        theorem=problem.theorem,
        statement=problem.statement,
        counterexample="\n".join(lines),
        expected=problem.expected,
        got=problem.got,
        hint=_diagnosis(check, survey) or problem.advice,
        printed=worst.outcome.printed,
        cases=len(survey),
    )


def _diagnosis(check: Check, survey: list[Trial]) -> str:
    """The hint of the first mistake that gives all the answers of the survey, or nothing."""
    answers = (wrong_answers(check, attempt.case.values()) for attempt in survey)
    for same_hint in zip(*answers, strict=True):
        pairs = zip(same_hint, survey, strict=True)
        if all(_explains(check, wrong, attempt) for (_, wrong), attempt in pairs):
            return str(same_hint[0][0])
    if any(attempt.order < 0 for attempt in survey):
        return ""  # of another kind than the right ones, which the advice is about
    if all(_is_rough(check, attempt) for attempt in survey):
        return (
            "Every answer is right in its first digits only: is it rounded, or calculated in "
            "float32 on the way? The inputs are float64."
        )
    constant = _constant(check, survey)
    return "" if constant is None else f"Every answer is {constant:g} times what it should be."


def _is_rough(check: Check, attempt: Trial) -> bool:
    """Whether an answer is near the right one."""
    right = check.answer(*map(copied, attempt.case.values()))
    return alike(check.view(attempt.outcome.value), check.view(right), ROUGH)


def _explains(check: Check, wrong: Wrong, attempt: Trial) -> bool:
    try:
        answer = wrong()
        if not attempt.outcome.returned:
            return False
        return alike(check.view(attempt.outcome.value), check.view(answer))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        # Where the mistake leads to no answer, it explains that there is none.
        return attempt.outcome.raised is not None


def wrong_answers(check: Check, arguments: Iterable[Any]) -> Iterator[tuple[str, Wrong]]:
    """Hints and the answers they are for: the check's own, then one for all checks."""
    copies = [copied(value) for value in arguments]
    for hint, wrong in check.mistakes(*copies).items():
        yield from ((hint, one) for one in (wrong if isinstance(wrong, Sequence) else [wrong]))
    yield (
        "The result is transposed: check which side the matrices are multiplied from.",
        lambda: transposed(check.answer(*copies)),
    )


def _constant(check: Check, survey: list[Trial]) -> float | None:
    """The number that all answers are too large by, if it is one number."""
    found = set()
    for attempt in survey:
        right = check.answer(*map(copied, attempt.case.values()))
        value = factor(attempt.outcome.value, right)
        if value is not None:
            found.add(round(value, 9))
        elif factor(right, right) is not None or not alike(attempt.outcome.value, right):
            return None
    return found.pop() if len(found) == 1 and found != {1.0} else None


def _name(fn: Callable[..., Any]) -> str:
    name = getattr(fn, "__name__", "fn")
    return name if name.isidentifier() else "fn"
