"""What the commands say while they run."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import rich.console


def console(**options: object) -> "rich.console.Console":
    """A console wide enough for the tables where the output is not a terminal."""
    from rich.console import Console  # late: help needs none

    console = Console(**options)  # type: ignore[arg-type]
    return console if console.is_terminal else Console(width=140, **options)  # type: ignore[arg-type]


def say(what: str) -> None:
    """A line for the user that is not the result: to the standard error."""
    typer.echo(what, err=True)


def count_of(number: int, thing: str) -> str:
    """``"1 cell"``, ``"2 cells"``."""
    return f"{number} {thing}" + ("" if number == 1 else "s")
