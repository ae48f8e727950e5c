"""What the commands say while they run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import rich.console
    import rich.table


def console(**options: object) -> "rich.console.Console":
    """A console wide enough for the tables where the output is not a terminal."""
    from rich.console import Console  # late: help needs none

    console = Console(**options)  # type: ignore[arg-type]
    return console if console.is_terminal else Console(width=140, **options)  # type: ignore[arg-type]


def print_tables(*tables: "rich.table.Table") -> None:
    """Print tables; one too wide for a terminal comes in parts, each with the first column.

    Else a terminal of the usual 80 columns would cut numbers off.
    """
    to = console()
    for table in tables:
        to.print(*(_parts(table, to) if to.is_terminal else [table]))


def _parts(table: "rich.table.Table", to: "rich.console.Console") -> "list[rich.table.Table]":
    """The table in parts, each with as many columns as have room without a word cut."""
    words, whole = zip(*(_widths(column, to) for column in table.columns), strict=True)
    if _with_lines(whole) <= to.width:
        return [table]
    found, chosen = list[list[int]](), [0]
    for number in range(1, len(words)):
        if len(chosen) > 1 and _with_lines(words[n] for n in [*chosen, number]) > to.width:
            found.append(chosen)
            chosen = [0]
        chosen.append(number)
    parts = []
    for numbers in [*found, chosen]:
        widths = _filled([words[n] for n in numbers], [whole[n] for n in numbers], to.width)
        parts.append(_columns(table, dict(zip(numbers, widths, strict=True))))
    for part in parts[:-1]:
        part.caption = None
    for part in parts[1:]:
        part.title = f"{table.title}, continued" if table.title else None
    return parts


def _widths(column: "rich.table.Column", to: "rich.console.Console") -> tuple[int, int]:
    """The width of the longest word and of the longest line in a column."""
    wide = to.options.update(width=10_000)
    found = [to.measure(cell, options=wide) for cell in (column.header, *column.cells)]
    return max(f.minimum for f in found), max(f.maximum for f in found)


def _with_lines(widths: Iterable[int]) -> int:
    """The width of a table whose columns have these: a line before each, one at the end."""
    return 1 + sum(width + 3 for width in widths)


def _filled(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths that use the room of a line, the narrowest columns growing first."""
    widths = list(least)
    while _with_lines(widths) < room:
        growing = [n for n, width in enumerate(widths) if width < most[n]]
        if not growing:
            break
        widths[min(growing, key=widths.__getitem__)] += 1
    return widths


def _columns(table: "rich.table.Table", widths: Mapping[int, int]) -> "rich.table.Table":
    """A table of some of the columns, with these widths."""
    from rich.table import Column, Table

    old = [table.columns[number] for number in widths]
    new = Table(
        *(
            Column(c.header, justify=c.justify, width=w)
            for c, w in zip(old, widths.values(), strict=True)
        ),
        title=table.title,
        caption=table.caption,
    )
    for row in zip(*(column.cells for column in old), strict=True):
        new.add_row(*row)
    return new


def say(what: str) -> None:
    """A line for the user that is not the result: to the standard error."""
    typer.echo(what, err=True)


def count_of(number: int, thing: str) -> str:
    """``"1 cell"``, ``"2 cells"``."""
    return f"{number} {thing}" + ("" if number == 1 else "s")
