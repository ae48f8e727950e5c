"""A bar that tells how far a long computation is; on a terminal only."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TypeVar

_Item = TypeVar("_Item")

_BETWEEN = 0.2
"""Between two drawings; no thread draws, since it would disturb what is timed meanwhile."""

Track = Callable[[Iterable[_Item], str], Iterator[_Item]]
"""``track(items, what)`` gives the items and draws how many of them are done."""


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Track]:
    """A function to go through items with, see `Track`; silent where nobody looks.

    Args:
        wanted: False for silence on a terminal, too.
    """
    from rich.console import Console  # late: importing it takes longer than a small null space
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    silent = not (wanted and console.is_terminal)
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=silent)

    def track(items: Iterable[_Item], what: str) -> Iterator[_Item]:
        task = bar.add_task(what, total=length_hint(items, 0) or None)
        drawn = time.monotonic()
        for item in items:
            yield item
            late = time.monotonic() - drawn > _BETWEEN
            bar.update(task, advance=1, refresh=late)
            drawn = time.monotonic() if late else drawn

    with bar:
        yield track
