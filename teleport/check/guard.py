"""Calling a function that somebody is still writing: bounded in time and output, no side effects.

A loop of Python code is ended by a signal where there is one, in the main thread on Unix, and
otherwise left alone in a thread that nobody waits for. A loop inside one call of compiled code
cannot be ended from within its process; ``teleport check FILE`` ends the process.
"""

import contextlib
import io
import random
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teleport.check.literal import cut

CALL_SECONDS = 3.0
"""Seconds that one call may take, see `Watch`. The cases are tiny: a right answer takes
milliseconds."""

ASLEEP = 0.02
"""A process that uses a smaller share of the time is not kept waiting by others: it sleeps."""

WALL_FACTOR = 10.0
"""Times its limit that anything may take, however busy the machine is."""

TICK = 0.02
"""Seconds between two looks at the watch, once the limit may have been reached."""

PRINTED = 200
"""Characters that are kept of what the function prints."""


class Watch:
    """Tells whether work has taken too long, on a machine that may have other work to do.

    What counts is the processor's time: another process on the same cores, or a collection of
    garbage that waits for them, makes no answer late. Work that sleeps uses none of it; for that
    the clock on the wall counts.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._wall, self._used = time.monotonic(), time.process_time()

    @property
    def over(self) -> bool:
        """Whether the limit is reached."""
        wall, used = time.monotonic() - self._wall, time.process_time() - self._used
        late = wall >= self._limit and used < ASLEEP * wall
        return used >= self._limit or late or wall >= WALL_FACTOR * self._limit


class TimeUp(BaseException):
    """Not an `Exception`, so that the function's own ``except Exception`` does not hold it up."""


@dataclass(frozen=True)
class Outcome:
    """What came of one call.

    Attributes:
        value: what was returned; tensors are detached.
        changed: names of arguments whose values were changed in place.
    """

    value: Any = None
    raised: BaseException | None = None
    timed_out: bool = False
    changed: tuple[str, ...] = ()
    printed: str = ""

    @property
    def returned(self) -> bool:
        """Whether there is a value."""
        return self.raised is None and not self.timed_out


class Bounded(io.TextIOBase):
    """A text stream that keeps the beginning of what is written and counts the rest."""

    encoding = "utf-8"

    def __init__(self, most: int = PRINTED) -> None:
        super().__init__()
        self._most = most
        self._kept = ""
        self._count = 0

    def write(self, text: str) -> int:
        """Take in text; never raises, never grows."""
        self._kept += text[: self._most - len(self._kept)]
        self._count += len(text)
        return len(text)

    def getvalue(self) -> str:
        """The beginning, and how much more there was."""
        more = self._count - len(self._kept)
        return cut(self._kept) + (f" … ({more} more characters)" if more else "")


def each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with its tensors changed, also those in lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(each_tensor(change, part) for part in value)
    return value


def copied(value: Any) -> Any:
    """A value of a case whose tensors are new."""
    return each_tensor(lambda tensor: tensor.detach().clone(), value)


def call(fn: Callable[..., Any], case: Mapping[str, Any], limit: float = CALL_SECONDS) -> Outcome:
    """Call ``fn`` with copies of the values of a case, in their order."""
    arguments = {name: copied(value) for name, value in case.items()}
    stream = Bounded()
    value, raised, timed_out = None, None, False
    seed = zlib.crc32(repr(case).encode())  # an answer that is drawn is another one in each case
    with (
        _settings_kept(seed),
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        try:
            value = run_within(limit, lambda: fn(*arguments.values()))
            value = each_tensor(Tensor.detach, value)
        except TimeUp:
            timed_out = True
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # exit() in a learner's function is a SystemExit
            raised = error
    changed = tuple(name for name in case if not _same(case[name], arguments[name]))
    return Outcome(value, raised, timed_out, changed, stream.getvalue())


@contextlib.contextmanager
def _settings_kept(seed: int) -> Iterator[None]:
    """Known random numbers inside; torch's global settings as before after it."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    python = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return (
            isinstance(after, Tensor)
            and before.shape == after.shape
            and before.dtype == after.dtype
            and bool(torch.equal(before, after.detach()))
        )
    if isinstance(before, (list, tuple)):
        pairs = zip(before, after, strict=False)
        return len(before) == len(after) and all(_same(a, b) for a, b in pairs)
    return True  # numbers and functions cannot be changed in place


def run_within(limit: float, work: Callable[[], Any]) -> Any:
    """What ``work`` returns.

    Raises:
        TimeUp: if it takes longer than ``limit`` seconds.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and hasattr(signal, "setitimer") and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        return _run_with_alarm(limit, work)
    return _run_in_thread(limit, work)


def _run_with_alarm(limit: float, work: Callable[[], Any]) -> Any:
    watch, here = Watch(limit), sys._getframe()

    def ring(number: int, frame: Any) -> None:
        # Never while this function cleans up: the alarm would go on ringing after it.
        if frame is not here and watch.over:
            raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    try:
        # It rings again: the first may come too early, or be caught by a bare ``except``.
        signal.setitimer(signal.ITIMER_REAL, limit, TICK)
        return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run_in_thread(limit: float, work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    errors: list[BaseException] = []
    watch = Watch(limit)

    def target() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(limit)
    while thread.is_alive() and not watch.over:
        thread.join(TICK)
    if errors:
        raise errors[0]
    if not found:
        raise TimeUp
    return found[0]
